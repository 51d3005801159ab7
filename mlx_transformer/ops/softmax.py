"""Softmax over the last axis."""

import mlx.core as mx

from mlx_transformer.ops.fastmath import exp_nonpositive, fence, on_linux_cpu, row_max, row_sum, with_gradient

_LOWEST = -3.4e38  # finite, so that it can be subtracted from -inf


def softmax(scores: mx.array, mask: mx.array | None = None) -> mx.array:
    """exp(scores) / sum(exp(scores)) over the last axis, computed in float32, in the dtype of `scores`.

    `mask` broadcasts to `scores`: bool (True: may be seen) or a float array to add. A row that may see nothing gives
    zeros (and zero gradient); nan and +inf in a row give nan. Scores of any finite size are safe.
    """
    s = scores.astype(mx.float32)
    if mask is not None and mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, -mx.inf)
    if on_linux_cpu():
        p = (_of_one_query if s.shape[-2:-1] == (1,) else _softmax)(s if mask is None else s + mask)
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
    inverse = 1 / total + (top - top)  # the last term is nan for nan and inf, which exp_nonpositive does not see
    return e * fence(inverse)


def _value_of_one_query(s: mx.array) -> mx.array:
    """The same in fewer operations, each of which costs as much in a decoding step as its elements."""
    top = mx.maximum(mx.max(s, axis=-1, keepdims=True), _LOWEST)
    e = exp_nonpositive(fence(s - top))
    total = mx.maximum(mx.sum(e, axis=-1, keepdims=True), 0.5)  # 1 at least, but 0 where nothing is seen
    return e / (total + (top - top))  # nan as above


def _gradient(_: mx.array, dp: mx.array, p: mx.array) -> mx.array:
    return p * (dp - row_sum(p * dp))


_softmax = with_gradient(_value, _gradient)
_of_one_query = with_gradient(_value_of_one_query, _gradient)
