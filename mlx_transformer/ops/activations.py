"""Activation functions and their derivatives: on a Linux CPU together with the value, on a GPU again from the input."""

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_transformer.backend import is_plain
from mlx_transformer.ops.fastmath import exp_decay, exp_nonpositive, fence, on_linux_cpu, with_gradient

_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715  # constants of gelu_tanh


def relu(x: mx.array) -> mx.array:
    """Return max(x, 0); the gradient at 0 is 0."""
    return mx.maximum(x, 0)


def relu_squared(x: mx.array) -> mx.array:
    """Return max(x, 0)^2 (So et al. 2021, "Primer", arXiv 2109.08668, sec. 3)."""
    if on_linux_cpu() or is_plain():
        return mx.maximum(x, 0).square()
    return _with_slope(_relu_squared_and_slope, x)


def elu_plus_one(x: mx.array) -> mx.array:
    """Return elu(x) + 1 > 0: x + 1 for x > 0, else e^x (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""
    if is_plain():
        return mx.maximum(x, 0) + mx.exp(mx.minimum(x, 0))
    return _with_slope(_elu_plus_one_and_slope, x)


def gelu_tanh(x: mx.array) -> mx.array:
    """Return GELU in its tanh approximation (Hendrycks & Gimpel 2016, arXiv 1606.08415, sec. 2), as in GPT-2.

    x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
    """
    if is_plain():
        return x * (1 + mx.tanh(_TANH_SCALE * (x + _TANH_CUBE * x * x * x))) * 0.5
    return _with_slope(_gelu_tanh_and_slope, x)


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + e^-x); on a Linux CPU nan for infinite x."""
    if is_plain():
        return mx.sigmoid(x)
    return _with_slope(_sigmoid_and_slope, x)


def silu(x: mx.array) -> mx.array:
    """Return x sigmoid(x) (Elfwing et al. 2017, arXiv 1702.03118, eq. 1; also called swish)."""
    if is_plain():
        return x * mx.sigmoid(x)
    return _with_slope(_silu_and_slope, x)


def softplus(x: mx.array) -> mx.array:
    """Return log(1 + e^x) > 0, a smooth max(x, 0) (Dugas et al. 2001)."""
    if is_plain():
        return mx.logaddexp(x, 0)
    return _with_slope(_softplus_and_slope, x)


def _with_slope(function: Callable[[mx.array], tuple[mx.array, mx.array]], x: mx.array) -> mx.array:
    """Apply an elementwise `function(x) -> (value, derivative)`, in float32, with that derivative as its gradient.

    The derivative is lazy: it is computed only if a gradient is needed. On a GPU it is computed from x, apart from the
    value: one kernel each that reads x once, where shared intermediates would be written and read again.
    """
    slope: list[mx.array] = []
    keep = on_linux_cpu()

    def value(x: mx.array) -> mx.array:
        y, dy = function(x.astype(mx.float32))
        slope[:] = [dy]
        return y.astype(x.dtype)

    def gradient(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        dy = slope[0] if keep else function(fence(x).astype(mx.float32))[1]
        return (cotangent * dy).astype(cotangent.dtype)

    return with_gradient(value, gradient)(x)


def _relu_squared_and_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    y = mx.maximum(x, 0)
    return y.square(), 2 * y


def _elu_plus_one_and_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    e = exp_decay(mx.minimum(x, 0))
    return mx.maximum(x, 0) + e, e


def _gelu_tanh_and_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    square = x * x
    s = _sigmoid(2 * _TANH_SCALE * x * (1 + _TANH_CUBE * square))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    return x * s, s + x * s * (1 - s) * (2 * _TANH_SCALE * (1 + 3 * _TANH_CUBE * square))


def _sigmoid_and_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    s = _sigmoid(x) + 0 * x  # 0 * x propagates nan, exp_nonpositive does not
    return s, s * (1 - s)


def _silu_and_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    s = _sigmoid(x)
    return x * s, s + x * s * (1 - s)


def _softplus_and_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    if not on_linux_cpu():
        return mx.logaddexp(x, 0), mx.sigmoid(x)
    e = exp_nonpositive(-mx.abs(x))
    s = e / (2 + e)  # log(1 + e) = 2 artanh(s), whose series ends here at 1e-7: s <= 1 / 3
    s2 = s * s
    log = 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11))))))
    return mx.maximum(x, 0) + log + 0 * x, mx.where(x < 0, e, 1.0) / (1 + e)


def _sigmoid(x: mx.array) -> mx.array:
    if not on_linux_cpu():
        return mx.sigmoid(x)
    e = exp_nonpositive(-mx.abs(x))
    return mx.where(x < 0, e, 1.0) / (1 + e)
