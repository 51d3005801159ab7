"""Linear attention: equal to the sum over keys as the paper writes it, with a cache of constant size."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer import nn
from phases import phase4
from tests.ladder import TINY, tiny, tokens

FEATURES = {
    "linear": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "linear_relu2": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_linear_attention_is_the_weighted_mean_of_the_values(name, n_kv_heads):
    config = phase4.Config(**{**TINY, "n_kv_heads": n_kv_heads})
    mixer = phase4.BRANCHES[name].Mixer(config, 0)
    mixer.update({f"{one}_proj": {"bias": mx.full(mixer[f"{one}_proj"].bias.shape, 0.1)} for one in "qkvo"})
    x = mx.random.normal((2, 100, TINY["d_model"]), key=mx.random.key(1))
    net = tiny(phase4.BRANCHES[name], n_kv_heads=n_kv_heads)
    y = mixer(x, net.context(tokens(length=100)))

    q, k, v = (np.array(mixer.split(mixer[f"{one}_proj"](x)), np.float64) for one in "qkv")
    q, k = FEATURES[name](q), np.repeat(FEATURES[name](k), 4 // n_kv_heads, axis=1)
    scores = np.tril(q @ k.swapaxes(-1, -2))
    o = scores @ np.repeat(v, 4 // n_kv_heads, axis=1) / (scores.sum(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, mixer.merge(mx.array(o.astype(np.float32))), atol=2e-5)


def test_the_state_keeps_its_size_and_has_one_head_for_each_head_of_keys():
    net = tiny(phase4.BRANCHES["linear"])
    cache, shapes = net.make_cache(2), []
    for length in (1, 16, 70):
        net(tokens(length=length), cache)
        shapes.append([layer.arrays["sums"].shape for layer in cache.layers])
    assert shapes == 3 * [TINY["n_layers"] * [(2, 2, 1, 8, 9)]]  # 2 of 4 heads have keys


def test_qk_norm_and_rotary_positions_combine_with_linear_attention():
    class Normed(nn.QKNorm, nn.LinearAttention):
        pass

    class Rotary(nn.Hyperparameters):
        rope_theta: float = 10_000.0

    net = tiny(nn.leaf(phase4.Model, Rotary, Mixer=Normed, Position=nn.RotaryPosition))
    ctx = net.context(tokens())
    far = net.hidden(replace(ctx, positions=2 * ctx.positions))
    assert mx.abs(net.hidden(ctx) - far).max() > 1e-3
