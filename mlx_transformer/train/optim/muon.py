"""Muon: orthogonalized momentum (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks")."""

from dataclasses import dataclass

import mlx.core as mx
from mlx import optimizers

from mlx_transformer.train.optim.groups import Arrays, UpdateRule

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of an odd polynomial that is steep at 0 (Jordan et al.)
_TINY = 1e-7


@dataclass(frozen=True, kw_only=True)
class Muon(UpdateRule):
    """Move each matrix W (rows, columns) along the orthogonal matrix that is nearest to its momentum.

        V <- m V + (1 - m) G;  U = orthogonal(m V + (1 - m) G)                              (Nesterov's momentum)
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) U

    The decay is decoupled: it is not orthogonalized. m rises linearly over the first warmup_steps. Computed in float32.
    For matrices that map vectors to vectors, and stacks of them (n, rows, columns).
    """

    momentum: float = 0.95
    first_momentum: float = 0.85
    warmup_steps: int = 300  # steps, not tokens: the momentum's horizon 1 / (1 - m) is in steps
    iterations: int = 5  # of Newton-Schulz

    def init(self, parameter: mx.array) -> Arrays:
        return {"v": mx.zeros(parameter.shape)}

    def divides(self, parameter: mx.array) -> bool:
        return parameter.ndim >= 3  # a stack of matrices

    def update(self, optimizer: optimizers.Optimizer, gradients: Arrays, parameters: Arrays) -> Arrays:
        warmup = mx.minimum(optimizer.step.astype(mx.float32) / self.warmup_steps, 1)
        m = self.first_momentum + (self.momentum - self.first_momentum) * warmup
        ahead: Arrays = {}
        for path, gradient in gradients.items():
            state, g = optimizer.state[path], gradient.astype(mx.float32)
            state["v"] = m * state["v"] + (1 - m) * g
            ahead[path] = m * state["v"] + (1 - m) * g
        lr = optimizer.learning_rate
        new: Arrays = {}
        for path, direction in orthogonal_each(ahead, self.iterations).items():
            w = parameters[path]
            rows, columns = w.shape[-2:]
            step = lr * max(1.0, rows / columns) ** 0.5 * direction
            new[path] = (w * (1 - lr * self.weight_decay) - step).astype(w.dtype)
        return new


def orthogonal_each(matrices: Arrays, iterations: int) -> Arrays:
    """Compute `orthogonal` of each matrix; those of one shape, or its transpose, in one batched product."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for path, x in matrices.items():
        alike.setdefault((*x.shape[:-2], *sorted(x.shape[-2:])), []).append(path)
    result: Arrays = {}
    for paths in alike.values():
        stack = mx.stack([_wide(matrices[path]) for path in paths])
        for path, x in zip(paths, orthogonal(stack, iterations), strict=True):
            rows, columns = matrices[path].shape[-2:]
            result[path] = x.swapaxes(-1, -2) if rows > columns else x
    return result


def _wide(x: mx.array) -> mx.array:
    """Transpose (.., r, c) if it has more rows than columns."""
    return x.swapaxes(-1, -2) if x.shape[-2] > x.shape[-1] else x


def orthogonal(x: mx.array, iterations: int) -> mx.array:
    """Approximate U V^T of the decomposition U S V^T of x (.., r, c), r <= c, by Newton-Schulz iterations.

    Each iteration maps every singular value s to a s + b s^3 + c s^5. Five of them bring all but relatively tiny
    singular values to about 0.7 ... 1.2, not to 1, which is faster than coefficients that converge, and as good (Jordan
    et al.). Zero stays zero.
    """
    a, b, c = _COEFFICIENTS
    x = x / (mx.sqrt(x.square().sum(axis=(-2, -1), keepdims=True)) + _TINY)
    for _ in range(iterations):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
