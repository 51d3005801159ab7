"""Softmax over the last axis."""

import mlx.core as mx

from mlx_transformer.ops.fastmath import exp_nonpositive, fence, on_linux_cpu, row_max, row_sum, with_gradient

_LOWEST = -3.4e38  # finite: -inf - _LOWEST is -inf, not nan


def softmax(scores: mx.array, mask: mx.array | None = None) -> mx.array:
    """Return exp(scores) / sum(exp(scores)) over the last axis, computed in float32, in the dtype of `scores`.

    `mask` broadcasts to `scores`: bool (True: visible) or float (added). A query without visible keys gives zeros with
    zero gradient; nan or +inf among its scores gives nan. Finite scores of any magnitude do not overflow.
    """
    s = scores.astype(mx.float32)
    if mask is not None and mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, -mx.inf)
    if on_linux_cpu():
        p = (_softmax_of_one_query if s.shape[-2:-1] == (1,) else _softmax)(s if mask is None else s + mask)
    elif mask is None:
        p = mx.softmax(s, axis=-1)
    else:
        sees = mx.any(mask > -mx.inf, axis=-1, keepdims=True)
        p = mx.where(sees, mx.softmax(s + mx.where(sees, mask, 0.0), axis=-1), 0.0)
    return p.astype(scores.dtype)


def _value(s: mx.array) -> mx.array:
    top = mx.maximum(row_max(s), _LOWEST)
    e = exp_nonpositive(s - top)
    total = mx.maximum(row_sum(e), 1e-30)
    inverse = 1 / total + (top - top)  # top - top propagates nan, and gives nan for inf
    return e * fence(inverse)


def _value_of_one_query(s: mx.array) -> mx.array:
    """Compute the same in fewer operations: in a decoding step each costs as much as its elements."""
    top = mx.maximum(mx.max(s, axis=-1, keepdims=True), _LOWEST)
    e = exp_nonpositive(fence(s - top))
    total = mx.maximum(mx.sum(e, axis=-1, keepdims=True), 0.5)  # total is at least 1, or 0 without visible keys
    return e / (total + (top - top))  # nan as above


def _gradient(_: mx.array, dp: mx.array, p: mx.array) -> mx.array:
    return p * (dp - row_sum(p * dp))


_softmax = with_gradient(_value, _gradient)
_softmax_of_one_query = with_gradient(_value_of_one_query, _gradient)
