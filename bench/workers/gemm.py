"""The matrix products of a training step, alone: the part of its time that no other code of ours could save."""

from typing import Any

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx

from bench.tools import graph
from bench.tools.graph import Graph
from bench.workers import ours
from mlx_transformer.backend import divided_blas, split, use_device
from mlx_transformer.nn.model import Model
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.train.recipe import Recipe

Factor = tuple[tuple[int, ...], bool]  # its shape, and whether it is another array transposed


def shapes(found: Graph) -> list[list[Factor]]:
    """Both factors of every matrix product of a graph."""

    def factor(name: str) -> Factor:
        shape, node = found.arrays[name].shape, found.maker.get(name)
        if node is None or node.primitive != "Transpose":
            return shape, False
        before = found.arrays[node.inputs[0]].shape
        return shape, before == (*shape[:-2], shape[-1], shape[-2])

    products = (node for node in found.nodes if node.primitive in ("Matmul", "AddMM"))
    return [[factor(name) for name in node.inputs[:2]] for node in products]


def step_products(model: Model, recipe: Recipe, rows: int) -> list[list[Factor]]:
    """The matrix products of a step of so many rows; they are the same on every device."""
    with graph.on_metal():  # whose graph can be read
        batch = mx.zeros((rows, model.config.seq_len + 1), mx.int32)
        return shapes(graph.trace(graph.training_step(model, recipe), batch))


class GemmRounds:
    """The contestant gemm, made with the settings of `ours.TrainingRounds`: its products, on as many streams."""

    def __init__(
        self,
        *,
        phase: int,
        size: str,
        rows: int,
        config: dict[str, Any],
        device: str,
        branch: str | None = None,
        recipe: str | None = None,
        learning_rate: float | None = None,
        **others: Any,
    ) -> None:
        use_device(device)
        kind = find_branch(find_phase(phase), branch)
        rules = ours.make_recipe(phase, size, rows, config["seq_len"], recipe, learning_rate)
        made: dict[Any, mx.array] = {}
        self.work: list[tuple[mx.Stream, list[list[mx.array]]]] = []
        for i, (stream, part, _) in enumerate(split(mx.zeros((rows, 1)))):
            with mx.stream(stream):
                pairs = step_products(kind(kind.Config(**config)), rules, len(part))
                self.work += [(stream, [[made.setdefault((i, f), _draw(*f)) for f in pair] for pair in pairs])]
        mx.eval(list(made.values()))

    def facts(self) -> dict[str, Any]:
        return ours.facts()

    def round(self, steps: int) -> dict[str, Any]:
        """So many steps' products."""
        with divided_blas():
            for _ in range(steps):
                mx.eval([self._last(stream, factors) for stream, factors in self.work])
        return {"losses": []}

    @staticmethod
    def _last(stream: mx.Stream, work: list[list[mx.array]]) -> mx.array:
        """The last of a stream's products; each waits for the one before, whose memory is then free, as in a step."""
        with mx.stream(stream):
            product = mx.array(0.0)
            for left, right in work:
                product = mx.depends([left], [product])[0] @ right
        return product


def _draw(shape: tuple[int, ...], transposed: bool) -> mx.array:
    if transposed:
        return mx.random.normal((*shape[:-2], shape[-1], shape[-2])).swapaxes(-1, -2)
    return mx.random.normal(shape)
