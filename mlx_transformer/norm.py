"""Normalisation of the last axis."""

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016, arXiv 1607.06450, eq. 3-4): (x - mean) / sqrt(var + eps) * weight + bias.

    x (..., d) -> (..., d); the variance is that of the population; weight and bias (d,).
    """

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((d,))
        self.bias = mx.zeros((d,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)
