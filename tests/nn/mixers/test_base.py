"""What all recurrent mixers share: they refuse a bias and a mask."""

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_transformer import nn
from mlx_transformer.utils.errors import BadInput
from phases import phase1
from tests.ladder import TINY, tokens


class Sum(nn.RecurrentMixer):
    """y_t = x_1 + ... + x_t."""

    def initial_state(self, batch):
        return {"sum": mx.zeros((batch, 1, TINY["d_model"]))}

    def advance(self, x, ctx, state):
        y = mx.cumsum(x, axis=1)
        y = y if state is None else y + state["sum"].astype(x.dtype)
        return y, {"sum": y[:, -1:]}


def test_a_position_with_a_bias_is_refused_when_the_model_is_built():
    for slots in ({"Mixer": Sum}, {"Mixer": (nn.Attention, Sum)}):
        kind = nn.leaf(phase1.Model, Position=nn.ALiBi, **slots)
        with pytest.raises(BadInput, match="Sum has no scores to which the bias of ALiBi could be added"):
            kind(kind.Config(**TINY))
    nn.leaf(phase1.Model, Mixer=nn.Attention, Position=nn.ALiBi)(phase1.Config(**TINY))


def test_a_mask_is_refused_by_a_model_that_sets_one_and_in_a_call():
    class Masked(nn.leaf(phase1.Model, Mixer=Sum)):
        def context(self, tokens, cache=None):
            return replace(super().context(tokens, cache), mask=mx.array(True))

    with pytest.raises(BadInput, match=r"Sum has no scores that ctx\.mask could hide"):
        Masked(phase1.Config(**TINY))
    net = nn.leaf(phase1.Model, Mixer=Sum)(phase1.Config(**TINY))
    with pytest.raises(BadInput, match=r"ctx\.mask"):
        net.hidden(replace(net.context(tokens()), mask=mx.array(True)))
