"""A short causal convolution over time, of each channel by itself."""

from typing import ClassVar

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn import init


class ShortConvolution(nn.Module):
    """y_t = sum_j weight[:, j] x_(t - width + 1 + j) + bias, x_t = 0 for t < 0: x (B, L, C) -> (B, L, C).

    weight (C, width), bias (C,): the depthwise `Conv1d` of Mamba (Gu & Dao 2023, arXiv 2312.00752, sec. 3.4), initially
    as PyTorch's weight: uniform within 1 / sqrt(width); the bias starts at 0, which differs. `tail` (B, width - 1, C)
    holds the inputs before x.
    """

    init_rules: ClassVar = {"weight": init.fan_in_uniform, "bias": init.zeros}

    def __init__(self, channels: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, width))
        if bias:
            self.bias = mx.zeros((channels,))

    def initial_tail(self, batch: int) -> mx.array:
        """Return the inputs before a sequence: zeros."""
        channels, width = self.weight.shape
        return mx.zeros((batch, width - 1, channels))

    def __call__(self, x: mx.array, tail: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """Return the outputs and the tail of the next call."""
        length, width = x.shape[1], self.weight.shape[1]
        tail = self.initial_tail(x.shape[0]) if tail is None else tail
        seen = mx.concatenate([tail.astype(x.dtype), x], axis=1)
        y = sum(seen[:, j : j + length] * self.weight[:, j] for j in range(width))
        return (y + self.bias if "bias" in self else y), seen[:, length:]  # type: ignore[return-value]
