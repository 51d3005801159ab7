"""The training step and the evaluation: what the model computes, compiled, and split over the streams of a CPU."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_transformer.data.stream import validation_rows
from mlx_transformer.model import Model
from mlx_transformer.optim.groups import Optimizers
from mlx_transformer.recipe import Recipe
from mlx_transformer.streams import split
from mlx_transformer.trees import Tree, by_path

_EVAL_TOKENS = 8192  # of one evaluation batch


class TrainingStep:
    """Forward, backward, clip, update: one function of a batch and a learning rate, compiled over captured state."""

    def __init__(self, model: Model, recipe: Recipe, *, compiled: bool = True) -> None:
        self.model, self.recipe = model, recipe
        self.dtype = getattr(mx, recipe.dtype)
        self.optimizers = Optimizers(recipe.groups, model.trainable_parameters())
        self.compiled = compiled
        self._function: Callable[..., tuple[dict[str, mx.array], mx.array]] | None = None

    @property
    def state(self) -> list[Any]:
        """Everything a step reads and changes."""
        return [self.model.state, self.optimizers.state, mx.random.state]

    def __call__(self, batch: mx.array, rate: float) -> tuple[dict[str, mx.array], mx.array]:
        """batch (rows, L + 1) int32, the learning rate -> metrics and the gradients' norm before clipping."""
        if self._function is None:  # built late, so that a restored state is the one captured
            state = self.state
            self._function = mx.compile(self._step, inputs=state, outputs=state) if self.compiled else self._step
        return self._function(batch, mx.array(rate))

    def _step(self, batch: mx.array, rate: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        weights = self.model.trainable_parameters()
        metrics, gradients = self._gradients(weights, batch)
        clipped, norm = self.recipe.clip(gradients)
        self.model.update(self.optimizers.update(clipped, by_path(weights), rate))
        return metrics, norm

    def _gradients(self, weights: Tree, batch: mx.array) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        """Metrics and gradients by path, each the mean over the rows, every stream working on its part of them."""
        metrics: dict[str, mx.array] = {}
        gradients: dict[str, mx.array] = {}
        for stream, rows, share in split(batch):
            with mx.stream(stream):
                (_, values), slopes = mx.value_and_grad(self._loss)(weights, rows)
            _add(metrics, values, share)
            _add(gradients, by_path(slopes), share)
        return metrics, gradients

    def _loss(self, weights: Tree, batch: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss as a function of the float32 weights, computed in the recipe's dtype."""
        self.model.update(tree_map(lambda w: w.astype(self.dtype), weights))
        return self.model.loss(batch)


class Evaluator:
    """Validation loss: nats per piece over every piece of the split, each predicted once."""

    def __init__(self, model: Model, valid: np.ndarray, seq_len: int, *, compiled: bool = True) -> None:
        rows, mask = validation_rows(valid, seq_len)
        size = min(len(rows), max(1, _EVAL_TOKENS // seq_len))
        short = -len(rows) % size  # full batches only: one shape, one compiled graph
        self.rows = np.concatenate([rows, np.repeat(rows[:1], short, 0)])
        self.mask = np.concatenate([mask, np.zeros((short, seq_len), bool)])
        self.size, self.pieces = size, int(mask.sum())
        self.model = model
        self._function = mx.compile(self._total, inputs=[model.state]) if compiled else self._total

    def _total(self, rows: mx.array, mask: mx.array) -> mx.array:
        totals = []
        for (stream, part, _), (_, counted, _) in zip(split(rows), split(mask), strict=True):
            with mx.stream(stream):
                ctx, targets = self.model.inputs(part)
                totals.append((self.model.token_loss(self.model.hidden(ctx), targets) * counted).sum())
        return sum(totals[1:], totals[0])

    def __call__(self) -> float:
        """The loss of the model's present weights, without dropout."""
        self.model.eval()
        total = 0.0
        for i in range(0, len(self.rows), self.size):
            batch = slice(i, i + self.size)
            total += self._function(mx.array(self.rows[batch]), mx.array(self.mask[batch])).item()  # type: ignore[assignment]
        self.model.train()
        return total / self.pieces


def _add(total: dict[str, mx.array], part: dict[str, mx.array], share: float) -> None:
    """total += share * part, name by name."""
    for name, value in part.items():
        scaled = value if share == 1 else value * share
        total[name] = total[name] + scaled if name in total else scaled
