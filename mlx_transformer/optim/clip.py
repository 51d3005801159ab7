"""Gradient clipping."""

from dataclasses import dataclass

import mlx.core as mx

Gradients = dict[str, mx.array]  # by path


@dataclass(frozen=True, kw_only=True)
class GlobalNorm:
    """All gradients scaled together so that their joint norm is at most max_norm (Pascanu et al. 2013, algorithm 1)."""

    max_norm: float

    def __call__(self, gradients: Gradients) -> tuple[Gradients, mx.array]:
        """Gradients by path -> the clipped ones, and the norm (scalar, float32) before clipping."""
        squares = [g.astype(mx.float32).square().sum() for g in gradients.values()]
        norm = mx.sqrt(sum(squares[1:], squares[0]))
        factor = mx.minimum(1.0, self.max_norm / (norm + 1e-6))  # 1e-6: no division by zero, as PyTorch has it
        return {path: g * factor.astype(g.dtype) for path, g in gradients.items()}, norm
