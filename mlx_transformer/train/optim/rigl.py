"""RigL: dynamic sparsity. A fixed share of each matrix is 0, and which share is chosen anew every so many steps."""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import optimizers

from mlx_transformer.nn.init import path_key
from mlx_transformer.train.optim.groups import Arrays, UpdateRule
from mlx_transformer.utils.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class RigL(UpdateRule):
    """Train `rule` on the share 1 - sparsity of each matrix's weights (Evci et al. 2020, arXiv 1911.11134, alg. 1).

    Every `every` steps, before step `until`, the active weights of smallest magnitude are dropped, and as many weights
    of largest gradient grow from 0. Their share of the active ones falls from `fraction` to 0: fraction / 2
    (1 + cos(pi t / until)). The first mask is random, and every matrix is equally sparse ("uniform" in sec. 3).

    The gradient is that of the next batch in a pass of its own, after which the batch is trained on as well; the paper
    omits that step. What grows starts with an empty state of the rule. The masks are in the optimizer's state, hence in
    checkpoints. weight_decay is that of `rule`. Raises BadInput for a sparsity outside [0, 1).
    """

    rule: UpdateRule
    sparsity: float = 0.8
    fraction: float = 0.3  # alpha of the paper
    every: int = 100  # Delta T, in steps
    until: Any = 25_000  # T_end, in steps; three quarters of the training in the paper

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise BadInput(f"sparsity = {self.sparsity}: expected a number from 0 to below 1")

    def make(self) -> optimizers.Optimizer:
        return self.rule.make()

    def start(self, optimizer: optimizers.Optimizer, parameters: Arrays) -> Arrays:
        for path, weight in parameters.items():
            draw = mx.random.uniform(shape=weight.shape, key=path_key(0, path))
            optimizer.state[path]["mask"] = _largest(draw, self.active(weight))
        return {path: mx.where(optimizer.state[path]["mask"], weight, 0) for path, weight in parameters.items()}

    def active(self, weight: mx.array) -> int:
        """Return the number of active weights of a matrix: at least 1."""
        return max(1, round((1 - self.sparsity) * weight.size))

    def update(self, optimizer: optimizers.Optimizer, gradients: Arrays, parameters: Arrays) -> Arrays:
        masks = {path: optimizer.state[path]["mask"] for path in gradients}
        own = {path: mx.where(masks[path], gradient, 0) for path, gradient in gradients.items()}
        new = self.rule.update(optimizer, own, parameters)
        return {path: mx.where(masks[path], weight, 0) for path, weight in new.items()}

    def wants_rewiring(self, optimizer: optimizers.Optimizer) -> bool:
        step = int(optimizer.step.item())
        return 0 < step < self.until and step % self.every == 0

    def rewire(self, optimizer: optimizers.Optimizer, gradients: Arrays, parameters: Arrays) -> Arrays:
        share = self.fraction / 2 * (1 + math.cos(math.pi * int(optimizer.step.item()) / self.until))
        new: Arrays = {}
        for path, gradient in gradients.items():
            state, weight = optimizer.state[path], parameters[path]
            before, active = state["mask"], self.active(weight)
            kept = active - min(int(share * active), weight.size - active)
            stay = _largest(mx.where(before, mx.abs(weight), -1), kept)
            pull = mx.where(mx.isfinite(gradient), mx.abs(gradient), 0)  # float16 may overflow
            mask = mx.logical_or(stay, _largest(mx.where(stay, -1, pull), active - kept))
            for name, held in state.items():
                if held.shape == weight.shape and name != "mask":
                    state[name] = mx.where(mx.logical_and(mask, before), held, 0)
            state["mask"] = mask
            new[path] = mx.where(mask, weight, 0)
        return new


def _largest(scores: mx.array, count: int) -> mx.array:
    """Return a mask of the `count` largest scores; of equal ones it takes the first."""
    ranks = mx.argsort(mx.argsort(-scores.flatten()))
    return (ranks < count).reshape(scores.shape)
