"""Gradient checkpointing: what the backward pass needs is computed again instead of being kept."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_transformer.nn.context import Ctx


def checkpointed(block: nn.Module, x: mx.array, ctx: Ctx) -> mx.array:
    """block(x, ctx), of which only the inputs are kept for its gradient (Chen et al. 2016, arXiv 1604.06174, sec. 3).

    What such a function merely captures gets no gradient, in silence. So the weights of the block and of the Position
    and every float array of ctx go in as arguments, and the ledger's entries come out as results. A part that draws
    random numbers would draw others the second time: there must be none.
    """
    lent = {f.name: getattr(ctx, f.name) for f in fields(ctx)}
    inputs = {
        "x": x,
        "block": block.parameters(),
        "position": ctx.position.parameters(),
        "ctx": {name: a for name, a in lent.items() if isinstance(a, mx.array) and mx.issubdtype(a.dtype, mx.floating)},
    }
    paths, arrays = zip(*tree_flatten(inputs), strict=True)
    entries: list[tuple[str, mx.array, float]] = []

    def run(*arrays: mx.array) -> mx.array | list[mx.array]:
        given = tree_unflatten(list(zip(paths, arrays, strict=True)))
        entries.clear()
        block.update(given["block"])
        ctx.position.update(given.get("position", {}))
        y = block(given["x"], replace(ctx, auxiliary=entries, **given.get("ctx", {})))
        block.update(inputs["block"])
        ctx.position.update(inputs["position"])
        return [y, *(value for _, value, _ in entries)] if entries else y

    def gradient(primals: Sequence[mx.array], cotangents: mx.array | list[mx.array], _: object) -> list[mx.array]:
        """MLX computes breadth first: bound by mx.depends, a block begins when its cotangent is there, and the block
        before it once this one's weights have their gradients; else all would be computed first and kept."""
        above = [cotangents] if isinstance(cotangents, mx.array) else list(cotangents)
        _, (dx, *others) = mx.vjp(run, mx.depends(list(primals), above), above)
        return [*mx.depends([dx], others), *others]

    function = mx.custom_function(run)
    function.vjp(gradient)
    result: Any = function(*arrays)
    y, *values = [result] if isinstance(result, mx.array) else result
    for (name, _, weight), value in zip(list(entries), values, strict=True):
        ctx.record(name, value, weight)
    return y
