"""Token shift: embeddings of the tokens before, added to that of each token."""

from dataclasses import field
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.config import Hyperparameters
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.model import Model


class TokenShiftConfig(Hyperparameters):
    n_shifts: int = field(default=3, metadata={"least": 0})  # tokens before each one whose embeddings it gets; 0: none


class _Shift(nn.Module):
    """A factor for each channel, initially 0: x (B, L, D) -> shift_lambda * x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift_lambda = mx.zeros((width,))

    def __call__(self, x: mx.array) -> mx.array:
        return self.shift_lambda * x


class TokenShift(Model):
    """Model whose blocks see the embeddings of the last tokens: x_j = E[t_j] + sum_(i = 1 .. n) lambda_i * E[t_(j-i)].

    lambda_i (D,) is initially 0, one factor for each channel; before the first token nothing is added. After the token
    shift of RWKV (Peng et al. 2023, arXiv 2305.13048, sec. 3.1.1) and modded-nanogpt's smear. Differs from RWKV: at the
    input alone, more than one token back, and without 1 - lambda on the token itself. To be combined with a phase's
    Model, before it.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        if config.n_shifts:
            self.n_recent = max(self.n_recent, config.n_shifts + 1)
        self.shifts = [_Shift(config.d_model) for _ in range(config.n_shifts)]

    def embed_tokens(self, ctx: Ctx) -> mx.array:
        x, n = super().embed_tokens(ctx), len(self.shifts)
        if not n:
            return x
        assert ctx.recent is not None, "set by Model.context"
        # All earlier tokens in one look-up: the n before the first, then all but the last.
        before = mx.concatenate([ctx.recent[:, 0, -1 - n : -1], ctx.tokens[:, :-1].astype(mx.int32)], axis=1)
        rows = mx.where(before[..., None] >= 0, self.embedding(mx.maximum(before, 0)), 0)
        for i, shift in enumerate(self.shifts, 1):
            x = x + shift(rows[:, n - i : n - i + x.shape[1]])
        return x
