"""Linear maps, initialized by init.py, with and without a bias."""

import mlx.core as mx
from mlx import nn


class Linear(nn.Linear):
    """x (..., d_in) -> (..., d_out), y = x W^T; weight (d_out, d_in)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)


class BiasedLinear(Linear):
    """y = x W^T + b; bias (d_out,), initially 0 (random in `mlx.nn.Linear`)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.bias = mx.zeros((d_out,))
