"""Phase 4: in one setting each idea equals its predecessor, and in any other it does not."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn
from mlx.utils import tree_flatten

from bench.tools.graph import on_metal
from mlx_transformer import ops
from mlx_transformer.nn import moe
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.config import SIZES
from mlx_transformer.nn.model import leaf
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path
from phases import phase3, phase4
from phases.ablations.phase4 import FusedWindow, WindowConfig
from tests.ladder import TINY, in_parts, tiny, tokens
from tests.phases.test_architecture import apart, like

BRANCHES = phase4.BRANCHES
D = TINY["d_model"]


# --- fused attention with grouped heads -----------------------------------------------------------------------------


def test_as_many_key_heads_as_query_heads_are_phase_3_s():
    before = tiny(phase3.Model)
    assert apart(like(phase4.Model, before, n_kv_heads=4), before) == 0
    assert apart(like(phase4.Model, before), before) > 1e-3


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 1), (6, 3), (8, 4), (9, 3)])
def test_keys_have_half_as_many_heads_or_the_next_smaller_divisor(n_heads, n_kv_heads):
    config = phase4.Config(n_heads=n_heads, d_model=8 * n_heads)
    assert config.n_kv_heads == n_kv_heads
    assert replace(config, n_kv_heads=n_heads).n_kv_heads == n_heads


_ADDED = mx.random.normal((2, 4, 9, 9), key=mx.random.key(0))
MASKS = {
    "none": None,
    "causal": mx.arange(9)[:, None] >= mx.arange(9),
    "no keys": mx.arange(9)[:, None] > mx.arange(9) + 2,  # the first queries attend to nothing
    "added": mx.where(mx.arange(9)[:, None] >= mx.arange(9), _ADDED, -mx.inf),
    "no keys added": mx.where(mx.arange(9)[:, None] > mx.arange(9), _ADDED, -mx.inf),
}


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_the_fused_form_and_its_gradients_equal_the_separate_steps(mask, n_kv_heads):
    q, (k, v) = mx.random.normal((2, 4, 9, 8)), mx.random.normal((2, 2, n_kv_heads, 9, 8))

    def both(function):
        def total(q, k, v):
            o = function(q, k, v, 0.4, mask)
            return (o * mx.arange(8)).sum(), o

        (_, o), slopes = mx.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)
        return [o, *slopes]

    with on_metal():
        fused = both(ops.attention)
    for ours, expected in zip(fused, both(ops.grouped_attention), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-5)  # sums of up to a hundred


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_the_fused_form_keeps_its_dtype(mask):
    q = mx.random.normal((2, 4, 9, 8)).astype(mx.bfloat16)
    with on_metal():
        assert ops.attention(q, q, q, 1.0, mask).dtype == mx.bfloat16


def test_a_model_on_metal_is_the_one_on_a_cpu():
    net, x = tiny(phase4.Model), tokens()
    expected = net(x)
    with on_metal():
        np.testing.assert_allclose(net(x), expected, atol=1e-5)


# --- the sliding window ---------------------------------------------------------------------------------------------


class Masked(FusedWindow):
    """The same rule as a mask over the full matrix, with a cache that keeps everything."""

    make_cache = Attention.make_cache
    attend = Attention.attend


def test_a_window_as_long_as_the_sequence_is_full_attention():
    phase = tiny(phase4.Model)
    assert apart(like(BRANCHES["window"], phase, window=17), phase) == 0
    assert apart(like(BRANCHES["window"], phase, window=16), phase) > 1e-5
    assert apart(like(BRANCHES["window"], phase, window=5), phase) > 1e-3


@given(window=st.integers(1, 20), parts=st.lists(st.integers(1, 15), min_size=1, max_size=4))
@settings(max_examples=15)
def test_blocks_and_the_rolling_cache_equal_a_mask_over_the_full_matrix(window, parts):
    numbers = {"n_layers": 2, "window": window}
    net = tiny(BRANCHES["window"], **numbers)
    full = like(leaf(phase4.Model, WindowConfig, Mixer=Masked), net, **numbers)
    x = tokens(2, sum(parts))
    expected = full(x)
    np.testing.assert_allclose(net(x), expected, atol=1e-5)
    np.testing.assert_allclose(in_parts(net, x, parts), expected, atol=1e-5)


def test_gradients_of_blocks_equal_those_of_a_mask():
    net = tiny(BRANCHES["window"], window=5)
    full = like(leaf(phase4.Model, WindowConfig, Mixer=Masked), net, window=5)
    with on_metal():  # where a query without keys could be nan
        ours = by_path(nn.value_and_grad(net, net.loss)(tokens(2, 18))[1])
    theirs = by_path(nn.value_and_grad(full, full.loss)(tokens(2, 18))[1])
    for path, gradient in ours.items():
        np.testing.assert_allclose(gradient, theirs[path], atol=1e-5, err_msg=path)


def test_the_cache_of_a_window_does_not_grow_over_ten_thousand_tokens():
    def sizes(kind):
        net = tiny(kind, n_layers=1)
        cache, found = net.make_cache(1), set()
        for _ in range(100):
            mx.eval(net(tokens(1, 100), cache), cache.state)
            found.add(sum(a.nbytes for _, a in tree_flatten(cache.layers[0].arrays)))
        assert cache.offset.item() == 10_000
        return found

    assert len(sizes(BRANCHES["window"])) == 1
    assert max(sizes(phase4.Model)) > 9_000 * 2 * 2 * 8 * 4


def test_a_window_wider_than_the_sequence_costs_no_more_memory():
    net = tiny(BRANCHES["window"], n_layers=1, window=100_000)
    x, cache = tokens(2, 16), net.make_cache(2)
    np.testing.assert_allclose(mx.concatenate([net(x[:, :9], cache), net(x[:, 9:], cache)], 1), net(x), atol=1e-5)
    assert sum(a.nbytes for _, a in tree_flatten(cache.layers[0].arrays)) < 20_000


# --- mixture of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_gathered_product_equals_that_with_copied_matrices(dtype):
    x, stack = mx.random.normal((7, 3, 8)).astype(dtype), mx.random.normal((4, 8, 5)).astype(dtype)
    expert_ids = mx.array([0, 0, 1, 3, 3, 3, 3])

    def total(x, stack, product):
        y = product(x, stack)
        return (y * mx.arange(5)).astype(mx.float32).sum(), y

    both = [
        mx.value_and_grad(lambda x, s, product=product: total(x, s, product), argnums=(0, 1))(x, stack)
        for product in (lambda x, s: ops.gather_matmul(x, s, expert_ids), lambda x, s: x @ s[expert_ids])
    ]
    for ours, expected in zip(*([y, *slopes] for (_, y), slopes in both), strict=True):
        assert ours.dtype == dtype
        exact = {mx.float32: 1e-5, mx.float16: 0.02, mx.bfloat16: 0.2}[dtype]
        np.testing.assert_allclose(ours.astype(mx.float32), expected.astype(mx.float32), atol=exact)


def layer(kind=moe.MixtureOfExperts, experts=moe.Experts, **numbers):
    """A layer of experts with random weights."""
    filled = type("Layer", (kind,), {"Experts": experts})
    part = filled(BRANCHES["moe"].Config(**{**TINY, **numbers}))
    part.load_weights([(path, mx.random.normal(w.shape) * 0.3) for path, w in by_path(part.parameters()).items()])
    part.eval()
    return part


def run(part, x):
    """The layer's output, and the auxiliary losses and metrics by name."""
    ctx = tiny(phase4.Model).context(tokens())
    out = part(x, ctx)
    return out, {name: value.item() for name, value, _ in ctx.auxiliary}


def token_by_token(part, x, renormalise=True):
    """The definition (GLaM, eq. 1): each token through its own experts, one after the other."""
    out = np.zeros(x.shape, np.float32)
    for place in np.ndindex(*x.shape[:-1]):
        token = x[place]
        p = np.array(mx.softmax(part.router_proj(token)))
        best = np.argsort(-p)[: part.per_token]
        for e in best:
            hidden = ops.gelu_tanh(part.experts.up_proj.weight[e] @ token)
            share = p[e] / p[best].sum() if renormalise else p[e]
            out[place] += share * np.array(part.experts.down_proj.weight[e] @ hidden)
    return out


@pytest.mark.parametrize("branch", ["moe", "switch"])
def test_one_expert_is_the_dense_part(branch):
    net = tiny(BRANCHES[branch], n_experts=1, experts_per_token=1)
    phase = like(phase4.Model, net)
    for ours, theirs in zip(net.blocks, phase.blocks, strict=True):
        for name in ("up_proj", "down_proj"):
            theirs.ffn[name].weight = ours.ffn.experts[name].weight[0]
            theirs.ffn[name].bias = mx.zeros_like(theirs.ffn[name].bias)
    assert apart(net, phase) < 1e-5
    assert apart(like(BRANCHES[branch], net, n_experts=2, experts_per_token=1), phase) > 1e-3


@given(
    n_experts=st.integers(1, 9),
    per_token=st.integers(1, 3),
    rows=st.integers(1, 3),
    length=st.sampled_from([1, 5, 17, 200]),
)
@settings(max_examples=12)
def test_evaluation_drops_nothing(n_experts, per_token, rows, length):
    mx.random.seed(rows)
    part = layer(n_experts=n_experts, experts_per_token=min(per_token, n_experts))
    x = mx.random.normal((rows, length, D))
    out, recorded = run(part, x)
    picked = x[:, :: max(1, length // 5)]
    np.testing.assert_allclose(out[:, :: max(1, length // 5)], token_by_token(part, picked), atol=1e-4)
    assert "router_dropped" not in recorded


def test_a_switch_weighs_its_expert_by_its_probability():
    part = layer(moe.Switch, experts_per_token=1)
    x = mx.random.normal((2, 9, D))
    np.testing.assert_allclose(run(part, x)[0], token_by_token(part, x, renormalise=False), atol=1e-4)
    assert np.abs(run(part, x)[0] - token_by_token(part, x)).max() > 1e-2


def test_training_with_capacity_for_all_is_evaluation_and_so_are_its_gradients():
    part, x = layer(capacity_factor=8.0), mx.random.normal((2, 17, D))

    def gradients(training):
        part.train(training)
        return run(part, x)[1], by_path(nn.value_and_grad(part, lambda x: (run_out(part, x) ** 2).sum())(x)[1])

    def run_out(part, x):
        return part(x, tiny(phase4.Model).context(tokens()))

    (recorded, own), (_, expected) = gradients(True), gradients(False)
    assert recorded["router_dropped"] == 0
    for path, gradient in own.items():
        np.testing.assert_allclose(gradient, expected[path], rtol=1e-4, atol=1e-4, err_msg=path)
        assert mx.abs(gradient).max() > 1e-3


def test_training_drops_what_exceeds_the_capacity():
    part, x = layer(capacity_factor=0.5), mx.random.normal((2, 17, D))
    whole, _ = run(part, x)
    part.train()
    out, recorded = run(part, x)
    slots = 8 * 5  # half of the fair share of 34 tokens' choices per expert, rounded up
    assert 1 - slots / 68 <= recorded["router_dropped"] < 1
    assert mx.abs(out[0, 0] - whole[0, 0]).max() < 1e-5  # the first tokens are computed
    assert mx.abs(out[1] - whole[1]).max() > 1e-2


choices = st.lists(st.integers(0, 5), min_size=1, max_size=60)


@given(choices, st.integers(1, 9))
def test_an_expert_takes_the_first_choices_up_to_its_capacity(chosen, capacity):
    dispatch = moe.capacity_dispatch(mx.array(chosen), 6, capacity)
    slots = dispatch.slot.tolist()
    for expert in range(6):
        own = [n for n, e in zip(slots, chosen, strict=True) if e == expert]
        kept = list(range(expert * capacity, expert * capacity + min(capacity, len(own))))
        assert own == kept + [dispatch.n_slots] * (len(own) - len(kept))


@given(choices)
def test_dropless_dispatch_gives_every_choice_a_slot_of_its_expert(chosen):
    dispatch = moe.dropless_dispatch(mx.array(chosen), 6)
    slots, expert_ids = dispatch.slot.tolist(), dispatch.expert_ids.tolist()
    assert len(set(slots)) == len(chosen)
    assert [expert_ids[n // dispatch.size] for n in slots] == chosen
    assert expert_ids == sorted(expert_ids)
    assert dispatch.n_slots <= len(chosen) * 2 or dispatch.size == 1


def test_the_router_s_losses_and_load_are_the_papers():
    part, x = layer(n_experts=4), mx.random.normal((3, 11, D))
    logits = np.array(part.router_proj(x), np.float64).reshape(-1, 4)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    load = np.bincount(np.argsort(-p, axis=1)[:, :2].ravel(), minlength=4) / (2 * len(p))
    recorded = run(part, x)[1]
    assert recorded["router_balance"] == pytest.approx(4 * (load * p.mean(0)).sum(), rel=1e-5)  # Switch, eq. 4-6
    assert recorded["router_z"] == pytest.approx((np.log(np.exp(logits).sum(1)) ** 2).mean(), rel=1e-5)  # ST-MoE, eq. 5
    assert recorded["router_most_load"] == pytest.approx(4 * load.max(), rel=1e-6)
    assert recorded["router_least_load"] == pytest.approx(4 * load.min(), abs=1e-6)


def test_the_router_s_losses_are_trained_and_logged():
    recipe = phase4.RECIPE.at("nano")
    net = BRANCHES["moe"](BRANCHES["moe"].Config(**TINY))
    metrics, _ = TrainingStep(net, recipe)(tokens(4, 18), 1e-3)
    assert {"router_balance", "router_z", "router_most_load", "router_least_load", "router_dropped"} < metrics.keys()
    assert metrics["router_balance"].item() >= 0.9
    loss, recorded = net.loss(tokens(4, 18))
    extra = 4 * (0.01 * recorded["router_balance"] + 0.001 * recorded["router_z"])
    assert loss.item() == pytest.approx((recorded["loss"] + extra).item(), rel=1e-6)


def test_balance_is_least_where_all_experts_are_alike():
    part, x = layer(n_experts=4), mx.random.normal((8, 64, D))
    part.router_proj.weight = part.router_proj.weight * 1e-4
    assert run(part, x)[1]["router_balance"] == pytest.approx(1, abs=1e-3)
    part.router_proj.weight = mx.zeros_like(part.router_proj.weight).at[0, 0].add(100.0)
    assert run(part, mx.abs(x))[1]["router_balance"] > 1.9


def test_active_parameters_leave_out_what_a_token_does_not_use():
    for branch, per_token in (("moe", 2), ("switch", 1)):
        kind = BRANCHES[branch]
        counts = kind(kind.Config(**SIZES["small"])).count_parameters()
        one = 2 * 128 * 512 * 4  # of all layers
        assert counts["total"] - counts["active"] == (8 - per_token) * one
    phase = phase4.Model(phase4.Config(**SIZES["small"])).count_parameters()
    assert phase["active"] == phase["total"]
    biases, routers = 4 * (512 + 128), 4 * 8 * 128
    assert counts["active"] == phase["total"] - biases + routers  # per token, switch computes what phase 4 does


def test_more_experts_of_a_token_than_there_are_is_bad_input():
    with pytest.raises(BadInput, match="experts_per_token = 5 exceeds n_experts = 4"):
        tiny(BRANCHES["moe"], n_experts=4, experts_per_token=5)
