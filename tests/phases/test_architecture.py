"""Phase 3: in one setting each branch equals the phase or the previous branch, and in any other it does not."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn

from mlx_transformer.nn import feedforward, position
from mlx_transformer.nn.attention import Attention, GroupedAttention
from mlx_transformer.nn.config import SIZES
from mlx_transformer.nn.feedforward import FeedForward, GELUFeedForward
from mlx_transformer.nn.model import leaf
from mlx_transformer.nn.norm import LayerNorm, RMSNorm, ScaleNorm
from mlx_transformer.nn.position import SinusoidalPosition
from mlx_transformer.nn.sparse import LongformerAttention
from mlx_transformer.run.flags import parse
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.run.plan import own_numbers
from mlx_transformer.run.settings import settings_type
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path
from phases import phase1, phase2, phase3
from phases.ablations.phase3 import LongformerConfig
from tests.ladder import TINY, V, in_parts, tiny, tokens

BRANCHES = phase3.BRANCHES


def like(kind, other, **numbers):
    """A tiny model with the weights of another one where path and shape are the same; the rest is perturbed."""
    model = tiny(kind, **numbers)
    theirs = by_path(other.parameters())
    own = by_path(model.parameters())
    shared = [path for path in own.keys() & theirs.keys() if own[path].shape == theirs[path].shape]
    model.load_weights([(path, theirs[path]) for path in shared], strict=False)
    return model


def apart(a, b, x=None):
    """The largest difference between two models' logits."""
    x = tokens() if x is None else x
    return mx.abs(a(x) - b(x)).max().item()


def set_all(model, ending, value):
    """Set every parameter whose path has this ending to a constant."""
    found = {path: w for path, w in by_path(model.parameters()).items() if path.endswith(ending)}
    assert found
    model.load_weights([(path, mx.full(w.shape, value)) for path, w in found.items()], strict=False)
    return model


# --- the phase ------------------------------------------------------------------------------------------------------


def test_phase_1_is_phase_3_with_post_norm_sinusoids_and_relu():
    slots = {"Position": SinusoidalPosition, "FFN": FeedForward}
    first = tiny(phase1.Model)
    assert apart(like(type("Old", (BRANCHES["post_norm"],), slots), first), first) == 0
    assert apart(like(phase3.Model, first), first) > 1e-2


def test_phase_3_without_its_changes_is_phase_2_from_its_initialization():
    slots = {"Position": SinusoidalPosition, "FFN": FeedForward, "init_weight": BRANCHES["xavier"].init_weight}
    second = tiny(phase2.Model)
    assert apart(tiny(type("Old", (BRANCHES["post_norm"],), slots)), second) == 0
    for name in ("post_norm", "sinusoid", "relu", "xavier"):
        assert apart(tiny(BRANCHES[name]), second) > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_phase_3_has_as_many_parameters_as_phase_2_except_positions_and_final_norm(size):
    ours, before = (m.Model(m.Config(**SIZES[size])).count_parameters()["total"] for m in (phase3, phase2))
    numbers = SIZES[size]
    assert ours - before == (numbers["seq_len"] + 2) * numbers["d_model"]
    assert ours < 1.02 * before


@pytest.mark.parametrize("name", ["silu", "glu", "reglu", "geglu", "swiglu", "rms_norm", "scale_norm", "rope", "alibi"])
def test_a_branch_has_as_many_parameters_as_the_phase(name):
    phase, branch = (k(k.Config(**SIZES["small"])).count_parameters()["total"] for k in (phase3.Model, BRANCHES[name]))
    assert abs(branch / phase - 1) < 0.02


@pytest.mark.parametrize(("d_model", "deviation"), [(768, 0.02), (192, 0.04)])
def test_the_initialization_is_that_of_gpt_2_at_its_width(d_model, deviation):
    config = phase3.Config(**{**SIZES["nano"], "n_layers": 4, "d_model": d_model})
    weights = by_path(phase3.Model(config).parameters())
    for path in ("embedding.weight", "head.weight", "position.weight", "blocks.1.mixer.q_proj.weight"):
        assert abs(weights[path].std().item() / deviation - 1) < 0.03
    for path in ("blocks.1.mixer.o_proj.weight", "blocks.3.ffn.down_proj.weight"):
        assert abs(weights[path].std().item() / (deviation / 8**0.5) - 1) < 0.03
    assert all(weights[path].max() == 0 for path in weights if path.endswith("_proj.bias"))


def test_positions_beyond_the_table_take_its_last_row():
    net = tiny(phase3.Model)
    ctx = net.context(tokens(length=40))
    added = net.position.at_input(mx.zeros((2, 40, TINY["d_model"])), ctx)
    assert mx.array_equal(added[0, :17], net.position.weight)
    assert mx.array_equal(added[0, 17:], mx.broadcast_to(net.position.weight[-1], (23, TINY["d_model"])))


def test_a_field_left_at_0_is_derived():
    assert phase3.Config(**TINY).max_len == TINY["seq_len"]
    assert BRANCHES["transformer_xl"].Config(**TINY).segment_len == 8
    stored = phase3.Config(**TINY, max_len=40).to_dict()
    assert phase3.Config(**stored).max_len == 40
    with pytest.raises(BadInput, match="max_len = 16: expected at least seq_len = 17"):
        phase3.Config(**TINY, max_len=16)


@pytest.mark.parametrize(
    ("branch", "numbers", "words"),
    [
        ("gqa", {"n_kv_heads": 3}, "n_kv_heads = 3 does not divide n_heads = 4"),
        ("rope", {"n_heads": 32}, "head_dim = 1, of 32 heads"),
        ("t5", {"n_buckets": 8, "max_distance": 4}, "max_distance = 4"),
        ("t5", {"n_buckets": 1}, "n_buckets = 1"),
        ("t5", {"max_distance": 10**9}, "at most 65,536"),
        ("transformer_xl", {"segment_len": 10**9}, "segment_len = 1000000000: expected at most 32,768"),
        ("rope", {"rope_theta": 0.0}, "rope_theta = 0.0: expected a number above 0"),
        ("longformer", {"window": 0}, "window = 0"),
        ("longformer", {"window": 2**31 - 1}, "window = 2147483647: expected at most 1,048,576"),
        ("longformer", {"n_global": 999}, "n_global = 999: expected at most seq_len"),
        ("shaw", {"max_distance": 100_000}, "max_distance = 100000: expected at most 65,536"),
    ],
)
def test_an_impossible_field_is_named(branch, numbers, words):
    with pytest.raises(BadInput, match=words):
        tiny(BRANCHES[branch], **numbers)


def test_every_field_of_a_branch_has_a_flag():
    kind = settings_type(Experiment.of_phase(3))
    assert parse(kind, "p", args=["--n-kv-heads", "1", "--rope-theta=5e4"]).to_dict() == {
        "n_kv_heads": 1,
        "rope_theta": 5e4,
    }
    with pytest.raises(BadInput, match="--window: '0': expected a whole number from 1 to"):
        parse(kind, "p", args=["--window", "0"])
    with pytest.raises(BadInput, match="--window"):
        parse(settings_type(Experiment.of_phase(1)), "p", args=["--window", "3"])


def test_a_field_of_another_branch_is_bad_input():
    phase = Experiment.of_phase(3)
    given = settings_type(phase)(n_kv_heads=1, seq_len=32, learning_rate=1e-3)
    assert own_numbers(phase, BRANCHES["gqa"], given) == {"n_kv_heads": 1, "seq_len": 32}
    with pytest.raises(BadInput, match="--n-kv-heads belongs to another model: --branch mqa or gqa"):
        own_numbers(phase, BRANCHES["rope"], given)


# --- heads, norms, feed-forward -------------------------------------------------------------------------------------


def test_a_tied_head_is_an_untied_one_with_the_embedding_s_matrix():
    tied = tiny(BRANCHES["tied"])
    phase = like(phase3.Model, tied)
    assert apart(tied, phase) > 1e-2
    phase.head.weight = tied.embedding.weight
    assert apart(tied, phase) == 0


GATED = {"glu": mx.sigmoid, "reglu": nn.relu, "geglu": nn.gelu_approx, "swiglu": nn.silu}


@pytest.mark.parametrize("name", GATED)
def test_a_gate_times_one_is_an_ungated_layer(name):
    gated = tiny(BRANCHES[name])
    width = round(TINY["d_ff"] * 2 / 3)
    assert gated.blocks[0].ffn.gate_proj.weight.shape == (width, TINY["d_model"])
    ungated = type("Ungated", (FeedForward,), {"activation": staticmethod(GATED[name])})
    plain = like(type("Plain", (phase3.Model,), {"FFN": ungated}), gated, d_ff=width)
    for ours, theirs in zip(gated.blocks, plain.blocks, strict=True):
        theirs.ffn.up_proj.update(ours.ffn.gate_proj.parameters())
    assert apart(gated, plain) > 1e-3
    set_all(gated, "ffn.up_proj.weight", 0.0)
    set_all(gated, "ffn.up_proj.bias", 1.0)
    assert apart(gated, plain) < 1e-5


def test_geglu_and_the_phase_have_the_same_activation():
    assert feedforward.GEGLU.activation is GELUFeedForward.activation


def test_rms_norm_is_layer_norm_where_the_mean_is_zero():
    x = mx.random.normal((3, 32))
    rms, layer = RMSNorm(32, 1e-5), LayerNorm(32, 1e-5)
    assert not mx.allclose(rms(x), layer(x), atol=1e-3)
    x = x - x.mean(-1, keepdims=True)
    np.testing.assert_allclose(rms(x), layer(x), atol=1e-5)


def test_scale_norm_gives_length_g_and_is_rms_norm_initially():
    x = mx.random.normal((3, 32)) * 5
    scale = ScaleNorm(32, 1e-5)
    np.testing.assert_allclose(scale(x), RMSNorm(32, 1e-5)(x), atol=1e-5)
    scale.g = mx.array([3.0])
    np.testing.assert_allclose(mx.linalg.norm(scale(x), axis=-1), 3.0, atol=1e-4)


def test_a_model_without_norms_has_none():
    x = tokens()
    net = tiny(BRANCHES["no_norm"])
    assert not [path for path in by_path(net.parameters()) if "norm" in path]
    assert mx.array_equal(net.hidden(net.context(x)), net.run_blocks(net.embed(net.context(x)), net.context(x)))


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def unordered():
    """Phase 3 without positions."""
    return tiny(BRANCHES["no_position"])


def test_rotary_scores_depend_on_distance_only():
    rope, x = position.RotaryPosition(BRANCHES["rope"].Config(**TINY)), mx.random.normal((2, 2, 4, 17, 8))
    ctx = tiny(BRANCHES["rope"]).context(tokens())

    def scores(offset):
        q, k = rope.rotate(*x, replace(ctx, positions=ctx.positions + offset))
        return q @ k.swapaxes(-1, -2)

    np.testing.assert_allclose(scores(0), scores(100), atol=1e-4)
    assert mx.abs(scores(0) - x[0] @ x[1].swapaxes(-1, -2)).max() > 0.1


def test_rotary_positions_at_angle_0_are_no_position(unordered):
    rope = like(BRANCHES["rope"], unordered)
    assert apart(rope, unordered) > 1e-3
    still = replace(rope.context(tokens()), positions=mx.zeros((17,), mx.int32))
    q, k = mx.random.normal((2, 2, 4, 17, 8))
    assert all(mx.array_equal(a, b) for a, b in zip(rope.position.rotate(q, k, still), (q, k), strict=True))


def test_alibi_without_a_slope_is_no_position(unordered, monkeypatch):
    alibi = like(BRANCHES["alibi"], unordered)
    assert apart(alibi, unordered) > 1e-3
    monkeypatch.setattr(position, "alibi_slopes", lambda n_heads: [0.0] * n_heads)
    assert apart(alibi, unordered) == 0


def test_t5_with_one_number_in_all_buckets_is_no_position(unordered):
    t5 = like(BRANCHES["t5"], unordered)
    assert apart(t5, unordered) > 1e-3
    assert apart(set_all(t5, "position.weight", 0.5), unordered) < 1e-5


def test_shaw_without_tables_is_no_position(unordered):
    shaw = like(BRANCHES["shaw"], unordered)
    assert apart(shaw, unordered) > 1e-3
    no_keys = set_all(shaw, "relative_keys", 0.0)
    assert apart(no_keys, unordered) > 1e-3
    assert apart(set_all(no_keys, "relative_values", 0.0), unordered) < 1e-5


def test_shaw_is_the_paper_s_sum_over_pairs():
    """Equations 3 and 4, pair by pair, with distances cut off at 3."""
    net = tiny(BRANCHES["shaw"], max_distance=3)
    mixer, x = net.blocks[0].mixer, mx.random.normal((1, 9, TINY["d_model"]))
    q, k, v = (np.array(a[0, 1], np.float64) for a in mixer.project(x, net.context(tokens(1, 9))))
    keys, values = np.array(mixer.relative_keys, np.float64), np.array(mixer.relative_values, np.float64)
    for i in range(9):
        e = [q[i] @ (k[j] + keys[min(i - j, 3)]) / np.sqrt(mixer.head_dim) for j in range(i + 1)]
        p = np.exp(e) / np.exp(e).sum()
        z = sum(p[j] * (v[j] + values[min(i - j, 3)]) for j in range(i + 1))
        ctx = net.context(tokens(1, 9))
        got = mixer.attend(*mixer.project(x, ctx), ctx)[0, 1, i]
        np.testing.assert_allclose(np.array(got), z, atol=1e-5)


# --- Transformer-XL -------------------------------------------------------------------------------------------------


def test_transformer_xl_in_one_segment_without_distances_is_no_position(unordered):
    xl = like(BRANCHES["transformer_xl"], unordered, segment_len=17)
    for ending in ("r_proj.weight", "content_bias"):
        assert apart(xl, unordered) > 1e-3
        set_all(xl, ending, 0.0)
    assert apart(xl, unordered) < 1e-6
    short = like(BRANCHES["transformer_xl"], xl, segment_len=4)
    assert apart(short, unordered) > 1e-3
    assert mx.abs(short(tokens()) - unordered(tokens()))[:, :8].max() < 1e-5  # up to here two segments cover everything


class Recurrence(nn.Module):
    """Sec. 3.2-3.3 as in the paper: segment by segment, with each layer's inputs kept for the next segment."""

    def __init__(self, net, stop):
        super().__init__()
        self.net, self.stop = net, stop

    def __call__(self, x):
        size, memories, out = self.net.config.segment_len, {}, []
        for start in range(0, x.shape[1], size):
            h = self.net.embedding(x[:, start : start + size])
            for i, block in enumerate(self.net.blocks):
                normed = block.norms[0](h)
                memory = memories.get(i, normed[:, :0])
                memories[i] = self.stop(normed)
                h = h + self.attend(block.mixer, normed, memory)
                h = h + block.ffn(block.norms[1](h), None)
            out.append(h)
        return self.net.head(self.net.final_norm(mx.concatenate(out, axis=1)), self.net.embedding)

    def attend(self, mixer, own, memory):
        both = mx.concatenate([memory, own], axis=1)
        q, k, v = (mixer.split(p(x)) for p, x in ((mixer.q_proj, own), (mixer.k_proj, both), (mixer.v_proj, both)))
        m = memory.shape[1]
        columns = []
        for j in range(both.shape[1]):  # key by key: distances m + i - j
            column = ((q + mixer.per_head(mixer.content_bias)) * k[:, :, j : j + 1]).sum(-1)
            distance = mx.arange(own.shape[1]) + m - j
            table = SinusoidalPosition(self.net.config).encoding(distance, self.net.config.d_model)
            r = mixer.split(mixer.r_proj(table)[None])
            column = column + ((q + mixer.per_head(mixer.position_bias)) * r).sum(-1)
            columns.append(mx.where(distance >= 0, column * mixer.head_dim**-0.5, -mx.inf))
        return mixer.merge(mx.softmax(mx.stack(columns, axis=-1), axis=-1) @ v)


@pytest.mark.parametrize("segment_len", [3, 5, 17])
def test_transformer_xl_is_the_paper_s_recurrence_and_its_gradients(segment_len):
    net, batch = tiny(BRANCHES["transformer_xl"], segment_len=segment_len, n_layers=2), tokens(2, 18)
    x, targets = batch[:, :-1], batch[:, 1:]

    def gradients(forward):
        def loss(weights):
            net.update(weights)
            return nn.losses.cross_entropy(forward(x), targets, reduction="mean")

        return by_path(mx.grad(loss)(net.trainable_parameters()))

    stopped, open_ = Recurrence(net, mx.stop_gradient), Recurrence(net, lambda h: h)
    np.testing.assert_allclose(net(x), stopped(x), atol=1e-5)
    ours, theirs, through = gradients(net), gradients(stopped), gradients(open_)
    for path, gradient in ours.items():
        np.testing.assert_allclose(gradient, theirs[path], atol=1e-5, err_msg=path)
    if segment_len < 17:
        assert mx.abs(ours["embedding.weight"] - through["embedding.weight"]).max() > 1e-4


# --- grouped heads --------------------------------------------------------------------------------------------------


def test_as_many_key_heads_as_query_heads_are_plain_attention():
    phase = tiny(phase3.Model)
    assert apart(like(BRANCHES["gqa"], phase, n_kv_heads=4), phase) == 0


@pytest.mark.parametrize(("branch", "n_kv_heads"), [("gqa", 2), ("mqa", 1)])
def test_grouped_heads_are_plain_attention_with_repeated_keys(branch, n_kv_heads):
    net = tiny(BRANCHES[branch])
    phase = like(phase3.Model, net)
    assert apart(net, phase) > 1e-3
    for ours, theirs in zip(net.blocks, phase.blocks, strict=True):
        for name in ("k_proj", "v_proj"):
            for kind, w in ours.mixer[name].items():
                heads = w.reshape(n_kv_heads, -1, *w.shape[1:])
                theirs.mixer[name][kind] = mx.repeat(heads, 4 // n_kv_heads, axis=0).flatten(0, 1)
    assert apart(net, phase) < 1e-5
    cache = net.make_cache(2)
    net(tokens(), cache)
    assert cache.layers[0].arrays["k"].shape[1] == n_kv_heads


# --- Longformer -----------------------------------------------------------------------------------------------------


class Masked(LongformerAttention):
    """The same rule as a mask over the full matrix, with a cache that keeps everything."""

    make_cache = Attention.make_cache
    attend = Attention.attend


class GroupedLongformer(LongformerAttention, GroupedAttention):
    pass


class GroupedMasked(Masked, GroupedAttention):
    pass


PAIRS = [
    (phase3.Model, LongformerAttention, Masked, {}),
    (phase3.Model, LongformerAttention, Masked, {"Position": position.ALiBi}),
    (BRANCHES["gqa"], GroupedLongformer, GroupedMasked, {}),
]


@pytest.mark.parametrize(("kind", "blocked", "masked", "slots"), PAIRS, ids=["phase 3", "alibi", "gqa"])
@given(window=st.integers(1, 20), n_global=st.integers(1, 6), length=st.integers(1, 40))
@settings(max_examples=12)
def test_blocks_equal_a_mask_over_the_full_matrix(kind, blocked, masked, slots, window, n_global, length):
    numbers = {"n_layers": 2, "window": window, "n_global": n_global}
    net = tiny(leaf(kind, LongformerConfig, Mixer=blocked, **slots), **numbers)
    full = like(leaf(kind, LongformerConfig, Mixer=masked, **slots), net, **numbers)
    x = tokens(2, length)
    np.testing.assert_allclose(net(x), full(x), atol=1e-5)


def test_gradients_of_blocks_equal_those_of_a_mask():
    numbers = {"window": 5, "n_global": 2}
    net = tiny(BRANCHES["longformer"], **numbers)
    full = like(leaf(phase3.Model, LongformerConfig, Mixer=Masked), net, **numbers)
    ours, theirs = (by_path(nn.value_and_grad(m, m.loss)(tokens(2, 18))[1]) for m in (net, full))
    for path, gradient in ours.items():
        np.testing.assert_allclose(gradient, theirs[path], atol=1e-5, err_msg=path)


def test_a_window_as_long_as_the_sequence_is_full_attention():
    phase = tiny(phase3.Model)
    assert apart(like(BRANCHES["longformer"], phase, window=17), phase) < 1e-5
    assert apart(like(BRANCHES["longformer"], phase, window=5), phase) > 1e-3


@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    window=st.integers(1, 8),
    n_global=st.integers(1, 4),
)
@settings(max_examples=12)
def test_a_window_is_prefilled_in_parts_of_any_length(parts, window, n_global):
    net = tiny(BRANCHES["longformer"], window=window, n_global=n_global, n_layers=2)
    x = tokens(2, sum(parts))
    np.testing.assert_allclose(in_parts(net, x, parts), net(x), atol=1e-5)


def test_cost_grows_linearly_and_the_cache_does_not_grow():
    entries = []

    class Counted(LongformerAttention):
        def mix(self, q, k, v, mask):
            entries.append(q.shape[0] * q.shape[2] * k.shape[2])
            return super().mix(q, k, v, mask)

    net = tiny(leaf(phase3.Model, LongformerConfig, Mixer=Counted), n_layers=1, window=8, n_global=2)
    for length in (64, 128, 256):
        net(tokens(1, length))
    assert entries == [length * (2 + 2 * 8) for length in (64, 128, 256)]
    cache = net.make_cache(1)
    sizes = set()
    for _ in range(40):
        net(tokens(1, 3), cache)
        sizes.add(tuple(a.size for _, a in sorted(cache.layers[0].arrays.items())))
    assert len(sizes) == 1


def test_blocks_refuse_a_mask_over_whole_sequences():
    net = tiny(BRANCHES["longformer"])
    with pytest.raises(ValueError, match=r"does not support ctx\.mask"):
        net.hidden(replace(net.context(tokens()), mask=mx.ones((17, 17), mx.bool_)))


# --- beyond the trained length --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BRANCHES)
def test_a_sequence_four_times_as_long_has_finite_logits(name):
    logits = tiny(BRANCHES[name])(tokens(1, 68))
    assert logits.shape == (1, 68, V)
    assert mx.isfinite(logits).all()
