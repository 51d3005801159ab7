"""Phase 4's branches `sparse`, `mla` and `universal`: their predecessors, their definitions, their caches."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn
from mlx.utils import tree_flatten

from mlx_transformer.generate.decoding import decode
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.model import leaf
from mlx_transformer.nn.universal import HALT_MARGIN, Halting
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path
from phases import phase4
from phases.ablations.phase4 import FusedSparse, SparseConfig
from tests.ladder import TINY, in_parts, tiny, tokens
from tests.phases.test_architecture import apart, like, set_all

BRANCHES = phase4.BRANCHES


def cache_bytes(net, length):
    """The bytes of a layer's cache after so many tokens of one sequence."""
    cache = net.make_cache(1)
    mx.eval(net(tokens(1, length), cache), cache.state)
    return sum(a.nbytes for _, a in tree_flatten(cache.layers[0].arrays))


# --- sparse attention -----------------------------------------------------------------------------------------------


class Masked(FusedSparse):
    """The same rule as a mask over the full matrix, with a cache that keeps everything."""

    make_cache = Attention.make_cache
    attend = Attention.attend


@pytest.mark.parametrize("numbers", [{"stride": 17, "n_summary": 1}, {"stride": 5, "n_summary": 5}], ids=str)
def test_one_block_or_summaries_of_every_token_are_full_attention(numbers):
    phase = tiny(phase4.Model)
    assert apart(like(BRANCHES["sparse"], phase, **numbers), phase) < 1e-5
    assert apart(like(BRANCHES["sparse"], phase, stride=5, n_summary=2), phase) > 1e-3


def test_a_token_sees_its_block_and_the_last_tokens_of_earlier_ones():
    mixer = tiny(BRANCHES["sparse"], stride=4, n_summary=1).blocks[0].mixer
    seen = mixer.visible(mx.arange(10), mx.arange(10)).tolist()
    assert [j for j in range(10) if seen[9][j]] == [3, 7, 8, 9]
    assert [j for j in range(10) if seen[7][j]] == [3, 4, 5, 6, 7]


@given(
    stride=st.integers(1, 9),
    summaries=st.integers(1, 9),
    parts=st.lists(st.integers(1, 25), min_size=1, max_size=4),
)
@settings(max_examples=15)
def test_blocks_and_the_cache_of_summaries_equal_a_mask_over_the_full_matrix(stride, summaries, parts):
    numbers = {"n_layers": 2, "stride": stride, "n_summary": min(stride, summaries)}
    net = tiny(BRANCHES["sparse"], **numbers)
    full = like(leaf(phase4.Model, SparseConfig, Mixer=Masked), net, **numbers)
    x = tokens(2, sum(parts))
    expected = full(x)
    np.testing.assert_allclose(net(x), expected, atol=1e-5)
    np.testing.assert_allclose(in_parts(net, x, parts), expected, atol=1e-5)


def test_gradients_of_blocks_equal_those_of_a_mask_over_the_full_matrix():
    numbers = {"stride": 4, "n_summary": 2}
    net = tiny(BRANCHES["sparse"], **numbers)
    full = like(leaf(phase4.Model, SparseConfig, Mixer=Masked), net, **numbers)
    ours, theirs = (by_path(nn.value_and_grad(one, one.loss)(tokens(2, 18))[1]) for one in (net, full))
    for path, gradient in ours.items():
        np.testing.assert_allclose(gradient, theirs[path], atol=1e-5, err_msg=path)


def test_decoding_beyond_the_context_slides_with_sparse_caches():
    """Prompts of unequal length are merged, and a sequence that fills the context is prefilled again."""
    net = tiny(BRANCHES["sparse"], n_layers=1, stride=4, n_summary=1)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 9)]
    together = list(decode(net, prompts, 12, context=12))
    alone = [list(decode(net, [prompt], 12, context=12)) for prompt in prompts]
    assert together == [[a[0], b[0]] for a, b in zip(*alone, strict=True)]


def test_scores_and_cache_of_sparse_attention_grow_slower_than_the_length(monkeypatch):
    """From 256 to 8,192 tokens the keys of a query grow by the square root, where full attention's grow 32 times.

    Memory is that of the plain forms, which keep the scores.
    """
    monkeypatch.setenv("MLX_TRANSFORMER_PLAIN", "1")
    config = BRANCHES["sparse"].Config
    keys = {}
    for length in (256, 8192):
        net = BRANCHES["sparse"](config(**{**TINY, "seq_len": length, "max_len": length}))
        keys[length] = net.blocks[0].mixer.n_keys(length)
    assert keys[8192] < 8 * keys[256]
    assert keys[8192] < 8192 / 20
    sparse, full = (cache_bytes(tiny(kind, seq_len=1024), 1024) for kind in (BRANCHES["sparse"], phase4.Model))
    assert sparse < full / 5

    def peak(kind):
        net, x = tiny(kind, seq_len=1024, n_layers=1), tokens(1, 1024)
        mx.eval(x)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(nn.value_and_grad(net, net.loss)(x)[1])
        return mx.get_peak_memory() - before

    assert peak(BRANCHES["sparse"]) < peak(phase4.Model) / 4


def test_more_summaries_than_tokens_of_a_block_are_bad_input():
    with pytest.raises(BadInput, match="n_summary = 5: expected at most stride = 4"):
        tiny(BRANCHES["sparse"], stride=4, n_summary=5)


# --- latent attention -----------------------------------------------------------------------------------------------


def test_the_cache_of_latent_attention_is_the_latent_and_the_rotary_key():
    net = tiny(BRANCHES["mla"])
    assert (net.config.kv_rank, net.config.rope_dim) == (16, 4)
    per_token = (cache_bytes(net, 512) - cache_bytes(net, 256)) / 256
    assert per_token == 4 * (16 + 4) + 4  # float32, and the position of the slot
    grouped = tiny(phase4.Model)
    assert (cache_bytes(grouped, 512) - cache_bytes(grouped, 256)) / 256 == 4 * 2 * 2 * 8 + 4
    wider = tiny(BRANCHES["mla"], n_heads=8, rope_dim=4)
    assert (cache_bytes(wider, 512) - cache_bytes(wider, 256)) / 256 == per_token


def test_a_key_without_its_rotary_part_does_not_know_positions():
    """Only the rotary part tells positions apart: without it, exchanged early tokens change no later logits."""
    net, x = tiny(BRANCHES["mla"], n_layers=1), tokens(1, 9)
    exchanged = mx.concatenate([x[:, 1:2], x[:, :1], x[:, 2:]], axis=1)
    assert mx.abs(net(x) - net(exchanged))[:, 2:].max() > 1e-4
    blind = set_all(net, "rope_proj.weight", 0.0)
    assert mx.abs(blind(x) - blind(exchanged))[:, 2:].max() < 1e-5


# --- shared layers with halting -------------------------------------------------------------------------------------


def test_one_step_is_the_phase_with_one_layer():
    net = tiny(BRANCHES["universal"], n_layers=1)
    phase = like(phase4.Model, net, n_layers=1)
    phase.position.weight = net.position.weight + net.position.step_weight[0]
    assert apart(net, phase) < 1e-5
    assert apart(like(BRANCHES["universal"], net, n_layers=2), phase) > 1e-3


def test_a_token_that_never_halts_takes_the_last_step_only():
    net, x = tiny(BRANCHES["universal"]), tokens()
    halting = net(x)
    endless = set_all(net, "halt_proj.bias", -1e9)
    ctx = endless.context(x)
    state = endless.embed(ctx)
    for step in range(4):
        state = endless.blocks[0](endless.position.at_step(state, ctx.at(step)), ctx.at(step))
    np.testing.assert_allclose(endless(x), endless.unembed(endless.final_norm(state)), atol=1e-5)
    assert mx.abs(halting - endless(x)).max() > 1e-3


def test_halting_is_the_mean_of_graves_and_its_cost_has_a_gradient():
    """Graves 2016, eq. 6 to 14, token by token."""
    n, halting = 5, Halting(phase4.Config(**TINY))
    p, states = mx.random.uniform(0, 0.7, (n, 2, 6, 1)), mx.random.normal((n, 2, 6, 3))
    p[:, 0, 0], p[0, 0, 1], p[:, 0, 2] = 0.0, 1.0, 0.001  # never, at once, at the last step
    output, steps, remaining = halting.mean(list(p), list(states))
    for b, i in np.ndindex(2, 6):
        total = 0.0
        for last in range(n):
            total += p[last, b, i].item()
            if total >= 1 - HALT_MARGIN:
                break
        weights = [p[step, b, i].item() for step in range(last)]
        weights.append(1 - sum(weights))
        expected = sum(w * np.array(states[step, b, i]) for step, w in enumerate(weights))
        np.testing.assert_allclose(output[b, i], expected, atol=1e-6)
        assert (steps[b, i].item(), remaining[b, i].item()) == (last + 1, pytest.approx(weights[-1], abs=1e-6))

    def cost(p):
        _, steps, remaining = halting.mean(list(p), list(states))
        return (steps + remaining).sum()

    slope = mx.grad(cost)(p)
    assert slope[0, 1, 0].item() == -1  # a higher probability before the last step leaves less for it
    assert slope[-1].max().item() == 0


def test_the_ponder_cost_is_an_auxiliary_loss_and_the_steps_are_logged():
    net = tiny(BRANCHES["universal"], ponder_weight=0.5)
    loss, metrics = net.loss(tokens(4, 18))
    assert 1 <= metrics["ponder_steps"].item() <= 4 < metrics["ponder_cost"].item() + 4
    assert loss.item() == pytest.approx((metrics["loss"] + 0.5 * metrics["ponder_cost"]).item(), rel=1e-6)
    one, four = (tiny(BRANCHES["universal"], n_layers=n).count_parameters()["total"] for n in (1, 4))
    assert four - one == 3 * TINY["d_model"]  # a step costs its vector only
