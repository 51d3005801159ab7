"""Rows of a table and matrices of a stack, selected by indices, with exact gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

from mlx_transformer.ops.fastmath import on_linux_cpu, with_gradient

_FIXED_ORDER: ContextVar[bool] = ContextVar("fixed_order", default=False)


@contextmanager
def fixed_order(on: bool) -> Iterator[None]:
    """Sum the gradients of selected rows in a fixed order, so that they are the same bit for bit in every run.

    On a Linux CPU they always are. On a GPU MLX adds them in the order in which the threads arrive; here they are
    sorted by row instead. Enclose the calls of both the function and its gradient.
    """
    token = _FIXED_ORDER.set(on)
    try:
        yield
    finally:
        _FIXED_ORDER.reset(token)


def gather_rows(table: mx.array, indices: mx.array) -> mx.array:
    """Return table[indices], (*indices.shape, ...), of a table (n, ...); its gradient is summed in float32.

    In 16 bits a sum stops growing once a term is below its rounding error: the gradient of a frequent token was a
    quarter off in bfloat16.
    """
    if table.dtype in (mx.float16, mx.bfloat16):
        return gather_rows(table.astype(mx.float32), indices).astype(table.dtype)
    if not _FIXED_ORDER.get() or on_linux_cpu():
        return table[indices]

    def gradient(table: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        n = table.shape[0]
        ids = mx.where(indices < 0, indices + n, indices).flatten().astype(mx.int32)
        return _sum_by_index(cotangent.reshape(ids.size, -1), ids, n).reshape(table.shape)

    return with_gradient(lambda table: table[indices], gradient)(table)


def _sum_by_index(rows: mx.array, ids: mx.array, n: int) -> mx.array:
    """Return the sums (n, W) of the rows (N, W) with equal ids (N,) in [0, n), without atomic additions."""
    order = mx.argsort(ids)
    ends = mx.searchsorted(ids[order], mx.arange(n + 1, dtype=ids.dtype))
    segments = mx.stack([ends[:-1], ends[1:]], axis=-1)
    return mx.segmented_mm(mx.ones((1, ids.size)), rows[order], segments)[:, 0]


def gather_by_distance(scores: mx.array, distances: mx.array) -> mx.array:
    """Return the scores (B, H, Lq, Lk) of keys at the given distances (.., Lq, Lk), from scores (B, H, Lq, n).

    The gradient is as that of `gather_rows`; in a fixed order only for distances (Lq, Lk).
    """
    b, heads, queries, n = scores.shape
    if _FIXED_ORDER.get() and distances.ndim == 2 and not on_linux_cpu():
        table = scores.transpose(2, 3, 0, 1).reshape(queries * n, b * heads)
        rows = gather_rows(table, mx.arange(queries)[:, None] * n + distances)
        return rows.reshape(*distances.shape, b, heads).transpose(2, 3, 0, 1)
    distances = mx.broadcast_to(distances[..., None, :, :], (b, heads, *distances.shape[-2:]))
    return mx.take_along_axis(scores.astype(mx.float32), distances, axis=-1).astype(scores.dtype)


def take_tokens(x: mx.array, chosen: mx.array) -> mx.array:
    """Return the tokens chosen (B, k) int of x (B, L, D), (B, k, D), each at most once: the gradient adds nothing."""

    def gradient(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _put(cotangent, chosen, x.shape[1])

    return with_gradient(lambda x: _take(x, chosen), gradient)(x)


def put_tokens(some: mx.array, chosen: mx.array, length: int) -> mx.array:
    """Return (B, length, D) with `some` (B, k, D) at the tokens chosen (B, k), each at most once, and 0 elsewhere."""
    return with_gradient(lambda some: _put(some, chosen, length), lambda _, g, __: _take(g, chosen))(some)


def _take(x: mx.array, chosen: mx.array) -> mx.array:
    return mx.take_along_axis(x, chosen[..., None], axis=1)


def _put(some: mx.array, chosen: mx.array, length: int) -> mx.array:
    batch, k = chosen.shape
    place = mx.full((batch, length), k)  # of each token in `some`; k: a row of zeros
    place[mx.arange(batch)[:, None], chosen] = mx.arange(k)
    return _take(mx.pad(some, [(0, 0), (0, 1), (0, 0)]), place)


class CastWeight(mx.array):
    """A weight in the dtype that the model computes in. Its rows, w[indices], are those of the float32 weight.

    So `gather_rows` is what a part gets that indexes a parameter of its own.
    """

    def __init__(self, weight: mx.array, dtype: mx.Dtype) -> None:
        super().__init__(weight.astype(dtype))
        self.weight = weight

    def __getitem__(self, index: Any) -> mx.array:
        is_indices = isinstance(index, mx.array) and mx.issubdtype(index.dtype, mx.integer)
        return (gather_rows(self.weight, index) if is_indices else self.weight[index]).astype(self.dtype)


def gather_matmul(x: mx.array, stack: mx.array, expert_ids: mx.array) -> mx.array:
    """Return x (G, C, n) @ stack[expert_ids] (G, n, m), (G, C, m), without copying matrices; expert_ids (G,) ascending.

    On a CPU MLX has it in float32 only (mlx 0.32): other dtypes are converted.
    """
    if x.dtype != mx.float32 and mx.default_device().type == mx.DeviceType.cpu:
        return gather_matmul(x.astype(mx.float32), stack.astype(mx.float32), expert_ids).astype(x.dtype)
    return mx.gather_mm(x, stack, rhs_indices=expert_ids, sorted_indices=True)
