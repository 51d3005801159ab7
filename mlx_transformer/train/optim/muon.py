"""Muon: momentum, orthogonalised (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks")."""

from dataclasses import dataclass

import mlx.core as mx
from mlx import optimizers

from mlx_transformer.train.optim.groups import Arrays, UpdateRule

_COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # of an odd polynomial, steep at 0 (Jordan et al.)
_TINY = 1e-7


@dataclass(frozen=True, kw_only=True)
class Muon(UpdateRule):
    """Each matrix W (rows, columns) moves along the orthogonal matrix that is nearest to its momentum.

        V <- m V + (1 - m) G;  U = orthogonal(m V + (1 - m) G)                              (Nesterov's momentum)
        W <- (1 - rate decay) W - rate sqrt(max(1, rows / columns)) U

    The decay is decoupled: it does not pass through the orthogonalisation. m rises in a straight line over the first
    warmup_steps. In float32. For matrices that map vectors to vectors; stacks of them (n, rows, columns) too.
    """

    momentum: float = 0.95
    first_momentum: float = 0.85
    warmup_steps: int = 300  # steps, not tokens, as the momentum's own horizon 1 / (1 - m) is one of steps
    iterations: int = 5  # of Newton-Schulz

    def make(self) -> optimizers.Optimizer:
        return _Velocity()

    def update(self, optimizer: optimizers.Optimizer, gradients: Arrays, parameters: Arrays) -> Arrays:
        risen = mx.minimum(optimizer.step.astype(mx.float32) / self.warmup_steps, 1)
        m = self.first_momentum + (self.momentum - self.first_momentum) * risen
        ahead: Arrays = {}
        for path, gradient in gradients.items():
            held, g = optimizer.state[path], gradient.astype(mx.float32)
            held["v"] = m * held["v"] + (1 - m) * g
            ahead[path] = m * held["v"] + (1 - m) * g
        rate = optimizer.learning_rate
        new: Arrays = {}
        for path, direction in orthogonal_each(ahead, self.iterations).items():
            w = parameters[path]
            rows, columns = w.shape[-2:]
            step = rate * max(1.0, rows / columns) ** 0.5 * direction
            new[path] = (w * (1 - rate * self.weight_decay) - step).astype(w.dtype)
        return new


class _Velocity(optimizers.Optimizer):
    """The state of Muon: v, the running mean of the gradients, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 0.0

    def init_single(self, parameter: mx.array, state: Arrays) -> None:
        state["v"] = mx.zeros(parameter.shape)


def orthogonal_each(matrices: Arrays, iterations: int) -> Arrays:
    """`orthogonal` of each; those of one shape, upright or lying, in one batched product."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for path, x in matrices.items():
        alike.setdefault((*x.shape[:-2], *sorted(x.shape[-2:])), []).append(path)
    found: Arrays = {}
    for paths in alike.values():
        stack = mx.stack([_lying(matrices[path]) for path in paths])
        for path, x in zip(paths, orthogonal(stack, iterations), strict=True):
            rows, columns = matrices[path].shape[-2:]
            found[path] = x.swapaxes(-1, -2) if rows > columns else x
    return found


def _lying(x: mx.array) -> mx.array:
    """(.., r, c) or its transpose, so that it has no more rows than columns."""
    return x.swapaxes(-1, -2) if x.shape[-2] > x.shape[-1] else x


def orthogonal(x: mx.array, iterations: int) -> mx.array:
    """Nearly U V^T of the decomposition U S V^T of x (.., r, c), r <= c, by Newton-Schulz iterations.

    Each maps every singular value s to a s + b s^3 + c s^5. Five of these coefficients' bring all of them that are not
    tiny next to the largest to about 0.7 ... 1.2, not to 1: faster than by those that converge, and as good (Jordan et
    al.). Zero stays zero.
    """
    a, b, c = _COEFFICIENTS
    x = x / (mx.sqrt(x.square().sum(axis=(-2, -1), keepdims=True)) + _TINY)
    for _ in range(iterations):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
