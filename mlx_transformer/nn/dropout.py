"""Dropout."""

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops


class Dropout(nn.Module):
    """Dropout with probability p (Srivastava et al. 2014): x (...) -> (...), scaled by 1 / (1 - p).

    The identity in evaluation mode.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def __call__(self, x: mx.array) -> mx.array:
        return ops.dropout(x, self.p) if self.training and self.p > 0 else x
