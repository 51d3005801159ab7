"""Fast elementwise functions for a Linux CPU: an exponential that a C++ compiler can vectorize.

There MLX computes exp and tanh one number at a time (9 to 33 ns each); a polynomial in a compiled kernel takes 0.5 ns.
On macOS (Accelerate) and on a GPU the plain functions are fast, and the forms here are not used.
"""

import sys
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from mlx_transformer.backend import is_plain, primitives

LOG2_E = 1.4426950408889634
# Minimax polynomial of 2^(1+f) - 1 on -1 < f <= 0, degree 5, exact at 0, error at most 8.4e-8 relative to 2^(1+f).
_MANTISSA = (1.0, 1.38628744, 0.480360286, 0.110594716, 0.0184115962, 0.00188980727)
_ULP = 1 << 23  # float32 has 23 mantissa bits


def on_linux_cpu() -> bool:
    """Return whether to use the forms for a Linux CPU: on that device, unless MLX_TRANSFORMER_PLAIN is set."""
    return sys.platform == "linux" and mx.default_device().type == mx.DeviceType.cpu and not is_plain()


def custom_ops(*arrays: mx.array | None) -> Any:
    """Return the module of our C++ operations (primitives.cpp) if it is available and all arrays are float32."""
    fits = on_linux_cpu() and all(one is None or one.dtype == mx.float32 for one in arrays)
    return primitives() if fits else None


def keeps_scores(dtype: mx.Dtype) -> bool:
    """Return whether training in this dtype has scores and logits in memory: it has, but for our C++ operations."""
    return dtype != mx.float32 or custom_ops() is None


def with_gradient(
    function: Callable[..., mx.array], gradient: Callable[..., mx.array | tuple[mx.array, ...]]
) -> Callable[..., mx.array]:
    """Return `function` with gradient(primals, cotangent, output) as its vector-Jacobian product."""
    custom = mx.custom_function(function)
    custom.vjp(gradient)
    return cast(Callable[..., mx.array], custom)


def with_gradient_of(plain: Callable[..., mx.array], function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return `function` with the gradient of `plain`, an equal function that MLX can differentiate."""
    return with_gradient(function, lambda primals, cotangent, _: tuple(mx.vjp(plain, list(primals), [cotangent])[1]))


def fence(x: mx.array) -> mx.array:
    """Return x (of 16 or 32 bits) unchanged, as a barrier to the kernel fusion of `mx.compile`. It costs nothing.

    MLX splits long fused kernels anywhere and vectorizes only those whose inputs have equal shapes; a barrier between
    broadcast and full-size operands keeps the kernels vectorized.
    """
    return mx.view(mx.view(x, mx.int32 if x.dtype.size == 4 else mx.int16), x.dtype)


def _exp_bits(x: mx.array) -> mx.array:
    y = fence(mx.maximum(x * LOG2_E, -127.0))  # 2^-127 gives 0, hence -inf does
    n = y.astype(mx.int32)  # rounds towards 0
    f = y - n.astype(mx.float32)
    f2 = f * f
    c0, c1, c2, c3, c4, c5 = (c * _ULP for c in _MANTISSA)
    mantissa = ((c0 + 0.5) + c1 * f) + f2 * ((c2 + c3 * f) + f2 * (c4 + c5 * f))
    # The bits of a float32 are exponent * 2^23 + mantissa: integer addition assembles it.
    return mx.view((n + 126) * _ULP + mantissa.astype(mx.int32), mx.float32)


exp_nonpositive = with_gradient(_exp_bits, lambda _, cotangent, output: cotangent * output)
"""Return e^x of float32 x <= 0. Error: (4 + 1.5 |x|) 2^-24 relative if e^x > 2^-126, else 2^-126 absolute; exact at 0.

-inf gives 0. The result is undefined for x > 0 and nan: callers subtract a maximum and propagate nan themselves.
"""


def exp_decay(x: mx.array) -> mx.array:
    """Return e^x of float32 x <= 0, in the fastest form of the device; -inf gives 0, with a gradient of 0."""
    return exp_nonpositive(x) if on_linux_cpu() else mx.exp(x)


def tanh(x: mx.array) -> mx.array:
    """Return tanh of float32 x, within 2e-7 absolute; on a Linux CPU nan for infinite x."""
    if not on_linux_cpu():
        return mx.tanh(x)
    e = exp_nonpositive(-2 * mx.abs(x))
    return mx.sign(x) * (1 - e) / (1 + e) + 0 * x  # 0 * x propagates nan


def row_sum(x: mx.array) -> mx.array:
    """Return the sum over the last axis, which is kept with length 1."""
    return mx.sum(_folded(x, mx.sum), axis=-1, keepdims=True)


def row_max(x: mx.array) -> mx.array:
    """Return the maximum over the last axis, which is kept with length 1; nan if any element is nan."""
    return mx.max(_folded(x, mx.max), axis=-1, keepdims=True)


def _folded(x: mx.array, reduce: Callable[..., mx.array]) -> mx.array:
    """Reduce the last axis to 16 elements if 16 divides it: MLX vectorizes reductions over other axes only."""
    n = x.shape[-1]
    return reduce(x.reshape(*x.shape[:-1], n // 16, 16), axis=-2) if n % 16 == 0 and n > 16 else x
