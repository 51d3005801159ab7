"""The matrix products of a training step alone: the part of its time that only a faster GEMM could shorten."""

from typing import Any

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx

from bench.tools import graph
from bench.tools.graph import Graph
from bench.workers import mlx_worker
from mlx_transformer.backend import divided_blas, split, use_device
from mlx_transformer.nn.model import Model
from mlx_transformer.run.ladder import find_branch, find_phase
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


class GemmRounds:
    """The products of a training step, from the settings of mlx_worker.TrainingRounds, on as many streams."""

    def __init__(
        self,
        *,
        phase: int,
        size: str,
        batch_size: int,
        config: dict[str, Any],
        device: str,
        branch: str | None = None,
        recipe: str | None = None,
        learning_rate: float | None = None,
        **others: Any,
    ) -> None:
        use_device(device)
        kind = find_branch(find_phase(phase), branch)
        rules = mlx_worker.make_recipe(phase, size, batch_size, config["seq_len"], recipe, learning_rate)
        made: dict[Any, mx.array] = {}
        self.work: list[tuple[mx.Stream, list[list[mx.array]]]] = []
        for i, (stream, part, _) in enumerate(split(mx.zeros((batch_size, 1)))):
            with mx.stream(stream):
                pairs = step_products(kind(kind.Config(**config)), rules, len(part))
                self.work += [(stream, [[made.setdefault((i, f), _draw(*f)) for f in pair] for pair in pairs])]
        mx.eval(list(made.values()))

    def facts(self) -> dict[str, Any]:
        """Describe the runtime."""
        return mlx_worker.describe_runtime()

    def round(self, steps: int) -> dict[str, Any]:
        """Compute the products of so many steps."""
        with divided_blas():
            for _ in range(steps):
                mx.eval([self._last(stream, factors) for stream, factors in self.work])
        return {"losses": []}

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
