"""Retention, the mixer of RetNet: linear attention without a feature map, with a fixed decay for each head."""

import math
from typing import Any

import mlx.core as mx

from mlx_transformer import ops
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import Linear
from mlx_transformer.nn.mixers.base import RecurrentMixer
from mlx_transformer.nn.mixers.recurrence import linear_recurrence, n_scores


class Retention(RecurrentMixer):
    """Gated multi-scale retention (Sun et al. 2023, arXiv 2307.08621, eq. 5-8): x (B, L, D) -> (B, L, D).

        S_t = gamma S_(t-1) + k_t v_t^T,  o_t = S_t^T q_t;   y = W_o (swish(W_g x) * GroupNorm(o))

    Head i of H has gamma = 1 - 2^(-5 - i), i from 0 (sec. 2.2). The Position rotates q and k: with RotaryPosition it is
    the paper's rotation e^(i n theta). Values are `expand` times as wide as keys (sec. 2.4); every head's output is
    normalized by itself, without learned gains, as in the authors' code. Decoding keeps S (B, H, head_dim,
    expand head_dim). Differs from the paper: of its three score normalizations (eq. 8 ff.), which GroupNorm cancels up
    to its eps, k is divided by sqrt(head_dim) only; the feed-forward part stays as wide as the phase's.
    """

    def build(self, config: Any) -> None:
        d, width = config.d_model, config.n_heads * config.head_dim
        self.n_heads, self.head_dim, self.eps = config.n_heads, config.head_dim, config.norm_eps
        self.value_dim = config.expand * config.head_dim
        self.q_proj = Linear(d, width)
        self.k_proj = Linear(d, width)
        self.v_proj = Linear(d, config.expand * width)
        self.g_proj = Linear(d, config.expand * width)
        self.o_proj = Linear(config.expand * width, d)

    def initial_state(self, batch: int) -> dict[str, mx.array]:
        return {"sums": mx.zeros((batch, self.n_heads, self.head_dim, self.value_dim))}

    def n_kept(self, length: int, keeps_scores: bool) -> int:
        widths = self.n_heads * (4 * self.head_dim + 6 * self.value_dim)
        return widths * length + 3 * n_scores(self.n_heads, length)  # the decays are those of all sequences

    def advance(self, x: mx.array, ctx: Ctx, state: dict[str, mx.array] | None) -> tuple[mx.array, dict[str, mx.array]]:
        q, k, v = (self.split(one(x)) for one in (self.q_proj, self.k_proj, self.v_proj))
        q, k = ctx.position.rotate(q, k * self.head_dim**-0.5, ctx)
        decay = mx.broadcast_to(self.log_decay(), (self.n_heads, x.shape[1]))
        o, sums = linear_recurrence(q, k, v, decay, None if state is None else state["sums"])
        o = ops.layer_norm(o, None, None, self.eps).swapaxes(1, 2).flatten(2)
        return self.o_proj(ops.silu(self.g_proj(x)) * o), {"sums": sums}

    def log_decay(self) -> mx.array:
        """Return log gamma of each head, (H, 1)."""
        return mx.array([[math.log1p(-(2.0 ** (-5 - i)))] for i in range(self.n_heads)])

    def split(self, x: mx.array) -> mx.array:
        """Split heads: (B, L, H * d) -> (B, H, L, d)."""
        return x.reshape(*x.shape[:2], self.n_heads, -1).swapaxes(1, 2)
