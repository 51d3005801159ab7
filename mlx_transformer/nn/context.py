"""Ctx: what a block is lent besides the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.cache import Cache


@dataclass(frozen=True, eq=False)
class Ctx:
    """One forward pass, as a block sees it. Frozen: a change is a new Ctx; the ledger alone is shared and grows.

    The model's Position is lent through here because a module under two names would count its parameters twice.
    """

    tokens: mx.array  # (B, L) int32
    positions: mx.array  # (L,) or (B, L) int32: the place of each token in its own sequence
    position: nn.Module  # the model's Position, passed here so that its parameters are counted once
    layer: int = 0  # depth in the stack that runs, which is not the index of a shared block
    cache: Any = None  # the model's Cache; inside a block, this layer's own
    x0: mx.array | None = None  # (B, L, D): what embed gave
    memory: mx.array | None = None  # (B, S, D): an encoder's output
    mask: mx.array | None = None  # bool, broadcast to (B, H, Lq, Lk): an extra limit on what may be seen
    auxiliary: list[tuple[str, mx.array, float]] = field(default_factory=list)

    def at(self, layer: int) -> Ctx:
        """The Ctx for one depth: its number and its own part of the cache."""
        cache: Cache | None = self.cache
        return replace(self, layer=layer, cache=None if cache is None else cache.layers[layer])

    def record(self, name: str, value: mx.array, weight: float = 0.0) -> None:
        """Note a scalar: logged under name and, times weight, added to the loss (an auxiliary loss has weight > 0)."""
        self.auxiliary.append((name, value, weight))

    def auxiliary_loss(self) -> tuple[mx.array, dict[str, mx.array]]:
        """The sum of weight * value over the ledger, and the mean value of each name."""
        total = mx.array(0.0)
        by_name: dict[str, list[mx.array]] = {}
        for name, value, weight in self.auxiliary:
            by_name.setdefault(name, []).append(value)
            if weight:
                total = total + weight * value
        return total, {name: sum(values[1:], values[0]) / len(values) for name, values in by_name.items()}
