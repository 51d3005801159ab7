"""Attention maps: the weights of every softmax attention of a model over a text."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.cache import EMPTY_POSITION
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.model import Model
from mlx_transformer.utils.trees import copy_modules


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The weights (B, n_heads, queries, keys) of one attention; zeros for a query that the block passes on."""

    path: str  # of the part, such as "blocks.0.mixer"
    depth: int  # at which it ran: blocks that are shared run at several
    weights: mx.array


def attention_maps(model: Model, tokens: mx.array, depth: int | None = None) -> list[AttentionMap]:
    """Return the maps of what model(tokens) computes, in the order of execution; depth: of that one alone.

    Mixers without weights over tokens have none (`Attention.weights_of`). The model and its speed stay as they are:
    a copy, which shares the parameters, records.
    """
    seen: list[AttentionMap] = []

    def record(part: Any, path: str) -> Any:
        if isinstance(part, Attention):
            kind = type(part)
            part.__class__ = type(kind.__name__, (_recording(seen, path, depth), kind), {})
        return part

    twin = copy_modules(model, record)
    twin.eval()
    twin(tokens)
    mx.eval([one.weights for one in seen])
    return seen


def _recording(seen: list[AttentionMap], path: str, depth: int | None) -> type[Attention]:
    class Recording(Attention):
        def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
            if depth is None or ctx.layer == depth:
                weights = self.weights_of(x, ctx)
                if weights is not None:
                    passed_on = mx.broadcast_to(ctx.positions, x.shape[:2])[:, None, :, None] == EMPTY_POSITION
                    weights = mx.where(passed_on, mx.zeros((), weights.dtype), weights)
                    seen.append(AttentionMap(path, ctx.layer, weights))
            return super().__call__(x, ctx)

    return Recording
