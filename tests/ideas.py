"""Further architectures, written with the hooks of nn alone, to which the shared tests apply."""

import mlx.core as mx

from mlx_transformer import nn
from phases import phase1


class ParallelBlock(nn.Block):
    n_norms = 1

    def __call__(self, x, ctx):
        h = self.norms[0](x)
        return x + self.mixer(h, ctx) + self.ffn(h, ctx)


class Recurrence(nn.Module):
    """Linear recurrence h_t = a h_(t-1) + (1 - a) W x_t."""

    def __init__(self, config, layer):
        super().__init__()
        self.in_proj = nn.Linear(config.d_model, config.d_model)
        self.decay = mx.full((config.d_model,), 0.5)

    def make_cache(self, batch):
        return nn.State(h=mx.zeros((batch, self.decay.size)))

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
    """One block at every depth (Universal Transformer): `stack` repeats it, each depth has its own cache."""

    def build(self, config):
        super().build(config)
        self.blocks = self.blocks[:1]

    def stack(self):
        return self.blocks * self.config.n_layers


class FurtherToken(phase1.Model):
    """Prediction of the token after the next, as an auxiliary loss."""

    def build(self, config):
        super().build(config)
        self.further_proj = nn.Linear(config.d_model, config.d_model)

    def objective(self, h, targets, ctx):
        ctx.record("further", self.token_loss(self.further_proj(h[:, :-1]), targets[:, 1:]).mean(), weight=0.1)
        return super().objective(h, targets, ctx)


class CombinedNumbers(nn.Hyperparameters):
    n_kv_heads: int = 1
    window: int = 5
    rope_theta: float = 10_000.0


class Everything(nn.WindowAttention, nn.QKNorm, nn.GroupedAttention):
    pass


class SegmentNumbers(nn.Hyperparameters):
    segment_len: int = 5


class Segments(nn.QKNorm, nn.TransformerXLAttention):
    pass


IDEAS = {
    "parallel": nn.leaf(phase1.Model, Block=ParallelBlock),
    "recurrence": nn.leaf(phase1.Model, Mixer=Recurrence),
    "hybrid": nn.leaf(phase1.Model, Mixer=(Recurrence, nn.Attention)),
    "shared": Shared,
    "further_token": FurtherToken,
    "combined": nn.leaf(
        phase1.Model, CombinedNumbers, Mixer=Everything, Position=nn.RotaryPosition, Block=nn.PreNormBlock
    ),
    "segments": nn.leaf(phase1.Model, SegmentNumbers, Mixer=Segments),
}
