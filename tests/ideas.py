"""Ideas that later phases may bring, each as short as it should be: they show that the hooks hold, without model.py."""

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.attention import Attention, GroupedAttention, QKNorm
from mlx_transformer.nn.block import Block, PreNormBlock
from mlx_transformer.nn.cache import State
from mlx_transformer.nn.init import keep
from mlx_transformer.nn.linear import Linear
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


class Idea(phase1.Model):
    """Phase 1 with an initial rule for the parameters that ideas bring."""

    def init_weight(self, path, value, key):
        return keep(value, key) if path.endswith(("decay", "_bias")) else super().init_weight(path, value, key)


class Shared(Idea):
    """One block, run at every depth (Universal Transformer): stack() repeats it, each depth has its own cache."""

    def build(self, config):
        super().build(config)
        self.blocks = self.blocks[:1]

    def stack(self):
        return self.blocks * self.config.n_layers


class FurtherToken(Idea):
    """Predicts the token after the next as well, through the ledger."""

    def build(self, config):
        super().build(config)
        self.further_proj = Linear(config.d_model, config.d_model)

    def objective(self, h, targets, ctx):
        ctx.record("further", self.token_loss(self.further_proj(h[:, :-1]), targets[:, 1:]).mean(), weight=0.1)
        return super().objective(h, targets, ctx)


class CombinedConfig(phase1.Config):
    n_kv_heads: int = 1
    window: int = 5
    rope_theta: float = 10_000.0


class Everything(WindowAttention, QKNorm, GroupedAttention):
    pass


class SegmentsConfig(phase1.Config):
    segment_len: int = 5


class Segments(QKNorm, TransformerXLAttention):
    pass


def variant(**slots):
    """An Idea with these slots."""
    return type("Idea_" + "_".join(slots), (Idea,), slots)


IDEAS = {
    "parallel": variant(Block=ParallelBlock),
    "recurrence": variant(Mixer=Recurrence),
    "hybrid": variant(Mixer=(Recurrence, Attention)),
    "shared": Shared,
    "further_token": FurtherToken,
    "combined": variant(Config=CombinedConfig, Mixer=Everything, Position=RotaryPosition, Block=PreNormBlock),
    "segments": variant(Config=SegmentsConfig, Mixer=Segments),
}
