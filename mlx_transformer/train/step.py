"""The training step: what the model computes, compiled, and split over the streams of a CPU."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map, tree_unflatten

from mlx_transformer.backend import divide, in_parts, split
from mlx_transformer.nn.model import Model
from mlx_transformer.train.curvature import drawn_loss
from mlx_transformer.train.optim.clip import sum_of_squares
from mlx_transformer.train.optim.groups import Optimizers
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.utils.trees import Tree, by_path


class TrainingStep:
    """Forward, backward, clip, update: one function of a batch and a learning rate, compiled over captured state.

    Where a batch is split over several streams, each stream's part of the work is compiled by itself instead: compiled
    as one, equal constants of two streams become one array of the first stream, which the second has to wait for and
    cannot fuse (docs/PERFORMANCE.md).
    """

    def __init__(self, model: Model, recipe: Recipe, *, compiled: bool = True) -> None:
        recipe.check_model(model.config)
        self.model, self.recipe = model, recipe
        self.dtype = getattr(mx, recipe.dtype)
        parameters = by_path(model.trainable_parameters())
        self.optimizers = Optimizers(recipe.groups, parameters)
        self.memory: dict[str, dict[str, mx.array]] = {
            "clip": recipe.clip.start(),
            "scaling": recipe.loss_scale.start() if recipe.dtype == "float16" else {},
            "average": dict(parameters) if recipe.average else {},
        }
        model.label_smoothing, model.checkpoint = recipe.label_smoothing, recipe.checkpoint
        self.shares = divide({path: value.size for path, value in parameters.items()})
        self.compiled = compiled
        self._pieces: list[Callable] = [self._gradients, self._mean, self._update]
        self._looks: list[Callable] = [self._drawn_gradients, self._mean, self._observe]
        self._built: tuple[Callable[..., tuple[dict[str, mx.array], mx.array]], Callable] | None = None

    @property
    def state(self) -> list[Any]:
        """Everything a step reads and changes."""
        return [self.model.state, self.optimizers.state, self.memory, mx.random.state]

    def __call__(
        self, batch: mx.array, rate: float, average_share: float = 1.0
    ) -> tuple[dict[str, mx.array], mx.array]:
        """batch (rows, L + 1) int32, the learning rate, the new weights' share in the recipe's average of them.

        Gives metrics and the gradients' norm before clipping, which is 0 where an overflow made it leave the step out.
        """
        if self._built is None:  # built late, so that a restored state is the one captured
            self._built = self._build()
        take, look = self._built
        if self.optimizers.want_curvature():
            look(batch)
        return take(batch, mx.array(rate), mx.array(average_share))

    def weights_to_keep(self) -> Tree:
        """What is to be evaluated and kept: the weights, or the recipe's average of them."""
        average = self.memory["average"]
        return tree_unflatten(list(average.items())) if average else self.model.trainable_parameters()

    def _build(self) -> tuple[Callable[..., tuple[dict[str, mx.array], mx.array]], Callable]:
        if self.compiled and len(self.shares) == 1:
            return self._compile(self._whole), self._compile(self._look)
        if self.compiled:
            self._pieces = [self._compile(piece) for piece in self._pieces]
            self._looks = [self._compile(piece) for piece in self._looks]
        return self._whole, self._look

    def _compile(self, function: Callable) -> Callable:
        return mx.compile(function, inputs=self.state, outputs=self.state)

    def _whole(self, batch: mx.array, rate: mx.array, average_share: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        gradients_of, mean_of, update = self._pieces
        metrics, means, squares = self._shared_out(gradients_of, mean_of, batch)
        norm = mx.sqrt(sum(squares[1:], squares[0]))
        before = self._changing() if self.memory["scaling"] else []
        self.memory["clip"] = self.recipe.clip.watch(self.memory["clip"], norm)
        self.optimizers.advance(rate)
        for (stream, _), mean in zip(self.shares, means, strict=True):
            with mx.stream(stream):
                update(mean, norm, average_share)
        if self.memory["scaling"]:
            norm = self._undo_overflow(metrics, norm, before)
        return metrics, norm

    def _shared_out(
        self, gradients_of: Callable, mean_of: Callable, batch: mx.array
    ) -> tuple[dict[str, mx.array], list[dict[str, mx.array]], list[mx.array]]:
        """Metrics of all rows; their mean gradients and the sums of their squares, for each stream's share of paths."""
        weights = self.model.trainable_parameters()
        metrics: dict[str, mx.array] = {}
        parts, portions = [], []
        for stream, rows, portion in split(batch):
            with mx.stream(stream):
                values, gradients = gradients_of(rows)
            self.model.update(weights)  # in float32 again
            _add(metrics, values, portion)
            parts.append(gradients)
            portions.append(portion)
        means, squares = [], []
        for stream, paths in self.shares:
            with mx.stream(stream):
                mean, square = mean_of([{path: part[path] for path in paths} for part in parts], portions)
            means.append(mean)
            squares.append(square)
        return metrics, means, squares

    def _look(self, batch: mx.array) -> None:
        """Let the optimizers see the curvature: the gradients for targets that the model itself draws."""
        gradients_of, mean_of, observe = self._looks
        _, means, _ = self._shared_out(gradients_of, mean_of, batch)
        for (stream, _), mean in zip(self.shares, means, strict=True):
            with mx.stream(stream):
                observe(mean, batch[:, 1:].size)

    def _changing(self) -> list[Any]:
        """What an update changes; a copy, but for the arrays."""
        return tree_map(
            lambda array: array,
            [self.model.trainable_parameters(), self.optimizers.state, self.memory["clip"], self.memory["average"]],
        )

    def _undo_overflow(self, metrics: dict[str, mx.array], norm: mx.array, before: list[Any]) -> mx.array:
        """Put back what was before, if the scaled gradients overflowed; adjust the scale; the norm to report."""
        finite, scaling = mx.isfinite(norm), self.memory["scaling"]
        weights, states, self.memory["clip"], self.memory["average"] = tree_map(
            lambda new, old: mx.where(finite, new, old), self._changing(), before
        )
        self.model.update(weights)
        for own, kept in zip(self.optimizers.state, states, strict=True):
            own.update(kept)  # in place: the compiled step has captured it
        self.memory["scaling"] = self.recipe.loss_scale.after(scaling, finite)
        metrics["loss_scale"] = scaling["scale"]
        metrics["skipped_steps"] = self.memory["scaling"]["skipped_steps"]
        return mx.where(mx.logical_or(finite, scaling["scale"] <= 1), norm, 0.0)

    def _gradients(self, batch: mx.array) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        return self._gradients_of(self.model.loss, batch)

    def _drawn_gradients(self, batch: mx.array) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        return self._gradients_of(lambda rows: (drawn_loss(self.model, rows), {}), batch)

    def _gradients_of(
        self, function: Callable[[mx.array], tuple[mx.array, dict[str, mx.array]]], batch: mx.array
    ) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        """Metrics and gradients by path, each the mean over the rows, computed in parts, one after the other."""

        def loss_of(weights: Tree, rows: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
            """The loss, times its scale, as a function of the float32 weights, computed in the recipe's dtype."""
            self.model.update(tree_map(lambda w: w.astype(self.dtype), weights))
            loss, values = function(rows)
            return loss * self.memory["scaling"]["scale"] if self.memory["scaling"] else loss, values

        weights = self.model.trainable_parameters()
        metrics: dict[str, mx.array] = {}
        total: dict[str, mx.array] = {}
        for rows, portion in in_parts(batch, self.recipe.accumulate):
            if total:  # else MLX, which goes through a graph breadth first, would have all parts in memory at once
                rows = mx.depends([rows], list(total.values()))[0]
            (_, values), gradients = mx.value_and_grad(loss_of)(weights, rows)
            _add(metrics, values, portion)
            _add(total, by_path(gradients), portion)
        if self.memory["scaling"]:
            total = {path: gradient / self.memory["scaling"]["scale"] for path, gradient in total.items()}
        return metrics, total

    @staticmethod
    def _mean(parts: list[dict[str, mx.array]], portions: list[float]) -> tuple[dict[str, mx.array], mx.array]:
        """The mean over all rows of gradients from several portions of them, and its sum of squares."""
        mean: dict[str, mx.array] = {}
        for part, portion in zip(parts, portions, strict=True):
            _add(mean, part, portion)
        return mean, sum_of_squares(mean)

    def _update(self, gradients: dict[str, mx.array], norm: mx.array, average_share: mx.array) -> None:
        """New weights, and their average, where there are gradients."""
        weights, average = by_path(self.model.trainable_parameters()), self.memory["average"]
        clipped = self.recipe.clip(gradients, weights, norm, self.memory["clip"])
        new = self.optimizers.update(clipped, weights)
        self.model.update(tree_unflatten(list(new.items())))
        if average:
            for path, weight in new.items():
                average[path] = average[path] + average_share * (weight - average[path])

    def _observe(self, gradients: dict[str, mx.array], targets: int) -> None:
        self.optimizers.observe(gradients, targets)


def _add(total: dict[str, mx.array], part: dict[str, mx.array], share: float) -> None:
    """total += share * part, name by name."""
    for name, value in part.items():
        scaled = value if share == 1 else value * share
        total[name] = total[name] + scaled if name in total else scaled
