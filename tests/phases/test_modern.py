"""Phase 5: in one setting each idea equals its predecessor, and in any other it does not."""

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from mlx_transformer.nn import linear
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.feedforward import SwiGLU
from mlx_transformer.nn.position import Position, RotaryPosition
from mlx_transformer.utils.errors import BadInput
from phases import phase4, phase5
from tests.ladder import TINY, V, tiny, tokens

BRANCHES = phase5.BRANCHES


def variant(kind=phase5.Model, **slots):
    return type("Variant", (kind,), slots)


def differ(one, other, x=None):
    """Give one model the other's weights where paths are equal; the largest difference between the logits."""
    x = tokens() if x is None else x
    own = dict(tree_flatten(other.parameters()))
    shared = [(path, own[path]) for path, _ in tree_flatten(one.parameters()) if path in own]
    one.load_weights(shared, strict=False)
    return mx.abs(one(x) - other(x)).max().item()


def test_a_window_of_the_whole_sequence_is_none():
    x = tokens(length=30)
    assert differ(tiny(BRANCHES["mistral"], window=30), tiny(phase5.Model), x) < 1e-6
    assert differ(tiny(BRANCHES["mistral"], window=29), tiny(phase5.Model), x) > 1e-3


def test_a_scaling_by_one_is_none():
    plain = variant(Position=RotaryPosition)
    assert differ(tiny(phase5.Model, rope_low_freq_factor=2.0, rope_original_len=9), tiny(plain)) < 1e-5
    assert differ(tiny(phase5.Model, rope_factor=2.0, rope_original_len=9), tiny(plain)) > 1e-3


def test_as_many_key_heads_as_query_heads_are_phase_1_s():
    class Plain(Attention):
        Linear = linear.Linear

    assert differ(tiny(phase5.Model, n_kv_heads=4), tiny(variant(Mixer=Plain), n_kv_heads=4)) < 1e-6
    assert tiny(phase5.Model).blocks[0].mixer.k_proj.weight.shape == (16, 32)


def test_positions_at_the_angle_zero_are_none():
    """A head of one pair, rotated so slowly that it stands still."""
    still = variant(Position=Position)
    assert differ(tiny(phase5.Model, head_dim=2, rope_factor=1e12, rope_original_len=1), tiny(still, head_dim=2)) < 1e-5
    assert differ(tiny(phase5.Model, head_dim=2), tiny(still, head_dim=2)) > 1e-3


def test_parts_without_biases_are_phase_3_s_with_biases_of_0():
    one, other = tiny(variant(FFN=SwiGLU)), tiny(phase5.Model)
    shaken = differ(one, other)
    for block in one.blocks:
        for part in (block.ffn.up_proj, block.ffn.gate_proj, block.ffn.down_proj):
            part.bias = mx.zeros_like(part.bias)
    assert differ(one, other) < 1e-6
    assert shaken > 1e-3


def test_normalized_queries_and_keys_do_not_depend_on_the_scale_of_their_maps():
    def grown(kind):
        before, after = tiny(kind), tiny(kind)
        after.blocks[0].mixer.q_proj.weight = 3 * before.blocks[0].mixer.q_proj.weight
        return mx.abs(after(tokens()) - before(tokens())).max().item()

    assert grown(BRANCHES["qwen3"]) < 1e-4
    assert grown(phase5.Model) > 1e-3


@pytest.mark.parametrize("name", [None, "mistral", "qwen3"])
def test_tied_is_the_same_with_the_embedding_as_its_head(name):
    untied, tied = BRANCHES.get(name, phase5.Model), BRANCHES[f"{name}_tied" if name else "tied"]
    one, other = tiny(untied), tiny(tied)
    assert "head.weight" not in dict(tree_flatten(other.parameters()))
    assert differ(one, other) > 1e-3
    one.head.weight = other.embedding.weight
    assert differ(one, other) < 1e-6


def test_a_head_of_any_even_width():
    odd = tiny(phase5.Model, n_heads=5, d_model=32, head_dim=6)
    assert odd.blocks[0].mixer.o_proj.weight.shape == (32, 30)
    assert odd(tokens()).shape == (2, 17, V)
    assert phase5.Config(**TINY).head_dim == 8
    assert phase5.Config(**phase5.Config(**TINY, head_dim=6).to_dict()).head_dim == 6


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"n_heads": 5}, "d_model = 32 is not a multiple of n_heads = 5"),
        ({"n_heads": 0}, "n_heads = 0"),
        ({"head_dim": 7}, "head_dim = 7, of 4 heads: rotary positions turn pairs"),
        ({"head_dim": -2}, "head_dim = -2"),
        ({"n_kv_heads": 3}, "n_kv_heads = 3 does not divide n_heads = 4"),
        ({"rope_factor": 0.0}, "rope_factor = 0.0"),
        ({"rope_low_freq_factor": 4.0}, "rope_low_freq_factor = 4.0"),
        ({"rope_original_len": 0}, "rope_original_len = 0"),
    ],
)
def test_an_impossible_field_is_named(numbers, words):
    with pytest.raises(BadInput, match=words):
        tiny(phase5.Model, **numbers)


def test_no_bias_is_left():
    for kind in (phase5.Model, *BRANCHES.values()):
        assert not [path for path, _ in tree_flatten(tiny(kind).parameters()) if path.endswith("bias")]
    assert [path for path, _ in tree_flatten(tiny(phase4.Model).parameters()) if path.endswith("bias")]
    assert isinstance(tiny(phase5.Model).blocks[0].ffn.up_proj, nn.Linear)


def test_parameters_of_gated_and_grouped_parts():
    """At equal d_ff a gated part has half as many weights again; grouped heads give a part of it back."""

    def sizes(kind, part):
        own = tree_flatten(tiny(kind).parameters())
        return sum(value.size for path, value in own if part in path and not path.endswith("bias"))

    assert sizes(phase5.Model, ".ffn.") == 1.5 * sizes(phase4.Model, ".ffn.")
    assert sizes(phase5.Model, ".mixer.") == sizes(phase4.Model, ".mixer.")
