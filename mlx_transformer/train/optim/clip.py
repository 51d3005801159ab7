"""Gradient clipping, applied to any subset of the gradients once the norm of all of them is known."""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

Arrays = dict[str, mx.array]  # by path
Memory = dict[str, mx.array]  # the state that a rule keeps between steps, by name
_TINY = 1e-6  # prevents division by zero, as in PyTorch


class Clip(Protocol):
    """A rule that bounds gradients."""

    def start(self) -> Memory:
        """Return the state before the first step."""

    def watch(self, memory: Memory, norm: mx.array) -> Memory:
        """Return the state after a step, before it clips; norm: of all gradients together, scalar, float32."""

    def __call__(self, gradients: Arrays, weights: Arrays, norm: mx.array, memory: Memory) -> Arrays:
        """Clip some gradients; weights: theirs; norm: of all gradients; memory: what `watch` returned for this step."""


class _Stateless:
    """A rule that keeps no state between steps."""

    def start(self) -> Memory:
        return {}

    def watch(self, memory: Memory, norm: mx.array) -> Memory:
        return memory


@dataclass(frozen=True, kw_only=True)
class GlobalNorm(_Stateless):
    """Scale all gradients together so that their joint norm is at most max_norm (Pascanu et al. 2013, algorithm 1)."""

    max_norm: float

    def __call__(self, gradients: Arrays, weights: Arrays, norm: mx.array, memory: Memory) -> Arrays:
        return _scaled(gradients, self.max_norm / (norm + _TINY))


@dataclass(frozen=True, kw_only=True)
class ByValue(_Stateless):
    """Clip each element to -max_value ... max_value, which changes the gradient's direction."""

    max_value: float

    def __call__(self, gradients: Arrays, weights: Arrays, norm: mx.array, memory: Memory) -> Arrays:
        return {path: mx.clip(g, -self.max_value, self.max_value) for path, g in gradients.items()}


@dataclass(frozen=True, kw_only=True)
class AGC(_Stateless):
    """Adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171, eq. 3): by unit, relative to the weights.

    A unit is a row of a matrix (all weights into one output) or a whole vector. The norm of its gradient is at most
    `ratio` times the norm of its weights, or `ratio * eps` for smaller weights, so that zeros can move. As in the
    paper, sec. 4.1, the last linear map is not clipped.
    """

    ratio: float
    eps: float = 1e-3
    exempt: tuple[str, ...] = ("head.weight",)

    def __call__(self, gradients: Arrays, weights: Arrays, norm: mx.array, memory: Memory) -> Arrays:
        return {path: g if path in self.exempt else self._clipped(g, weights[path]) for path, g in gradients.items()}

    def _clipped(self, gradient: mx.array, weight: mx.array) -> mx.array:
        most = self.ratio * mx.maximum(_unit_norm(weight), self.eps)
        return gradient * mx.minimum(1.0, most / (_unit_norm(gradient) + _TINY))


@dataclass(frozen=True, kw_only=True)
class ZClip:
    """Clip spikes only (Kumar et al. 2025, arXiv 2504.02507): a norm far above those of the previous steps.

    With the running mean m and deviation s of the norms, z = (norm - m) / s above z_max is reduced to z_max^2 / z.
    A spike enters the statistics after clipping. Differs from the paper: m and s are exact over the first
    1 / (1 - decay) steps, and moving averages from then on. Nothing is clipped in the first warmup_steps.
    """

    z_max: float = 2.5
    decay: float = 0.97
    warmup_steps: int = 25

    def start(self) -> Memory:
        return {"steps": mx.array(0), "mean": mx.array(0.0), "variance": mx.array(0.0), "allowed": mx.array(0.0)}

    def watch(self, memory: Memory, norm: mx.array) -> Memory:
        steps, mean = memory["steps"] + 1, memory["mean"]
        deviation = mx.sqrt(memory["variance"]) + _TINY
        z = (norm - mean) / deviation
        spike = mx.logical_and(z > self.z_max, steps > self.warmup_steps)
        allowed = mx.where(spike, mean + self.z_max**2 / z * deviation, norm)
        share = mx.maximum(1 / steps, 1 - self.decay)
        moved = mean + share * (allowed - mean)
        variance = memory["variance"] + share * ((allowed - mean) * (allowed - moved) - memory["variance"])
        return {"steps": steps, "mean": moved, "variance": variance, "allowed": allowed}

    def __call__(self, gradients: Arrays, weights: Arrays, norm: mx.array, memory: Memory) -> Arrays:
        return _scaled(gradients, memory["allowed"] / mx.maximum(norm, _TINY))


def sum_of_squares(gradients: Arrays) -> mx.array:
    """Compute the square of the gradients' joint norm: scalar, float32."""
    squares = [g.astype(mx.float32).square().sum() for g in gradients.values()]
    return sum(squares[1:], squares[0])


def _scaled(gradients: Arrays, factor: mx.array) -> Arrays:
    """Multiply by the factor if it is below 1."""
    factor = mx.minimum(1.0, factor)
    return {path: g * factor.astype(g.dtype) for path, g in gradients.items()}


def _unit_norm(x: mx.array) -> mx.array:
    """Compute the norm of each row, (..., n) -> (..., 1), or of a whole vector."""
    return mx.linalg.norm(x, axis=-1, keepdims=True) if x.ndim > 1 else mx.linalg.norm(x)
