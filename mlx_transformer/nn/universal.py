"""Parts of a Universal Transformer: positions of each step, and halting by adaptive computation time."""

from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.config import Config
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import BiasedLinear
from mlx_transformer.nn.position import LearnedPosition

HALT_MARGIN = 0.01  # epsilon of Graves, sec. 2.1: a token halts when its probabilities sum to 1 - epsilon


class StepPosition(LearnedPosition):
    """A learned vector for each position and one for each step, added before every step (Dehghani et al. 2018, eq. 5).

    arXiv 1807.03819. weight (max_len, D), step_weight (n_layers, D). Differs from the paper: learned, as the positions
    of GPT-2, where it has sinusoids.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        self.step_weight = mx.zeros((config.n_layers, config.d_model))

    def at_input(self, x: mx.array, ctx: Ctx) -> mx.array:
        return x

    def at_step(self, x: mx.array, ctx: Ctx) -> mx.array:
        """Return the input x (B, L, D) of step ctx.layer with its position and the step added."""
        return super().at_input(x, ctx) + self.step_weight[ctx.layer : ctx.layer + 1]


class Halting(nn.Module):
    """Adaptive computation time: each token takes the mean of its steps up to the one at which it halts.

    Graves 2016, arXiv 1603.08983, sec. 2.1, per position (Dehghani et al. 2018, sec. 2.2). Step n has the weight
    p_n = sigmoid(w x + b), x its input. A token halts at the first step N with p_1 + ... + p_N >= 1 - HALT_MARGIN, or
    at the last; that step has the remaining weight R. The ponder cost N + R is an auxiliary loss. The steps after N are
    computed and have weight 0, so that every shape is the same. Differs from the code of Dehghani et al., whose output
    is a running average, not this sum.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.halt_proj = BiasedLinear(config.d_model, 1)

    def probability(self, x: mx.array) -> mx.array:
        """Return the probability of halting (B, L, 1) float32 from the input x (B, L, D) of a step."""
        return mx.sigmoid(self.halt_proj(x).astype(mx.float32))

    def mean(self, p: list[mx.array], states: list[mx.array]) -> tuple[mx.array, mx.array, mx.array]:
        """Return each token's output (B, L, D), number of steps N and remaining weight R (B, L, 1).

        p, states: the probability (B, L, 1) before and the state (B, L, D) after each step.
        """
        remaining = mx.ones_like(p[0])
        output, steps, last = mx.zeros_like(states[0]), mx.zeros_like(remaining), mx.zeros_like(remaining)
        for n, state in enumerate(states):
            running = remaining > 0
            halts = mx.array(n + 1 == len(states)) | (p[n] >= remaining - HALT_MARGIN)
            weight = mx.where(halts, remaining, p[n])
            output = output + weight.astype(state.dtype) * state
            steps, last = steps + running, last + mx.where(halts & running, weight, 0.0)
            remaining = remaining - weight
        return output, steps, last
