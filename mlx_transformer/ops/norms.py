"""LayerNorm and RMSNorm over the last axis."""

import mlx.core as mx


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """(x - mean) / sqrt(var + eps) * weight + bias, var with 1/D (Ba et al., "Layer Normalization", eq. 4)."""
    return mx.fast.layer_norm(x, weight, bias, eps)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, "Root Mean Square Layer Normalization", eq. 4)."""
    return mx.fast.rms_norm(x, weight, eps)
