"""Lion: an update by the sign of a momentum."""

from dataclasses import dataclass

import mlx.core as mx
from mlx import optimizers

from mlx_transformer.train.optim.groups import UpdateRule


@dataclass(frozen=True, kw_only=True)
class Lion(UpdateRule):
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, alg. 2.

    w <- w - lr (sign(b1 m + (1 - b1) g) + weight_decay w), then m <- b2 m + (1 - b2) g. As every weight moves by lr,
    the paper takes a learning rate 3 to 10 times smaller than AdamW's, and a decay as much larger (sec. 5). The
    implementation is that of mlx.optimizers.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def divides(self, parameter: mx.array) -> bool:
        return parameter.ndim >= 2

    def make(self) -> optimizers.Optimizer:
        return optimizers.Lion(0.0, list(self.betas), self.weight_decay)
