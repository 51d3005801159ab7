"""Gradient clipping, applied to any share of the parameters once the norm of all gradients is known."""

from dataclasses import dataclass

import mlx.core as mx

Gradients = dict[str, mx.array]  # by path


@dataclass(frozen=True, kw_only=True)
class GlobalNorm:
    """All gradients scaled together so that their joint norm is at most max_norm (Pascanu et al. 2013, algorithm 1)."""

    max_norm: float

    def __call__(self, gradients: Gradients, norm: mx.array) -> Gradients:
        """Some gradients by path, and the norm (scalar, float32) of all -> the clipped ones."""
        factor = mx.minimum(1.0, self.max_norm / (norm + 1e-6))  # 1e-6: no division by zero, as PyTorch has it
        return {path: g * factor.astype(g.dtype) for path, g in gradients.items()}


def sum_of_squares(gradients: Gradients) -> mx.array:
    """The square of their joint norm: scalar, float32."""
    squares = [g.astype(mx.float32).square().sum() for g in gradients.values()]
    return sum(squares[1:], squares[0])
