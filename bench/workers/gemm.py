"""The matrix products of a training step alone: the part of its time that only a faster GEMM could shorten."""

from typing import Any

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx

from bench.tools import graph
from bench.tools.graph import Graph
from mlx_transformer.backend import split
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.model import Model
from mlx_transformer.train.recipe import Recipe

Factor = tuple[tuple[int, ...], bool]  # shape, and whether it is another array transposed


def shapes(traced: Graph) -> list[list[Factor]]:
    """Return both factors of every matrix product of a graph."""

    def factor(name: str) -> Factor:
        shape, node = traced.arrays[name].shape, traced.maker.get(name)
        if node is None or node.primitive != "Transpose":
            return shape, False
        before = traced.arrays[node.inputs[0]].shape
        return shape, before == (*shape[:-2], shape[-1], shape[-2])

    products = (node for node in traced.nodes if node.primitive in ("Matmul", "AddMM"))
    return [[factor(name) for name in node.inputs[:2]] for node in products]


def step_products(model: Model, recipe: Recipe, batch_size: int) -> list[list[Factor]]:
    """Return the matrix products of a step; they are the same on every device."""
    with graph.on_metal():  # only Metal's graph can be read
        batch = mx.zeros((batch_size, model.config.seq_len + 1), mx.int32)
        return shapes(graph.trace(graph.training_step(model, recipe), batch))


class Products:
    """The products of a training step on random matrices, on as many streams; each call computes them once."""

    def __init__(self, kind: type[Model], config: Config, recipe: Recipe, batch_size: int) -> None:
        made: dict[Any, mx.array] = {}
        self.work: list[tuple[mx.Stream, list[list[mx.array]]]] = []
        for i, (stream, part, _) in enumerate(split(mx.zeros((batch_size, 1)))):
            with mx.stream(stream):
                pairs = step_products(kind(config), recipe, len(part))
                self.work += [(stream, [[made.setdefault((i, f), _draw(*f)) for f in pair] for pair in pairs])]
        mx.eval(list(made.values()))

    def __call__(self) -> None:
        mx.eval([self._last(stream, factors) for stream, factors in self.work])

    @staticmethod
    def _last(stream: mx.Stream, work: list[list[mx.array]]) -> mx.array:
        """Return a stream's last product; each waits for the one before, whose memory is then free, as in a step."""
        with mx.stream(stream):
            product = mx.array(0.0)
            for left, right in work:
                product = mx.depends([left], [product])[0] @ right
        return product


def _draw(shape: tuple[int, ...], transposed: bool) -> mx.array:
    if transposed:
        return mx.random.normal((*shape[:-2], shape[-1], shape[-2])).swapaxes(-1, -2)
    return mx.random.normal(shape)
