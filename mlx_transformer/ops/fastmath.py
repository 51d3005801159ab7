"""What makes elementwise work fast on a Linux CPU: an exponential that a C++ compiler can turn into vector code.

There, MLX computes exp, tanh and erf one number at a time (9 to 33 ns); a polynomial inside a compiled kernel takes
0.5 ns. On macOS (Accelerate) and on a GPU the plain functions are fast already and the forms here are not used.
"""

import sys
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from mlx_transformer.backend import is_plain, primitives

LOG2_E = 1.4426950408889634
# 2^(1+f) - 1 on -1 < f <= 0, degree 5, least maximal error (8.4e-8 relative to 2^(1+f)) with the value at 0 exact.
_MANTISSA = (1.0, 1.38628744, 0.480360286, 0.110594716, 0.0184115962, 0.00188980727)
_ULP = 1 << 23  # float32 has 23 bits of mantissa


def on_linux_cpu() -> bool:
    """Whether the forms made for a Linux CPU are to be used now."""
    return sys.platform == "linux" and mx.default_device().type == mx.DeviceType.cpu and not is_plain()


def own(*arrays: mx.array | None) -> Any:
    """The module of our own operations (primitives.cpp) where there is one and it takes these arrays, else None."""
    fits = on_linux_cpu() and all(one is None or one.dtype == mx.float32 for one in arrays)
    return primitives() if fits else None


def with_gradient(
    function: Callable[..., mx.array], gradient: Callable[..., mx.array | tuple[mx.array, ...]]
) -> Callable[..., mx.array]:
    """`function` with gradient(primals, cotangent, output) in the place of its own."""
    custom = mx.custom_function(function)
    custom.vjp(gradient)
    return cast(Callable[..., mx.array], custom)


def with_gradient_of(plain: Callable[..., mx.array], function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`function` of arrays with the gradient of `plain`, which computes the same."""
    return with_gradient(function, lambda primals, cotangent, _: tuple(mx.vjp(plain, list(primals), [cotangent])[1]))


def fence(x: mx.array) -> mx.array:
    """The same float32 array, at no cost, through which `mx.compile` fuses nothing.

    MLX cuts a fused chain where it gets too long, and vectorises a kernel only if all its inputs have one shape: so a
    chain is better cut by hand, between what broadcasts and what does not.
    """
    return mx.view(mx.view(x, mx.int32), mx.float32)


def _exp_bits(x: mx.array) -> mx.array:
    y = fence(mx.maximum(x * LOG2_E, -127.0))  # 2^-127 comes out as 0: so does -inf
    n = y.astype(mx.int32)  # towards zero
    f = y - n.astype(mx.float32)
    f2 = f * f
    c0, c1, c2, c3, c4, c5 = (c * _ULP for c in _MANTISSA)
    mantissa = ((c0 + 0.5) + c1 * f) + f2 * ((c2 + c3 * f) + f2 * (c4 + c5 * f))
    # A float32 is exponent * 2^23 + mantissa, so that adding the two as integers assembles the power of two.
    return mx.view((n + 126) * _ULP + mantissa.astype(mx.int32), mx.float32)


exp_nonpositive = with_gradient(_exp_bits, lambda _, cotangent, output: cotangent * output)
"""e^x of float32 x <= 0, within (4 + 1.5 |x|) 2^-24 relative where e^x > 2^-126 and 2^-126 absolute below; exact at 0.

-inf gives 0; positive numbers and nan give nonsense, so callers subtract a maximum and let nan in by another way.
"""


def tanh(x: mx.array) -> mx.array:
    """tanh of float32 x, within 2e-7 absolute; nan of inf as of nan."""
    if not on_linux_cpu():
        return mx.tanh(x)
    e = exp_nonpositive(-2 * mx.abs(x))
    return mx.sign(x) * (1 - e) / (1 + e) + 0 * x  # the last term is for nan, which exp_nonpositive does not see


def row_sum(x: mx.array) -> mx.array:
    """Sum over the last axis, which stays with length 1."""
    return mx.sum(_folded(x, mx.sum), axis=-1, keepdims=True)


def row_max(x: mx.array) -> mx.array:
    """Maximum over the last axis, which stays with length 1; nan if there is one."""
    return mx.max(_folded(x, mx.max), axis=-1, keepdims=True)


def _folded(x: mx.array, reduce: Callable[..., mx.array]) -> mx.array:
    """The last axis reduced to 16 numbers, where it divides: MLX vectorises a reduction along any other axis only."""
    n = x.shape[-1]
    return reduce(x.reshape(*x.shape[:-1], n // 16, 16), axis=-2) if n % 16 == 0 and n > 16 else x
