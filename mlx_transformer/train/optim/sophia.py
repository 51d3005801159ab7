"""Sophia-G: a momentum divided by an estimate of the Hessian's diagonal, and clipped."""

from dataclasses import dataclass

import mlx.core as mx
from mlx import optimizers

from mlx_transformer.train.optim.groups import Arrays, UpdateRule


@dataclass(frozen=True, kw_only=True)
class Sophia(UpdateRule):
    """Liu et al. 2023, arXiv 2305.14342, alg. 3, with the Gauss-Newton-Bartlett estimator of alg. 2 (Sophia-G).

    m <- b1 m + (1 - b1) g; before the first step and every `every` steps from there h <- b2 h + (1 - b2) B g' g', where
    g' is the mean gradient for B targets that the model itself draws, a backward pass of its own (`curvature.py`); then
    w <- w - rate weight_decay w - rate clip(m / max(gamma h, eps), -1, 1). Differs from the paper: the estimate takes
    the step's whole batch, where theirs takes a part of it.
    """

    betas: tuple[float, float] = (0.96, 0.99)
    gamma: float = 0.05  # sec. 3.1
    eps: float = 1e-12
    weight_decay: float = 0.0
    every: int = 10  # k of the paper

    def make(self) -> optimizers.Optimizer:
        return _MomentumAndHessian()

    def update(self, optimizer: optimizers.Optimizer, gradients: Arrays, parameters: Arrays) -> Arrays:
        rate, beta = optimizer.learning_rate, self.betas[0]
        new: Arrays = {}
        for path, gradient in gradients.items():
            held, w = optimizer.state[path], parameters[path]
            held["m"] = beta * held["m"] + (1 - beta) * gradient
            direction = mx.clip(held["m"] / mx.maximum(self.gamma * held["h"], self.eps), -1, 1)
            new[path] = w * (1 - rate * self.weight_decay) - rate * direction
        return new

    def wants_curvature(self, optimizer: optimizers.Optimizer) -> bool:
        return int(optimizer.step.item()) % self.every == 0

    def observe(self, optimizer: optimizers.Optimizer, gradients: Arrays, targets: int) -> None:
        beta = self.betas[1]
        for path, gradient in gradients.items():
            held, estimate = optimizer.state[path], targets * gradient * gradient
            new = beta * held["h"] + (1 - beta) * estimate
            held["h"] = mx.where(mx.isfinite(estimate), new, held["h"])  # float16 may overflow


class _MomentumAndHessian(optimizers.Optimizer):
    """The state of Sophia: m, the running mean of the gradients, and h, that of the Hessian's diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 0.0

    def init_single(self, parameter: mx.array, state: Arrays) -> None:
        state["m"] = mx.zeros_like(parameter)
        state["h"] = mx.zeros_like(parameter)
