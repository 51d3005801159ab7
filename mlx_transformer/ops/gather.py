"""Matrix products with one of several matrices each."""

import mlx.core as mx


def gather_matmul(x: mx.array, stack: mx.array, expert_ids: mx.array) -> mx.array:
    """x (G, C, n) @ stack[owners] (G, n, m) -> (G, C, m), no matrix being copied; owners (G,) int, ascending.

    A CPU has it in float32 alone (mlx 0.32): there the other dtypes are computed in that.
    """
    if x.dtype != mx.float32 and mx.default_device().type == mx.DeviceType.cpu:
        return gather_matmul(x.astype(mx.float32), stack.astype(mx.float32), expert_ids).astype(x.dtype)
    return mx.gather_mm(x, stack, rhs_indices=expert_ids, sorted_indices=True)
