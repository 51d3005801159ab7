"""Ideas that later phases may bring, each as short as it should be: they show that the hooks hold, without model.py."""

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.attention import Attention, GroupedAttention, QKNorm
from mlx_transformer.nn.block import Block, PreNormBlock
from mlx_transformer.nn.cache import State
from mlx_transformer.nn.config import Hyperparameters
from mlx_transformer.nn.linear import Linear
from mlx_transformer.nn.model import leaf
from mlx_transformer.nn.position import RotaryPosition
from mlx_transformer.nn.relative import TransformerXLAttention
from mlx_transformer.nn.sparse import WindowAttention
from phases import phase1


class ParallelBlock(Block):
    n_norms = 1

    def __call__(self, x, ctx):
        h = self.norms[0](x)
        return x + self.mixer(h, ctx) + self.ffn(h, ctx)


class Recurrence(nn.Module):
    """h_t = a h_(t-1) + (1 - a) W x_t: the simplest state space."""

    def __init__(self, config, layer):
        super().__init__()
        self.in_proj = Linear(config.d_model, config.d_model)
        self.decay = mx.full((config.d_model,), 0.5)

    def make_cache(self, batch):
        return State(h=mx.zeros((batch, self.decay.size)))

    def __call__(self, x, ctx):
        h = mx.zeros_like(x[:, 0]) if ctx.cache is None else ctx.cache.arrays["h"].astype(x.dtype)
        out = []
        for token in mx.split(self.in_proj(x), x.shape[1], axis=1):
            h = self.decay * h + (1 - self.decay) * token[:, 0]
            out.append(h)
        if ctx.cache is not None:
            ctx.cache.arrays = {"h": h.astype(mx.float32)}
        return mx.stack(out, axis=1)


class Shared(phase1.Model):
    """One block, run at every depth (Universal Transformer): stack() repeats it, each depth has its own cache."""

    def build(self, config):
        super().build(config)
        self.blocks = self.blocks[:1]

    def stack(self):
        return self.blocks * self.config.n_layers


class FurtherToken(phase1.Model):
    """Predicts the token after the next as well, through the ledger."""

    def build(self, config):
        super().build(config)
        self.further_proj = Linear(config.d_model, config.d_model)

    def objective(self, h, targets, ctx):
        ctx.record("further", self.token_loss(self.further_proj(h[:, :-1]), targets[:, 1:]).mean(), weight=0.1)
        return super().objective(h, targets, ctx)


class CombinedNumbers(Hyperparameters):
    n_kv_heads: int = 1
    window: int = 5
    rope_theta: float = 10_000.0


class Everything(WindowAttention, QKNorm, GroupedAttention):
    pass


class SegmentNumbers(Hyperparameters):
    segment_len: int = 5


class Segments(QKNorm, TransformerXLAttention):
    pass


IDEAS = {
    "parallel": leaf(phase1.Model, Block=ParallelBlock),
    "recurrence": leaf(phase1.Model, Mixer=Recurrence),
    "hybrid": leaf(phase1.Model, Mixer=(Recurrence, Attention)),
    "shared": Shared,
    "further_token": FurtherToken,
    "combined": leaf(phase1.Model, CombinedNumbers, Mixer=Everything, Position=RotaryPosition, Block=PreNormBlock),
    "segments": leaf(phase1.Model, SegmentNumbers, Mixer=Segments),
}
