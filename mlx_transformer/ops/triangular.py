"""Inverses of unit lower triangular matrices by products alone, so that they run in batches on every device."""

import mlx.core as mx

from mlx_transformer.ops.fastmath import with_gradient


def unit_lower_inverse(a: mx.array) -> mx.array:
    """Return (I + A)^-1 (.., C, C), A the part of a (.., C, C) below the diagonal; the rest of a is ignored.

    Blocks of 1, 2, 4, ... rows on the diagonal are inverted from those of half the size: the inverse of
    [[P, 0], [Q, R]] is [[P^-1, 0], [-R^-1 Q P^-1, R^-1]]. So it takes log2(C) times two products, and is as stable as
    forward substitution. The series I - A + A^2 - ... takes as many and is not: where keys repeat, its terms grow like
    binomials of C before they cancel.
    """
    return with_gradient(_inverse, _gradient)(a)


def _inverse(a: mx.array) -> mx.array:
    rows = mx.arange(a.shape[-1])
    inverse, size = mx.eye(a.shape[-1], dtype=a.dtype), 1
    while size < a.shape[-1]:
        pair, is_second = rows // (2 * size), (rows // size) % 2 == 1
        is_corner = (pair[:, None] == pair) & is_second[:, None] & ~is_second
        corner = mx.where(is_corner, a, mx.zeros((), a.dtype))
        inverse = inverse - (corner if size == 1 else inverse @ corner @ inverse)
        size *= 2
    return mx.broadcast_to(inverse, a.shape)


def _gradient(a: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    """Return -X^T dX X^T below the diagonal, X the inverse."""
    transposed = inverse.swapaxes(-1, -2)
    return mx.tril(-(transposed @ cotangent @ transposed), -1)
