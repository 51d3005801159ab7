"""Scaled dot-product attention with grouped heads, fused where the device has a kernel."""

from functools import partial

import mlx.core as mx

from mlx_transformer.ops.fastmath import custom_ops, on_linux_cpu, with_gradient_of
from mlx_transformer.ops.softmax import softmax


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None) -> mx.array:
    """Return softmax(scale q k^T + mask) v, (B, H, Lq, d_v), in the dtype of q; softmax in float32.

    q (B, H, Lq, d), k (B, G, Lk, d), v (B, G, Lk, d_v): H / G consecutive query heads share a head of k and v. mask: as
    in `ops.softmax`; a query without visible keys gives zeros. On Metal, without a gradient, one kernel that does not
    store the scores, for heads of width 64, 80 or 128, or with at most 8 queries 64, 96, 128 or 256 (mlx 0.32,
    mlx/backend/metal/scaled_dot_product_attention.cpp). Otherwise as `grouped_attention`.
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
    """Return the same as `attention`; on a Linux CPU in one operation for a single query, as in decoding."""
    plain, masks = partial(_attention_in_steps, scale), [] if mask is None else [mask]
    if q.shape[2] == 1 and (ours := custom_ops(q, k, v)):
        masks = [one if one.dtype == mx.bool_ else one.astype(mx.float32) for one in masks]
        return with_gradient_of(plain, lambda q, k, v, mask=None: ours.attend(q, k, v, mask, scale))(q, k, v, *masks)
    return plain(q, k, v, *masks)


def _attention_in_steps(scale: float, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """Compute grouped attention by matrix products, the queries of a group in one matrix: no key is copied."""
    b, heads, length, d = q.shape
    groups = (b, k.shape[1], -1)
    scores = (q * scale).reshape(*groups, d) @ k.swapaxes(-1, -2)
    weights = softmax(scores.reshape(b, heads, length, -1), mask)
    return (weights.reshape(*groups, k.shape[2]) @ v).reshape(b, heads, length, -1)
