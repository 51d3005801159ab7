"""How a model knows where a token stands: three doors, of which each kind opens what it needs."""

import math

import mlx.core as mx
from mlx import nn

from mlx_transformer.config import Config
from mlx_transformer.context import Ctx


class Position(nn.Module):
    """No positions at all: every door shut."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.build(config)

    def build(self, config: Config) -> None:
        """Make what the kind needs; variants extend this."""

    def at_input(self, x: mx.array, ctx: Ctx) -> mx.array:
        """Embeddings (B, L, D) -> (B, L, D)."""
        return x

    def rotate(self, q: mx.array, k: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array]:
        """Queries and keys (B, H, L, head_dim) of one layer, before they meet."""
        return q, k

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array | None:
        """What is added to the scores, broadcast to (B, H, Lq, Lk), or None; the queries stand at ctx.positions."""
        return None


class SinusoidalPosition(Position):
    """Fixed sinusoids added to the embeddings times sqrt(d_model) (Vaswani et al. 2017, sec. 3.4 and 3.5).

    PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos of the same; for any position, and for an odd
    d_model the last cosine falls away.
    """

    def build(self, config: Config) -> None:
        self.base = 10000.0  # the paper's constant, sec. 3.5

    def at_input(self, x: mx.array, ctx: Ctx) -> mx.array:
        return x * math.sqrt(x.shape[-1]) + self.encoding(ctx.positions, x.shape[-1]).astype(x.dtype)

    def encoding(self, positions: mx.array, d_model: int) -> mx.array:
        """positions (...,) int -> (..., d_model) float32."""
        exponent = mx.arange(0, d_model, 2, dtype=mx.float32) / d_model
        angle = positions[..., None].astype(mx.float32) * mx.exp(-math.log(self.base) * exponent)
        both = mx.stack([mx.sin(angle), mx.cos(angle)], axis=-1)
        return both.flatten(-2)[..., :d_model]
