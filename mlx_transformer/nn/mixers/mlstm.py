"""mLSTM, the matrix memory of xLSTM: a linear recurrence with gates that depend on the token, and a normalizer."""

from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import Linear
from mlx_transformer.nn.mixers.base import RecurrentMixer
from mlx_transformer.nn.mixers.recurrence import linear_recurrence, n_scores

GATE_CAP = 15.0  # bound on the inputs of both gates (arXiv 2503.13427, sec. 3.2)
_LEAST_FORGET, _LARGEST_FORGET = 3.0, 6.0  # biases of the forget gates at the start, spread over the heads


def stabilized_recurrence(
    q: mx.array, k: mx.array, v: mx.array, log_input: mx.array, log_forget: mx.array, state: dict[str, mx.array]
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return h_t = C_t^T q_t / max(|n_t^T q_t|, 1) (B, H, L, d_v) and the state after it.

    C_t = f_t C_(t-1) + i_t k_t v_t^T and n_t = f_t n_(t-1) + i_t k_t, with q, k (B, H, L, d_k), v (B, H, L, d_v), log i
    and log f <= 0 (B, H, L) (Beck et al. 2024, arXiv 2405.04517, eq. 19-27). An exponential i may overflow: so the
    state holds `sums` = e^-m [C, n] (B, H, d_k, d_v + 1) and `m` (B, H), m_t the largest log i so far, at least 0. In h
    it cancels. The paper's m_t (eq. 15) falls again while f forgets, which takes one token after the other.
    """
    log_input, log_forget = log_input.astype(mx.float32), log_forget.astype(mx.float32)
    before = state["m"][..., None]
    m = mx.stop_gradient(mx.maximum(mx.cummax(log_input, axis=-1), before))  # (B, H, L)
    decay = log_forget + mx.concatenate([before, m[..., :-1]], axis=-1) - m
    v = mx.concatenate([v.astype(mx.float32), mx.ones((*v.shape[:-1], 1))], axis=-1)  # the last column sums the keys
    k = ops.exp_decay(log_input - m)[..., None] * k
    o, sums = linear_recurrence(q, k, v, decay, state["sums"])
    h = o[..., :-1] / mx.maximum(mx.abs(o[..., -1:]), ops.exp_decay(-m)[..., None])
    return h, {"sums": sums, "m": m[..., -1]}


class HeadNorm(nn.Module):
    """Layer normalization of each head, with a gain and no bias: x (B, H, L, d) -> (B, H, L, d); weight (H d,)."""

    def __init__(self, n_heads: int, d: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((n_heads * d,))
        self.n_heads, self.eps = n_heads, eps

    def __call__(self, x: mx.array) -> mx.array:
        return ops.layer_norm(x, None, None, self.eps) * self.weight.reshape(self.n_heads, 1, -1)


class MLSTM(RecurrentMixer):
    """The layer of xLSTM with a matrix memory: x (B, L, D) -> (B, L, D).

        log i = cap(input_proj(x) + input_bias),  log f = log sigmoid(cap(forget_proj(x) + forget_bias)), for each head
        h = `stabilized_recurrence` of q / sqrt(head_dim), k, v and the gates
        y = o_proj(sigmoid(g_proj(x)) norm(h))                      cap(x) = 15 tanh(x / 15)

    Beck et al. 2024, arXiv 2405.04517, sec. 2.3; wired as in xLSTM 7B (arXiv 2503.13427, sec. 3), which has no
    convolution and no up-projection around it; transformers' xLSTM is the same. Forget gates start at sigmoid(3) to
    sigmoid(6), input gates at 1, not at e^-10 as in 7B, which the norm's eps would take for 0. Decoding keeps C, n and
    m.
    """

    def build(self, config: Any) -> None:
        d, width = config.d_model, config.n_heads * config.head_dim
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.q_proj, self.k_proj, self.v_proj = Linear(d, width), Linear(d, width), Linear(d, width)
        self.g_proj, self.o_proj = Linear(d, width), Linear(width, d)
        self.input_proj, self.forget_proj = Linear(d, config.n_heads), Linear(d, config.n_heads)
        self.input_bias = mx.zeros((config.n_heads,))
        self.forget_bias = mx.linspace(_LEAST_FORGET, _LARGEST_FORGET, config.n_heads)
        self.h_norm = HeadNorm(config.n_heads, config.head_dim, config.norm_eps)

    def initial_state(self, batch: int) -> dict[str, mx.array]:
        sums = mx.zeros((batch, self.n_heads, self.head_dim, self.head_dim + 1))
        return {"sums": sums, "m": mx.zeros((batch, self.n_heads))}

    def n_kept(self, length: int, keeps_scores: bool) -> int:
        return 12 * self.n_heads * self.head_dim * length + 5 * n_scores(self.n_heads, length)

    def advance(self, x: mx.array, ctx: Ctx, state: dict[str, mx.array] | None) -> tuple[mx.array, dict[str, mx.array]]:
        q, k, v = (self.split(one(x)) for one in (self.q_proj, self.k_proj, self.v_proj))
        log_input = _capped(self.input_proj(x) + self.input_bias).swapaxes(1, 2)
        forget = _capped(self.forget_proj(x) + self.forget_bias).swapaxes(1, 2)
        held = self.initial_state(x.shape[0]) if state is None else state
        h, state = stabilized_recurrence(q * self.head_dim**-0.5, k, v, log_input, -ops.softplus(-forget), held)
        h = self.h_norm(h.astype(x.dtype)).swapaxes(1, 2).flatten(2)
        return self.o_proj(ops.sigmoid(self.g_proj(x)) * h), state

    def split(self, x: mx.array) -> mx.array:
        """Split heads: (B, L, H * d) -> (B, H, L, d)."""
        return x.reshape(*x.shape[:2], self.n_heads, -1).swapaxes(1, 2)


def _capped(x: mx.array) -> mx.array:
    """Return 15 tanh(x / 15) in float32."""
    return GATE_CAP * mx.tanh(x.astype(mx.float32) / GATE_CAP)
