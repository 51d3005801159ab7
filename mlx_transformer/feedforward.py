"""Position-wise feed-forward parts."""

import mlx.core as mx
from mlx import nn

from mlx_transformer import linear, ops
from mlx_transformer.config import Config
from mlx_transformer.context import Ctx
from mlx_transformer.linear import BiasedLinear


class FeedForward(nn.Module):
    """max(0, x W1 + b1) W2 + b2 (Vaswani et al. 2017, sec. 3.3, eq. 2): x (B, L, D) -> (B, L, D).

    Variants override `activate` for another non-linearity, or `build` and `activate` for a gate.
    """

    Linear: type[linear.Linear] = BiasedLinear  # slot: linear maps with a bias or without

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.build(config)

    def build(self, config: Config) -> None:
        """Make the parts; variants extend this."""
        self.up_proj = self.Linear(config.d_model, config.d_ff)
        self.down_proj = self.Linear(config.d_ff, config.d_model)

    def activate(self, x: mx.array) -> mx.array:
        """x (B, L, D) -> the hidden layer (B, L, d_ff)."""
        return ops.relu(self.up_proj(x))

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        return self.down_proj(self.activate(x))
