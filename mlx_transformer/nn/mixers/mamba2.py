"""Mamba-2: a state space model whose decay is one number per head and token, hence a linear recurrence (SSD)."""

import math
from typing import Any, ClassVar

import mlx.core as mx

from mlx_transformer import ops
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import Linear
from mlx_transformer.nn.mixers.base import RecurrentMixer
from mlx_transformer.nn.mixers.convolution import ShortConvolution
from mlx_transformer.nn.mixers.recurrence import linear_recurrence, n_scores
from mlx_transformer.nn.mixers.ssm import step_biases
from mlx_transformer.nn.norm import RMSNorm
from mlx_transformer.utils.errors import BadInput

_FASTEST = 16.0  # the largest -A at the start; the smallest is 1


def log_rates(value: mx.array, key: mx.array) -> mx.array:
    """Draw -A from U(1, 16), return its logarithm, as the authors' code."""
    return mx.log(mx.random.uniform(1.0, _FASTEST, value.shape, key=key, dtype=value.dtype))


class Mamba2(RecurrentMixer):
    """The block of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, sec. 7 and fig. 6): x (B, L, D) -> (B, L, D).

        z, (v, b, c), dt = in_proj(u);   v, b, c = silu(conv(v, b, c));   dt = softplus(dt + dt_bias)
        S_t = exp(dt_t A) S_(t-1) + b_t (dt_t v_t)^T;   y_t = S_t^T c_t + skip v_t            A = -exp(a_log)
        u' = o_proj(RMSNorm(y silu(z)))

    n_heads heads share b and c, of d_state numbers ("multi-value", sec. 7.2), and have dt, A and skip of their own; v
    and z are expand d_model wide. Decoding keeps S (B, n_heads, d_state, width of a head) and the last conv_width - 1
    inputs of the convolution. Differs from the paper: a feed-forward part follows each mixer, and the convolution's
    bias starts at 0. Raises BadInput if n_heads does not divide expand d_model.
    """

    init_rules: ClassVar = {"dt_bias": step_biases, "a_log": log_rates}

    def build(self, config: Any) -> None:
        width = config.expand * config.d_model
        if width % config.n_heads:
            raise BadInput(f"n_heads = {config.n_heads} does not divide expand * d_model = {width}: change one of them")
        self.n_heads, self.width, self.d_state = config.n_heads, width, config.d_state
        self.in_proj = Linear(config.d_model, 2 * width + 2 * config.d_state + config.n_heads)
        self.conv = ShortConvolution(width + 2 * config.d_state, config.conv_width)
        self.dt_bias = mx.zeros((config.n_heads,))
        self.a_log = mx.full((config.n_heads,), math.log(_FASTEST))
        self.skip = mx.ones((config.n_heads,))
        self.norm = RMSNorm(width, config.norm_eps)
        self.o_proj = Linear(width, config.d_model)

    def initial_state(self, batch: int) -> dict[str, mx.array]:
        shape = batch, self.n_heads, self.d_state, self.width // self.n_heads
        return {"sums": mx.zeros(shape), "tail": self.conv.initial_tail(batch)}

    def n_kept(self, length: int, keeps_scores: bool) -> int:
        convolved = self.width + 2 * self.d_state
        return (5 * convolved + 10 * self.width) * length + 7 * n_scores(self.n_heads, length)

    def advance(self, x: mx.array, ctx: Ctx, state: dict[str, mx.array] | None) -> tuple[mx.array, dict[str, mx.array]]:
        held: dict[str, Any] = state or {"sums": None, "tail": None}
        z, vbc, dt = mx.split(self.in_proj(x), [self.width, 2 * self.width + 2 * self.d_state], axis=-1)
        vbc, tail = self.conv(vbc, held["tail"])
        v, b, c = mx.split(ops.silu(vbc), [self.width, self.width + self.d_state], axis=-1)
        v = v.reshape(*v.shape[:2], self.n_heads, -1).swapaxes(1, 2)  # (B, n_heads, L, width of a head)
        dt = ops.softplus((dt + self.dt_bias).astype(mx.float32)).swapaxes(1, 2)
        log_decay = -mx.exp(self.a_log.astype(mx.float32))[:, None] * dt
        steps = dt[..., None] * v.astype(mx.float32)
        y, sums = linear_recurrence(c[:, None], b[:, None], steps, log_decay, held["sums"])
        y = (y.astype(v.dtype) + self.skip[:, None, None] * v).swapaxes(1, 2).flatten(2)
        return self.o_proj(self.norm(y * ops.silu(z))), {"sums": sums, "tail": tail}
