"""Position-wise feed-forward layers."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops
from mlx_transformer.nn import linear
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import BiasedLinear

Activation = Callable[[mx.array], mx.array]


class FeedForward(nn.Module):
    """max(0, x W1 + b1) W2 + b2 (Vaswani et al. 2017, sec. 3.3, eq. 2): x (B, L, D) -> (B, L, D).

    Subclasses set `activation` to another non-linearity, or override `build` and `activate` for a gate.
    """

    Linear: type[linear.Linear] = BiasedLinear  # slot: with or without bias
    activation: Activation = staticmethod(ops.relu)  # slot: elementwise function, as a staticmethod

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.build(config)

    def build(self, config: Config) -> None:
        """Make the parts; subclasses extend this."""
        self.up_proj = self.Linear(config.d_model, config.d_ff)
        self.down_proj = self.Linear(config.d_ff, config.d_model)

    def activate(self, x: mx.array) -> mx.array:
        """Return the hidden layer (B, L, d_ff) of x (B, L, D)."""
        return self.activation(self.up_proj(x))

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        return self.down_proj(self.activate(x))


class HalfWidth:
    """Feed-forward layers that are half of d_ff wide inside. To be combined with their class, before it."""

    def build(self, config: Config) -> None:
        super().build(replace(config, d_ff=max(1, config.d_ff // 2)))  # type: ignore[misc]


class GELUFeedForward(FeedForward):
    """FeedForward with GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415), in its tanh approximation as in GPT-2."""

    activation = staticmethod(ops.gelu_tanh)


class SiLUFeedForward(FeedForward):
    """FeedForward with SiLU (Elfwing et al. 2017, arXiv 1702.03118, eq. 1), also called swish (arXiv 1710.05941)."""

    activation = staticmethod(ops.silu)


class ReLUSquaredFeedForward(FeedForward):
    """max(0, x W1)^2 W2 (So et al. 2021, "Primer", arXiv 2109.08668, sec. 3), without biases."""

    Linear = linear.Linear
    activation = staticmethod(ops.relu_squared)


class GatedFeedForward(FeedForward):
    """(activation(x W + b) * (x V + c)) W2 + b2 (Shazeer 2020, arXiv 2002.05202, eq. 5-6), with biases.

    It has as many weights as an ungated layer at two thirds of its d_ff (sec. 2).
    """

    def build(self, config: Config) -> None:
        super().build(config)
        self.gate_proj = self.Linear(config.d_model, config.d_ff)

    def activate(self, x: mx.array) -> mx.array:
        return self.activation(self.gate_proj(x)) * self.up_proj(x)


class GLU(GatedFeedForward):
    """GatedFeedForward with a sigmoid gate (Dauphin et al. 2016, arXiv 1612.08083, eq. 1)."""

    activation = staticmethod(ops.sigmoid)


class ReGLU(GatedFeedForward):
    """GatedFeedForward with a ReLU gate (Shazeer 2020, eq. 6)."""

    activation = staticmethod(ops.relu)


class GEGLU(GatedFeedForward):
    """GatedFeedForward with a GELU gate (Shazeer 2020, eq. 6), in its tanh approximation."""

    activation = staticmethod(ops.gelu_tanh)


class SwiGLU(GatedFeedForward):
    """GatedFeedForward with a SiLU gate (Shazeer 2020, eq. 6)."""

    activation = staticmethod(ops.silu)
