"""Scaled dot-product attention with grouped heads, fused where the device has a kernel."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_transformer.backend import is_plain
from mlx_transformer.ops.fastmath import custom_ops, on_linux_cpu, with_gradient, with_gradient_of
from mlx_transformer.ops.softmax import softmax


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None) -> mx.array:
    """Return softmax(scale q k^T + mask) v, (B, H, Lq, d_v), in the dtype of q; softmax in float32.

    q (B, H, Lq, d), k (B, G, Lk, d), v (B, G, Lk, d_v): H / G consecutive query heads share a head of k and v. mask: as
    in `ops.softmax`; a query without visible keys gives zeros. One kernel that does not store the scores where
    `_has_kernel`; otherwise as `grouped_attention`.
    """
    if on_linux_cpu() or not (is_plain() or _has_kernel(q.shape[2], q.shape[-1], v.shape[-1])):
        return grouped_attention(q, k, v, scale, mask)
    if mask is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    sees, mask = _readable(mask)
    mask = mask if mask.dtype == mx.bool_ else mask.astype(q.dtype)
    o = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    return mx.where(sees, o, mx.zeros_like(o))


def _has_kernel(queries: int, d: int, d_v: int) -> bool:
    """Whether MLX may have a fused kernel: on Metal without a gradient for some widths, with CUDA for most.

    mlx 0.32: mlx/backend/metal/scaled_dot_product_attention.cpp.
    """
    widths = (64, 96, 128, 256) if queries <= 8 else (64, 72, 80, 128)
    return mx.cuda.is_available() or (d == d_v and d in widths)


def grouped_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None) -> mx.array:
    """Return the same as `attention`; on a Linux CPU in one operation for a single query, as in decoding."""
    if not (on_linux_cpu() or is_plain()):
        return _attention_on_gpu(q, k, v, scale, mask)
    if ours := custom_ops(q, k, v):
        return _custom_attention(ours, q, k, v, scale, mask)
    return _attention_in_steps(scale, q, k, v, mask)


def dense_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None) -> mx.array:
    """Return the same as `attention` for as many heads of k and v as of q."""
    if ours := custom_ops(q, k, v):
        return _custom_attention(ours, q, k, v, scale, mask)
    if on_linux_cpu() or is_plain():
        return softmax((q * scale) @ k.swapaxes(-1, -2), mask) @ v
    return _attention_on_gpu(q, k, v, scale, mask)


def _custom_attention(
    ours: Any, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None
) -> mx.array:
    """Compute attention, and its gradient, as one operation each: the scores are never in memory (attention.cpp)."""
    plain = partial(_attention_in_steps, scale)
    masks = [] if mask is None else [mask if mask.dtype == mx.bool_ else mask.astype(mx.float32)]
    if q.shape[2] == 1:
        one = with_gradient_of(plain, lambda q, k, v, mask=None: ours.attend_one(q, k, v, mask, scale))
        return one(q, k, v, *masks)
    kept: list[mx.array] = []  # log(sum(exp(scores))), of the last call

    def value(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
        o, log_sums = ours.attend(q, k, v, mask, scale)
        kept[:] = [log_sums]
        return o

    def gradient(primals: Sequence[mx.array], do: mx.array, o: mx.array) -> tuple[mx.array, ...]:
        q, k, v, *masks = primals
        gradients = ours.attend_gradient(q, k, v, masks[0] if masks else None, scale, o, kept[0], do)
        return (*gradients, *(_mask_gradient(plain, q, k, v, mask, do) for mask in masks))

    return with_gradient(value, gradient)(q, k, v, *masks)


def _mask_gradient(
    plain: Callable[..., mx.array], q: mx.array, k: mx.array, v: mx.array, mask: mx.array, do: mx.array
) -> mx.array:
    """Return the gradient of a float mask by plain steps, which MLX takes only if the mask depends on parameters."""
    if mask.dtype == mx.bool_:
        return mx.zeros_like(mask)
    return mx.vjp(lambda mask: plain(q, k, v, mask), [mask], [do])[1][0]


def _attention_in_steps(scale: float, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """Compute grouped attention by matrix products, the queries of a group in one matrix: no key is copied."""
    b, heads, length, d = q.shape
    groups = (b, k.shape[1], -1)
    scores = (q * scale).reshape(*groups, d) @ k.swapaxes(-1, -2)
    weights = softmax(scores.reshape(b, heads, length, -1), mask)
    return (weights.reshape(*groups, k.shape[2]) @ v).reshape(b, heads, length, -1)


def _readable(mask: mx.array) -> tuple[mx.array, mx.array]:
    """Return which queries see a key (.., Lq, 1), and the mask with all keys visible to those that see none."""
    if mask.dtype == mx.bool_:
        sees = mx.any(mask, axis=-1, keepdims=True)
        return sees, mx.logical_or(mask, ~sees)
    sees = mx.any(mask > -mx.inf, axis=-1, keepdims=True)
    return sees, mx.where(sees, mask, 0.0)


def _attention_on_gpu(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """Compute it in few passes over the scores, which bound it: 4 forward and 7 backward, where the steps take 21.

    The product of queries and keys adds the mask. The gradient of the softmax needs the sum of p dp over the keys,
    which is that of o do over the head's width (Dao et al. 2022, arXiv 2205.14135, appendix B.2).
    """
    b, heads, length, d = q.shape
    groups = (b, k.shape[1], heads // k.shape[1] * length)
    masks = [] if mask is None else [mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)]
    weights: list[mx.array] = []  # softmax of the scores, of the last call

    def value(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
        q = q.reshape(*groups, d)
        if mask is None:
            weights[:] = [mx.softmax((q * scale) @ k.swapaxes(-1, -2), axis=-1, precise=True)]
            return (weights[0] @ v).reshape(b, heads, length, -1)
        sees, mask = _readable(mask)
        added = mx.where(mask, 0.0, -mx.inf) if mask.dtype == mx.bool_ else mask
        scores = mx.addmm(_for_groups(added.astype(q.dtype), groups, heads), q, k.swapaxes(-1, -2), scale)
        weights[:] = [mx.softmax(scores, axis=-1, precise=True)]
        o = (weights[0] @ v).reshape(b, heads, length, -1).swapaxes(1, 2)  # merging the heads then copies nothing
        return mx.where(sees.swapaxes(1, 2), o, mx.zeros((), o.dtype)).swapaxes(1, 2)

    def gradient(primals: Sequence[mx.array], do: mx.array, o: mx.array) -> tuple[mx.array, ...]:
        (q, k, v, *masks), p = primals, weights[0]
        if masks:
            do = mx.where(_readable(masks[0])[0], do, mx.zeros((), do.dtype))
        total = (do.astype(mx.float32) * o).sum(-1, keepdims=True).reshape(*groups, 1)
        do = do.reshape(*groups, -1)
        dscores = p * (do @ v.swapaxes(-1, -2) - total)
        by_scale = (dscores * scale).astype(q.dtype)
        dk, dv = by_scale.swapaxes(-1, -2) @ q.reshape(*groups, d), p.swapaxes(-1, -2) @ do
        dmasks = (_summed_like(dscores.reshape(b, heads, length, -1), mask) for mask in masks)
        return ((by_scale @ k).reshape(q.shape), dk, dv, *dmasks)

    return with_gradient(value, gradient)(q, k, v, *masks)


def _for_groups(mask: mx.array, groups: tuple[int, int, int], heads: int) -> mx.array:
    """Lay out a mask (B or 1, heads or 1, Lq or 1, Lk or 1) as the scores (B, groups, queries of a group, Lk)."""
    if heads == groups[1]:
        return mask
    per_group = heads // groups[1]
    own_heads = mask.shape[1] > 1
    mask = mx.unflatten(mask, 1, (-1, per_group) if own_heads else (1, 1))
    shape = (*mask.shape[:2], per_group, groups[2] // per_group, mask.shape[-1])
    return mx.broadcast_to(mask, shape).flatten(2, 3)


def _summed_like(x: mx.array, like: mx.array) -> mx.array:
    """Sum x over the axes that `like`, of as many axes, was broadcast along."""
    if like.dtype == mx.bool_:
        return mx.zeros_like(like)
    axes = [i for i, n in enumerate(like.shape) if n == 1 and x.shape[i] != 1]
    return (x.astype(mx.float32).sum(axes, keepdims=True) if axes else x).astype(like.dtype)
