"""Attention maps: the weights that mixers use, of every kind of attention, by a copy that leaves the model alone."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer import nn
from tests.ladder import TINY, kinds, tiny, tokens

L, HEADS, LAYERS = TINY["seq_len"], TINY["n_heads"], TINY["n_layers"]
KINDS = kinds()
NUMBERS = {  # shorter than the text
    **{name: {} for name in ("1", "6", "3-gqa", "3-alibi", "3-shaw", "4-mla", "6-mod", "idea-shared")},
    **{name: {} for name in ("idea-combined", "idea-segments")},
    "3-longformer": {"window": 5, "n_global": 2},
    "4-sparse": {"stride": 5, "n_summary": 2},
    "5-mistral": {"window": 5},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_map_is_a_causal_distribution_and_what_the_mixer_uses(name):
    net, ids = tiny(KINDS[name], **NUMBERS[name]), tokens()
    before = net(ids)
    maps = nn.attention_maps(net, ids)
    assert [one.depth for one in maps] == list(range(LAYERS))
    for one in maps:
        weights = np.array(one.weights)
        assert weights.shape == (2, HEADS, L, L)
        assert not np.triu(weights, 1).any()
        sums = weights.sum(-1)
        np.testing.assert_allclose(sums[sums > 0], 1, atol=1e-5)
        assert (sums > 0).all() == (name != "6-mod" or one.depth % 2 == 0)  # its routed blocks pass some tokens on
    (only,) = nn.attention_maps(net, ids, depth=2)
    assert mx.array_equal(only.weights, maps[2].weights)
    assert mx.array_equal(before, net(ids)), "the model has changed"

    x, mixer = mx.random.normal((2, L, TINY["d_model"])), net.blocks[-1].mixer
    if isinstance(mixer, nn.ShawAttention):
        mixer.relative_values = mx.zeros_like(mixer.relative_values)  # added to the values, at each distance
    ctx = replace(net.context(ids), x0=x)
    v = mixer.project(x, ctx)[2]
    v = mixer.v_up_proj(v, None) if isinstance(mixer, nn.LatentAttention) else v
    o = mixer.weights_of(x, ctx) @ mx.repeat(v, HEADS // v.shape[1], axis=1)
    assert mx.allclose(mixer.merge(o), mixer(x, ctx), atol=1e-5)


def test_a_mixer_with_a_state_has_no_map():
    assert nn.attention_maps(tiny(KINDS["4-linear"]), tokens()) == []
    assert [one.depth for one in nn.attention_maps(tiny(KINDS["idea-hybrid"]), tokens())] == [1, 3]


def test_the_maps_of_a_translator_are_of_three_kinds():
    source = mx.array([[[5, 6, 7, 8, 0, -1], [0, 9, 3, 4, 1, 2]]])
    net = tiny(KINDS["1-translator"].__mro__[1])
    maps = {kind: [one for one in nn.attention_maps(net, source) if kind in one.path] for kind in (".cross", "encoder")}
    assert {kind: len(found) for kind, found in maps.items()} == {".cross": LAYERS, "encoder": LAYERS}
    for one in (*maps[".cross"], *maps["encoder"]):
        np.testing.assert_allclose(np.array(one.weights).sum(-1), 1, atol=1e-5)
        assert not np.array(one.weights)[..., 5].any(), "padding is hidden"
