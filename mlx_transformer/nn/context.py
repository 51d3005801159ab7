"""Ctx: the context passed to every block beside the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops
from mlx_transformer.nn.cache import Cache


@dataclass(frozen=True, eq=False)
class Ctx:
    """Inputs of one forward pass that are not the residual stream.

    Frozen: `dataclasses.replace` makes a changed copy. All copies share the list of auxiliary losses and metrics.
    """

    tokens: mx.array  # (B, L) int32
    positions: mx.array  # (L,) or (B, L) int32: index of each token in its sequence
    position: nn.Module  # the model's Position; as an attribute of blocks it would be counted in each
    layer: int = 0  # depth at which the block runs; differs from its index if blocks are shared
    cache: Any = None  # the model's Cache; within a block the LayerCache of its depth
    x0: mx.array | None = None  # (B, L, D): output of Model.embed
    memory: mx.array | None = None  # (B, S, D): what attention makes keys and values of, instead of its own input
    memory_positions: mx.array | None = None  # (B, S) int32: of the memory's tokens; EMPTY_POSITION hides padding
    causal: bool = True  # False: a query sees the later keys too, as in an encoder
    mask: mx.array | None = None  # bool, broadcast to (B, H, Lq, Lk): False hides a key, beside what is hidden already
    recent: mx.array | None = None  # (B, L, Model.n_recent): the last tokens up to each one, oldest first
    target_log_prob: mx.array | None = None  # (B, L) float32: of each target, known before training (Model.prepare)
    scored: mx.array | None = None  # bool (B, L): the targets that the loss counts; None: all
    patches: mx.array | None = None  # (B, L) int32: numbered patches of a picture, 0 for a token (nn/patches.py)
    auxiliary: list[tuple[str, mx.array, float]] = field(default_factory=list)  # (name, value, weight in the loss)

    def at(self, layer: int) -> Ctx:
        """Return the context of one depth: its number and its LayerCache."""
        cache: Cache | None = self.cache
        return replace(self, layer=layer, cache=None if cache is None else cache.layers[layer])

    def take(self, chosen: mx.array) -> Ctx:
        """Return the context of some tokens: chosen (B, k) int, their indices in each sequence, each once.

        Raises ValueError with a cache or a mask, which are of all tokens: not implemented.
        """
        if self.cache is not None or self.mask is not None:
            raise ValueError("a part of the tokens of a cache, or of a masked sequence, cannot be taken")
        per_token = {
            "tokens": self.tokens,
            "positions": mx.broadcast_to(self.positions, self.tokens.shape),
            "x0": self.x0,
            "recent": self.recent,
            "target_log_prob": self.target_log_prob,
        }
        taken: dict[str, Any] = {
            name: mx.take_along_axis(array, chosen, axis=1) if array.ndim == 2 else ops.take_tokens(array, chosen)
            for name, array in per_token.items()
            if array is not None
        }
        return replace(self, **taken)

    def after(self, n: int) -> Ctx:
        """Return the context of the tokens behind the first n, with what it has of each of them."""
        named = ("tokens", "recent", "target_log_prob", "scored", "patches")
        arrays: dict[str, Any] = {name: array[:, n:] for name in named if (array := getattr(self, name)) is not None}
        return replace(self, positions=self.positions[..., n:], **arrays)

    def record(self, name: str, value: mx.array, weight: float = 0.0) -> None:
        """Record a scalar to log; with weight > 0 it is an auxiliary loss and weight * value is added to the loss."""
        self.auxiliary.append((name, value, weight))

    def auxiliary_loss(self) -> tuple[mx.array, dict[str, mx.array]]:
        """Return the sum of weight * value over all records, and the mean value of each name."""
        total = mx.array(0.0)
        by_name: dict[str, list[mx.array]] = {}
        for name, value, weight in self.auxiliary:
            by_name.setdefault(name, []).append(value)
            if weight:
                total = total + weight * value
        return total, {name: sum(values[1:], values[0]) / len(values) for name, values in by_name.items()}


NO_TOKEN = -1  # in Ctx.recent, before the first token of a sequence


def recent_tokens(tokens: mx.array, n: int, before: mx.array) -> mx.array:
    """Return the last n tokens up to each of tokens (B, L), oldest first: (B, L, n) int32; before: (B, n - 1)."""
    whole = mx.concatenate([before, tokens.astype(mx.int32)], axis=1)
    return mx.as_strided(whole, (*tokens.shape, n), (whole.shape[1], 1, 1))
