"""Scaled dot-product attention with grouped heads, fused where the device has a kernel for it."""

from functools import partial

import mlx.core as mx

from mlx_transformer.ops.fastmath import on_linux_cpu, own, with_gradient_of
from mlx_transformer.ops.softmax import softmax


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None) -> mx.array:
    """softmax(scale q k^T + mask) v: (B, H, Lq, d) -> (B, H, Lq, width of v), in the dtype of q, softmax in float32.

    k and v (B, G, Lk, ...): each of the G heads is read by H / G heads of queries that follow one another. mask: as for
    `ops.softmax`; a query that may see nothing gives zeros. On Metal one kernel, without the scores ever being whole in
    memory, where MLX has one and no gradient is asked for: heads of 64, 80 or 128 numbers, or with 8 queries at most of
    64, 96, 128 or 256 (mlx 0.32, mlx/backend/metal/scaled_dot_product_attention.cpp). Else as `grouped_attention`.
    """
    if on_linux_cpu():
        return grouped_attention(q, k, v, scale, mask)
    if mask is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    sees = mx.any(mask if mask.dtype == mx.bool_ else mask > -mx.inf, axis=-1, keepdims=True)
    mask = mx.logical_or(mask, ~sees) if mask.dtype == mx.bool_ else mx.where(sees, mask, 0.0).astype(q.dtype)
    o = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    return mx.where(sees, o, mx.zeros_like(o))


def grouped_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None) -> mx.array:
    """The same; on a Linux CPU in one operation where every head has one query, as in a step of decoding."""
    plain, masks = partial(_in_steps, scale), [] if mask is None else [mask]
    if q.shape[2] == 1 and (ours := own(q, k, v)):
        masks = [one if one.dtype == mx.bool_ else one.astype(mx.float32) for one in masks]
        return with_gradient_of(plain, lambda q, k, v, mask=None: ours.attend(q, k, v, mask, scale))(q, k, v, *masks)
    return plain(q, k, v, *masks)


def _in_steps(scale: float, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """The queries of a group stand in one matrix, so that no key is repeated."""
    b, heads, length, d = q.shape
    groups = (b, k.shape[1], -1)
    scores = (q * scale).reshape(*groups, d) @ k.swapaxes(-1, -2)
    weights = softmax(scores.reshape(b, heads, length, -1), mask)
    return (weights.reshape(*groups, k.shape[2]) @ v).reshape(b, heads, length, -1)
