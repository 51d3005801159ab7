"""The encoder-decoder: padding, what decoding computes once, other parts, and mixers that an encoder cannot take."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer import nn
from mlx_transformer.utils.errors import BadInput
from phases import phase1, phase3
from tests.ladder import V, tiny

KIND = phase1.BRANCHES["translator"]


class Modern(KIND):
    """Other parts in the same places: rotary positions, pre-norm, fewer heads of keys and values."""

    Config = type("Config", (phase3.BRANCHES["rope"].Config, phase3.BRANCHES["gqa"].Config), {})
    Position, Mixer, Cross = nn.RotaryPosition, nn.GroupedAttention, nn.GroupedAttention
    EncoderBlock, Block = nn.PreNormBlock, nn.CrossPreNormBlock

    def make_final_norm(self):
        return self.make_norm()


def pairs():
    x = np.array(mx.random.randint(0, V, (2, 2, 12)))
    x[0, 0, 9:] = x[1, 0, 5:] = nn.PAD
    return x


@pytest.mark.parametrize("kind", [KIND, Modern], ids=["2017", "modern"])
def test_padding_changes_nothing_and_the_source_is_read_once(kind):
    net, x = tiny(kind), pairs()
    full = net(mx.array(x))
    longer = np.pad(x, ((0, 0), (0, 0), (0, 5)), constant_values=nn.PAD)
    np.testing.assert_allclose(net(mx.array(longer))[:, :12], full, atol=1e-5)
    x[0, 0, 2] = (x[0, 0, 2] + 1) % V
    assert mx.abs(net(mx.array(x)) - full)[0].max() > 1e-3
    x[0, 0, 2] = (x[0, 0, 2] - 1) % V

    cache = net.make_cache(2)
    net.read(mx.array(x[:, 0]), cache)
    read = [dict(layer.memory.arrays) for layer in cache.layers]
    logits = [net(mx.array(x[:, 1, i : i + 1]), cache) for i in range(12)]
    np.testing.assert_allclose(mx.concatenate(logits, axis=1), full, atol=1e-5)
    for layer, before in zip(cache.layers, read, strict=True):
        assert all(layer.memory.arrays[name] is held for name, held in before.items()), "keys were computed again"


def test_the_loss_counts_the_target_s_tokens_alone():
    net, x = tiny(KIND), pairs()
    x[0, 1, 7:] = nn.PAD
    ctx, targets = net.inputs(mx.array(x))
    each = np.array(net.token_loss(net.hidden(ctx), targets))
    assert (each[0, 6:] == 0).all()
    assert net.loss(mx.array(x))[0].item() == pytest.approx(each.sum() / (6 + 11), rel=1e-5)


def test_a_mixer_that_sees_a_part_of_a_source_is_refused():
    class Windowed(KIND):
        Config = phase3.BRANCHES["longformer"].Config
        Mixer = nn.LongformerAttention

    with pytest.raises(BadInput, match="LongformerAttention in an encoder: it sees earlier tokens only, or near ones"):
        tiny(Windowed)
