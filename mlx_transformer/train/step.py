"""The training step: forward, backward, clipping and update, compiled, and split over the streams of a CPU."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map, tree_unflatten

from mlx_transformer import ops
from mlx_transformer.backend import divide, in_parts, split
from mlx_transformer.nn.dropout import Dropout
from mlx_transformer.nn.model import Model
from mlx_transformer.train.curvature import sampled_loss
from mlx_transformer.train.optim.clip import sum_of_squares
from mlx_transformer.train.optim.groups import Optimizers
from mlx_transformer.train.parallel import ALONE, Ranks, Signals
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.sharding import OPTIMIZER, Shards, shard
from mlx_transformer.train.split import Split
from mlx_transformer.utils.trees import Tree, by_path

Arrays = dict[str, mx.array]


class TrainingStep:
    """A training step as a function of a batch and a learning rate, compiled over captured state.

    Where a batch is split over several streams, each stream's part of the work is compiled by itself. Compiled as one,
    equal constants of two streams become one array of the first stream, which the second has to wait for and cannot
    fuse (docs/PERFORMANCE.md). deterministic: add the gradients of tables in a fixed order (`ops.fixed_order`). Raises
    BadInput if a parameter is not in exactly one of the recipe's groups, or the recipe cannot train a model with
    dropout.

    ranks: those among which each batch is divided; `signals` go to the others with the gradients of a step, and `heard`
    is their sum over the ranks (3,). split: the part of the model that this rank has, if not all of it. sharded:
    "optimizer" to divide the optimizers' state among the ranks (`Shards`).
    """

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        ranks: Ranks = ALONE,
        split: Split | None = None,
        *,
        compiled: bool = True,
        deterministic: bool = False,
        sharded: str = "none",
    ) -> None:
        recipe.check_dropout(max((part.p for part in model.modules() if isinstance(part, Dropout)), default=0.0))
        self.model, self.recipe, self.ranks, self.split = model, recipe, ranks, split
        self.signals, self.heard = Signals(), mx.zeros(3)
        self.dtype = getattr(mx, recipe.dtype)
        parameters = by_path(model.trainable_parameters())
        self.optimizers = Optimizers(split.groups(recipe) if split else recipe.groups, parameters)
        parameters |= self.optimizers.start(parameters)
        model.update(tree_unflatten(list(parameters.items())))
        self.shards = Shards(ranks)
        if sharded == OPTIMIZER and ranks.size > 1:
            self.optimizers, self.shards = shard(self.optimizers, parameters, ranks, recipe)
        own = self.shards.cut(parameters)
        self.memory: dict[str, Arrays] = {
            "clip": recipe.clip.start(),
            "scaling": recipe.loss_scale.start() if recipe.dtype == "float16" else {},
            "average": recipe.average.start(own) if recipe.average else {},
        }
        self.snapshots = recipe.average.start_snapshots(own) if recipe.average else {}
        model.label_smoothing, model.checkpoint = recipe.label_smoothing, recipe.checkpoint
        self.shares = divide({path: value.size for path, value in parameters.items()})
        self.own_shares = divide({path: value.size for path, value in own.items()})  # of what is updated here
        self.compiled, self.deterministic = compiled, deterministic
        self._square = mx.compile(sum_of_squares) if compiled else sum_of_squares
        self._step_parts: list[Callable] = [self._gradients, self._mean, self._update]
        self._curvature_parts: list[Callable] = [self._sampled_gradients, self._mean, self._observe]
        self._built: tuple[Callable[..., tuple[Arrays, mx.array]], Callable, Callable] | None = None

    @property
    def state(self) -> list[Any]:
        """Everything that the compiled step reads and changes."""
        return [self.model.state, self.optimizers.state, self.memory, mx.random.state]

    def __call__(self, batch: mx.array, learning_rate: float, average_share: float = 1.0) -> tuple[Arrays, mx.array]:
        """Take a step on a batch (B, L + 1) int32, or on this rank's share of one.

        average_share: of the new weights in the recipe's average.
        Returns the metrics and the norm of the gradients before clipping, which is 0 where the step was skipped because
        of an overflow in float16.
        """
        if self._built is None:  # built late, so that a restored state is captured
            self._built = self._build()
        take, estimate_curvature, gradients_of = self._built
        if self.optimizers.want_rewiring():
            gradients = self.shards.cut({path: mean for share in gradients_of(batch) for path, mean in share.items()})
            weights = self.shards.cut(by_path(self.model.trainable_parameters()))
            self._put(weights | self.optimizers.rewire(gradients, weights))
        if self.optimizers.want_curvature():
            estimate_curvature(batch)
        done = take(batch, mx.array(learning_rate), mx.array(average_share))
        if self.recipe.average and self.snapshots and average_share:
            weights = self.shards.kept(self.model.trainable_parameters())
            self.snapshots = self.recipe.average.taken(self.snapshots, weights)
        return done

    def weights_to_keep(self) -> Tree:
        """Return what is evaluated and saved: the weights, or the recipe's average of them."""
        average = self.recipe.average.value(self.memory["average"], self.snapshots) if self.recipe.average else {}
        return self.shards.tree(average) if average else self.model.trainable_parameters()

    def _build(self) -> tuple[Callable[..., tuple[Arrays, mx.array]], Callable, Callable]:
        if self.compiled and len(self.shares) == self.ranks.size == 1:
            compiled = self._compile
            return compiled(self._take), compiled(self._estimate_curvature), compiled(self._gradients_to_rewire)
        if self.compiled:
            self._step_parts = [self._compile(part) for part in self._step_parts]
            self._curvature_parts = [self._compile(part) for part in self._curvature_parts]
        return self._take, self._estimate_curvature, self._gradients_to_rewire

    def _compile(self, function: Callable) -> Callable:
        return mx.compile(function, inputs=self.state, outputs=self.state)

    def _take(self, batch: mx.array, learning_rate: mx.array, average_share: mx.array) -> tuple[Arrays, mx.array]:
        gradients_of, mean_of, update = self._step_parts
        metrics, means, squares = self._mean_gradients(gradients_of, mean_of, batch)
        norm = mx.sqrt(sum(squares[1:], squares[0]))
        before = self._changing() if self.memory["scaling"] else []
        self.memory["clip"] = self.recipe.clip.watch(self.memory["clip"], norm)
        self.optimizers.advance(learning_rate)
        new: Arrays = {}
        for stream, gradients in self._own(means):
            with mx.stream(stream):
                new |= update(gradients, norm, average_share)
        if new:
            self._put(new, [norm])
        if self.memory["scaling"]:
            norm = self._undo_overflow(metrics, norm, before)
        return metrics, norm

    def _mean_gradients(
        self, gradients_of: Callable, mean_of: Callable, batch: mx.array
    ) -> tuple[Arrays, list[Arrays], list[mx.array]]:
        """Compute the metrics of the batch, and for each stream its parameters' mean gradients and sum of squares."""
        if self.split is not None and (found := self.split.gradients(self, batch)) is not None:
            own = [{path: found[1][path] for path in paths} for _, paths in self.shares]
            *result, self.heard = self.split.combine(found[0], own, self.signals)
            return tuple(result)  # type: ignore[return-value]
        weights = self.model.trainable_parameters()
        metrics: Arrays = {}
        parts, portions = [], []
        for stream, sequences, portion in split(batch):
            with mx.stream(stream):
                values, gradients = gradients_of(sequences)
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
        if self.split is not None:
            metrics, means, squares, self.heard = self.split.combine(metrics, means, self.signals)
        elif self.ranks.size > 1:
            metrics, means, self.heard = self.ranks.average(metrics, means, self.signals)
            squares = [self._square(mean) for mean in means]
        return metrics, means, squares

    def _estimate_curvature(self, batch: mx.array) -> None:
        """Give the optimizers the gradients for targets sampled from the model."""
        gradients_of, mean_of, observe = self._curvature_parts
        _, means, _ = self._mean_gradients(gradients_of, mean_of, batch)
        self._computed(means)
        for stream, gradients in self._own(means):
            with mx.stream(stream):
                observe(gradients, self.ranks.shares * batch.shape[0] * (batch.shape[-1] - 1))

    def _gradients_to_rewire(self, batch: mx.array) -> list[Arrays]:
        """Return the gradients of the batch, for each stream those of its share of the parameters."""
        gradients_of, mean_of, _ = self._step_parts
        means = self._mean_gradients(gradients_of, mean_of, batch)[1]
        self._computed(means)
        return means

    def _computed(self, means: list[Arrays]) -> None:
        """Compute the means where ranks have shards: each needs a part of them, and must take part in all messages."""
        if self.shards.layout:
            mx.eval(means)

    def _own(self, means: list[Arrays]) -> list[tuple[mx.Stream, Arrays]]:
        """Return for each stream the gradients of its part of what this rank updates."""
        if not self.shards.layout:
            return [(stream, mean) for (stream, _), mean in zip(self.shares, means, strict=True)]
        own = self.shards.cut({path: gradient for mean in means for path, gradient in mean.items()})
        return [(stream, {path: own[path] for path in paths}) for stream, paths in self.own_shares]

    def _put(self, own: Arrays, after: list[mx.array] | None = None) -> None:
        """Set the weights to new ones, of which this rank has its shards, once other arrays are computed."""
        self.model.update(tree_unflatten(list(self.shards.join(own, after).items())))

    def _changing(self) -> list[Any]:
        """Copy the trees that an update changes; the arrays are shared."""
        return tree_map(
            lambda array: array,
            [self.model.trainable_parameters(), self.optimizers.state, self.memory["clip"], self.memory["average"]],
        )

    def _undo_overflow(self, metrics: Arrays, norm: mx.array, before: list[Any]) -> mx.array:
        """Restore the state before the step if its gradients overflowed, adjust the scale, return the reported norm."""
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

    def _gradients(self, batch: mx.array) -> tuple[Arrays, Arrays]:
        return self._gradients_of(self.model.loss, batch)

    def _sampled_gradients(self, batch: mx.array) -> tuple[Arrays, Arrays]:
        return self._gradients_of(lambda sequences: (sampled_loss(self.model, sequences), {}), batch)

    def _gradients_of(
        self, function: Callable[[mx.array], tuple[mx.array, Arrays]], batch: mx.array
    ) -> tuple[Arrays, Arrays]:
        """Compute the mean metrics and gradients (by path) over a batch, in `accumulate` parts one after the other."""

        def loss_of(weights: Tree, sequences: mx.array) -> tuple[mx.array, Arrays]:
            """Compute the scaled loss in the recipe's dtype, as a function of the float32 weights."""
            cast = self.dtype != mx.float32 or self.deterministic
            self.model.update(tree_map(lambda w: ops.CastWeight(w, self.dtype), weights) if cast else weights)
            loss, values = function(sequences)
            return loss * self.memory["scaling"]["scale"] if self.memory["scaling"] else loss, values

        weights = self.model.trainable_parameters()
        metrics: Arrays = {}
        total: Arrays = {}
        for sequences, portion in in_parts(batch, self.recipe.accumulate):
            if total:  # else MLX, which evaluates a graph breadth first, would hold all parts in memory at once
                sequences = mx.depends([sequences], list(total.values()))[0]
            with ops.fixed_order(self.deterministic):
                (_, values), gradients = mx.value_and_grad(loss_of)(weights, sequences)
            _add(metrics, values, portion)
            _add(total, by_path(gradients), portion)
        if self.memory["scaling"]:
            total = {path: gradient / self.memory["scaling"]["scale"] for path, gradient in total.items()}
        return metrics, total

    @staticmethod
    def _mean(parts: list[Arrays], portions: list[float]) -> tuple[Arrays, mx.array]:
        """Compute the mean gradients over several portions of a batch, and their sum of squares."""
        mean: Arrays = {}
        for part, portion in zip(parts, portions, strict=True):
            _add(mean, part, portion)
        return mean, sum_of_squares(mean)

    def _update(self, gradients: Arrays, norm: mx.array, average_share: mx.array) -> Arrays:
        """Update the weights that have a gradient here, and their average.

        Where ranks have shards, the new weights are returned instead of set: those of the other ranks belong with them.
        """
        weights = self.shards.cut(by_path(self.model.trainable_parameters()))
        clipped = self.recipe.clip(gradients, weights, norm, self.memory["clip"])
        new = self.optimizers.update(clipped, weights)
        if self.recipe.average:
            average = self.memory["average"]
            average.update(self.recipe.average.after(average, new, average_share))
        if self.shards.layout:
            return new
        self._put(new)
        return {}

    def _observe(self, gradients: Arrays, targets: int) -> None:
        self.optimizers.observe(gradients, targets)


def _add(total: Arrays, part: Arrays, share: float) -> None:
    """Compute total += share * part in place, name by name."""
    for name, value in part.items():
        scaled = value if share == 1 else value * share
        total[name] = total[name] + scaled if name in total else scaled
