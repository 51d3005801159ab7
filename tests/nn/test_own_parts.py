"""The parts as a user's own file takes them: `from mlx_transformer import nn`, subclasses of a few lines."""

import importlib
import inspect
import pkgutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_transformer import nn
from phases import phase5
from tests.ladder import tiny, tokens


def test_every_part_is_exported_by_name():
    for module in pkgutil.iter_modules(nn.__path__, f"{nn.__name__}."):
        for name, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if kind.__module__ == module.name and not name.startswith("_"):
                assert getattr(nn, name, None) is kind
                assert name in nn.__all__
    assert len(set(nn.__all__)) == len(nn.__all__)
    assert all(hasattr(nn, name) for name in nn.__all__)


class Mish(nn.FeedForward):
    activation = staticmethod(lambda x: x * mx.tanh(mx.logaddexp(x, 0)))


class LearnedDecay(nn.Position):
    """A penalty of softplus(slope) * distance on each score, one learned slope for all heads and layers."""

    def build(self, config):
        self.slope = mx.zeros((1,))

    def bias(self, q, k, k_pos, ctx):
        distance = ctx.positions[..., :, None] - k_pos[..., None, :]
        return (-mx.logaddexp(self.slope, 0) * distance)[..., None, :, :].astype(q.dtype)


class RunningMean(nn.Attention):
    """The mean of the values so far, which decoding keeps as a sum and a count."""

    def make_cache(self, batch):
        return nn.State(sum=mx.zeros((batch, 1, self.n_heads * self.head_dim)))

    def __call__(self, x, ctx):
        sums = mx.cumsum(self.v_proj(x), axis=1) + (ctx.cache.arrays["sum"].astype(x.dtype) if ctx.cache else 0)
        if ctx.cache:
            ctx.cache.arrays = {"sum": sums[:, -1:].astype(mx.float32)}
        return self.o_proj(sums / (ctx.positions[..., None] + 1).astype(x.dtype))


OWN = {"activation": {"FFN": Mish}, "position": {"Position": LearnedDecay}, "mixer": {"Mixer": RunningMean}}


@pytest.mark.parametrize("slots", OWN.values(), ids=OWN)
def test_a_part_of_ones_own_is_a_few_lines_and_behaves_as_the_ladders_do(slots):
    (part,) = slots.values()
    lines = [line for line in inspect.getsource(part).splitlines() if line.strip() and '"""' not in line]
    assert len(lines) <= 10
    net, x = tiny(nn.leaf(phase5.Model, **slots)), tokens()
    base = tiny(phase5.Model)
    assert mx.abs(net(x) - base(x)).max() > 1e-2
    cache = net.make_cache(2)
    parts = [net(x[:, :8], cache), *(net(x[:, i : i + 1], cache) for i in range(8, 17))]
    np.testing.assert_allclose(mx.concatenate(parts, axis=1), net(x), atol=1e-5)
    after = mx.array(np.array(x))
    after[:, 9] = (x[:, 9] + 1) % 67
    change = mx.abs(net(x) - net(after)).max(axis=(0, 2))
    assert change[:9].max() == 0
    assert change[10:].max() > 1e-4
    gradients = mx.value_and_grad(lambda weights: (net.update(weights), net.loss(x)[0])[1])(net.parameters())[1]
    assert ("position.slope" in dict(tree_flatten(gradients))) == (part is LearnedDecay)
    unused = ("q_proj", "k_proj") if part is RunningMean else ()
    assert not [p for p, g in tree_flatten(gradients) if mx.abs(g).max() == 0 and p.split(".")[-2] not in unused]
