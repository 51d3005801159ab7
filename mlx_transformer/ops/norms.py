"""LayerNorm and RMSNorm over the last axis; on a Linux CPU one operation each, and one for the gradient."""

from collections.abc import Callable

import mlx.core as mx

from mlx_transformer.ops.fastmath import custom_ops, with_gradient


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, biased var (Ba et al. 2016, arXiv 1607.06450, eq. 4)."""
    ours = custom_ops(x, weight, bias) if weight is not None and x.ndim <= 4 else None
    if ours is None:
        return mx.fast.layer_norm(x, weight, bias, eps)
    value = lambda x, weight, bias=None: ours.layer_norm(x, weight, bias, eps)  # noqa: E731
    return _with_gradient_in_one(value, ours.layer_norm_gradient, eps)(x, weight, *([] if bias is None else [bias]))


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """Return x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)."""
    ours = custom_ops(x, weight) if weight is not None and x.ndim <= 4 else None
    if ours is None:
        return mx.fast.rms_norm(x, weight, eps)
    return _with_gradient_in_one(lambda x, weight: ours.rms_norm(x, weight, eps), ours.rms_norm_gradient, eps)(
        x, weight
    )


def _with_gradient_in_one(
    value: Callable[..., mx.array], gradient: Callable[..., list[mx.array]], eps: float
) -> Callable[..., mx.array]:
    """Return `value` with the gradients of x, the weight and perhaps the bias from one operation."""
    return with_gradient(value, lambda primals, g, _: tuple(gradient(*primals[:2], g, eps)[: len(primals)]))
