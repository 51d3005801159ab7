"""Gradient checkpointing: the backward pass recomputes activations instead of keeping them."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_transformer import ops
from mlx_transformer.nn.context import Ctx


def checkpointed(block: nn.Module, x: mx.array, ctx: Ctx) -> mx.array:
    """Return block(x, ctx), keeping only its inputs for the gradient (Chen et al. 2016, arXiv 1604.06174, sec. 3).

    Arrays that the function captures would silently get no gradient. Therefore the weights of the block and of the
    Position and every float array of ctx are arguments, and the auxiliary losses and metrics are results. The block
    must not draw random numbers: the recomputation would draw others.
    """
    passed = {f.name: getattr(ctx, f.name) for f in fields(ctx)}
    inputs = {
        "x": x,
        "block": block.parameters(),
        "position": ctx.position.parameters(),
        "ctx": {
            name: a for name, a in passed.items() if isinstance(a, mx.array) and mx.issubdtype(a.dtype, mx.floating)
        },
    }
    paths, leaves = zip(*tree_flatten(inputs), strict=True)
    casts = [leaf.dtype if isinstance(leaf, ops.CastWeight) else None for leaf in leaves]
    arrays = [leaf.weight if isinstance(leaf, ops.CastWeight) else leaf for leaf in leaves]
    entries: list[tuple[str, mx.array, float]] = []

    def run(*arrays: mx.array) -> mx.array | list[mx.array]:
        leaves = [a if dtype is None else ops.CastWeight(a, dtype) for a, dtype in zip(arrays, casts, strict=True)]
        tree = tree_unflatten(list(zip(paths, leaves, strict=True)))
        entries.clear()
        block.update(tree["block"])
        ctx.position.update(tree.get("position", {}))
        y = block(tree["x"], replace(ctx, auxiliary=entries, **tree.get("ctx", {})))
        block.update(inputs["block"])
        ctx.position.update(inputs["position"])
        return [y, *(value for _, value, _ in entries)] if entries else y

    def gradient(primals: Sequence[mx.array], cotangents: mx.array | list[mx.array], _: object) -> list[mx.array]:
        """Compute the gradients of one block after those of the block above.

        MLX evaluates breadth first and would else recompute all blocks at once. By mx.depends a block starts when its
        cotangents are there, and its dx is available once its weights have their gradients.
        """
        outputs = [cotangents] if isinstance(cotangents, mx.array) else list(cotangents)
        _, (dx, *others) = mx.vjp(run, mx.depends(list(primals), outputs), outputs)
        return [*mx.depends([dx], others), *others]

    function = mx.custom_function(run)
    function.vjp(gradient)
    result: Any = function(*arrays)
    y, *values = [result] if isinstance(result, mx.array) else result
    for (name, _, weight), value in zip(list(entries), values, strict=True):
        ctx.record(name, value, weight)
    return y
