"""Normalization of the last axis."""

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al. 2016, arXiv 1607.06450, eq. 3-4): (x - mean) / sqrt(var + eps) * weight + bias.

    x (..., d) -> (..., d); weight, bias (d,); biased variance (divided by d).
    """

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((d,))
        self.bias = mx.zeros((d,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4): no mean, no bias.

    x (..., d) -> (..., d); weight (d,).
    """

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((d,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return ops.rms_norm(x, self.weight, self.eps)


class ScaleNorm(nn.Module):
    """g x / |x| with a learned scalar g, initially sqrt(d) (Nguyen & Salazar 2019, arXiv 1910.05895, eq. 5).

    x (..., d) -> (..., d); g (1,). Differs from the paper's code: eps is added to mean(x^2), as in RMSNorm.
    """

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.g = mx.array([d**0.5])
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return ops.rms_norm(x, None, self.eps) * (self.g * x.shape[-1] ** -0.5)
