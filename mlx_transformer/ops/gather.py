"""Matrix products with a matrix selected per group."""

import mlx.core as mx


def gather_matmul(x: mx.array, stack: mx.array, expert_ids: mx.array) -> mx.array:
    """Return x (G, C, n) @ stack[expert_ids] (G, n, m), (G, C, m), without copying matrices; expert_ids (G,) ascending.

    On a CPU MLX has it in float32 only (mlx 0.32): other dtypes are converted.
    """
    if x.dtype != mx.float32 and mx.default_device().type == mx.DeviceType.cpu:
        return gather_matmul(x.astype(mx.float32), stack.astype(mx.float32), expert_ids).astype(x.dtype)
    return mx.gather_mm(x, stack, rhs_indices=expert_ids, sorted_indices=True)
