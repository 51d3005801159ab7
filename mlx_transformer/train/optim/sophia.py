"""Sophia-G: a momentum divided by an estimate of the Hessian's diagonal, clipped."""

from dataclasses import dataclass

import mlx.core as mx
from mlx import optimizers

from mlx_transformer.train.optim.groups import Arrays, UpdateRule


@dataclass(frozen=True, kw_only=True)
class Sophia(UpdateRule):
    """Liu et al. 2023, arXiv 2305.14342, alg. 3, with the Gauss-Newton-Bartlett estimator of alg. 2 (Sophia-G).

    m <- b1 m + (1 - b1) g. Before the first step, and every `every` steps, h <- b2 h + (1 - b2) B g' g', where g' is
    the mean gradient for B targets sampled from the model, in a separate backward pass (`curvature.py`). Then
    w <- w - lr weight_decay w - lr clip(m / max(gamma h, eps), -1, 1). Differs from the paper: the estimate uses the
    step's whole batch, not a part of it.
    """

    betas: tuple[float, float] = (0.96, 0.99)
    gamma: float = 0.05  # sec. 3.1
    eps: float = 1e-12
    weight_decay: float = 0.0
    every: int = 10  # k of the paper

    def init(self, parameter: mx.array) -> Arrays:
        return {"m": mx.zeros_like(parameter), "h": mx.zeros_like(parameter)}

    def divides(self, parameter: mx.array) -> bool:
        return parameter.ndim >= 2

    def apply(self, gradient: mx.array, parameter: mx.array, state: Arrays, learning_rate: mx.array) -> mx.array:
        beta = self.betas[0]
        state["m"] = beta * state["m"] + (1 - beta) * gradient
        direction = mx.clip(state["m"] / mx.maximum(self.gamma * state["h"], self.eps), -1, 1)
        return parameter * (1 - learning_rate * self.weight_decay) - learning_rate * direction

    def wants_curvature(self, optimizer: optimizers.Optimizer) -> bool:
        return int(optimizer.step.item()) % self.every == 0

    def observe(self, optimizer: optimizers.Optimizer, gradients: Arrays, targets: int) -> None:
        beta = self.betas[1]
        for path, gradient in gradients.items():
            state, estimate = optimizer.state[path], targets * gradient * gradient
            new = beta * state["h"] + (1 - beta) * estimate
            state["h"] = mx.where(mx.isfinite(estimate), new, state["h"])  # float16 may overflow
