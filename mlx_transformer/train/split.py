"""A model of which each of several ranks has a part, slices of its matrices (tensor.py) or some of its blocks.

All ranks train their parts on the same batches. Checkpoints and the trained model are whole: rank 0 gathers them.
"""

import hashlib
from collections.abc import Container, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_transformer.backend import streams
from mlx_transformer.nn.model import Model
from mlx_transformer.train.optim.clip import sum_of_squares
from mlx_transformer.train.optim.groups import Group
from mlx_transformer.train.parallel import Ranks, Signals
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.utils.trees import by_path

Arrays = dict[str, mx.array]  # by path
_BEFORE_PATH = {"model": 0, "best": 0, "memory": 1, "optimizers": 1}  # words of a name in a checkpoint after the first


class Split:
    """The part of a model that this rank has: the model itself is changed, and `join` changes it back.

    axes: by path of a parameter, the axis along which each rank has a slice of it. partial: the parameters that several
    ranks have and of which each computes a part of the gradient. The gradient of any other that several ranks have is
    the same on each.
    """

    def __init__(self, model: Model, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks.on_whole_batches()
        self.axes: dict[str, int] = {}
        self.partial: frozenset[str] = frozenset()
        self.whole_states: set[str] = set()  # parameters whose optimizer has the state of the whole matrix

    def groups(self, recipe: Recipe) -> Sequence[Group]:
        """Return the recipe's groups as they update this rank's parameters. Raises BadInput for what cannot."""
        return recipe.groups

    def gradients(self, step: Any, batch: mx.array) -> tuple[Arrays, Arrays] | None:
        """Return this rank's metrics and gradients by path for a training step; None: `step` computes them itself."""
        return None

    def combine(
        self, metrics: Arrays, gradients: list[Arrays], signals: Signals
    ) -> tuple[Arrays, list[Arrays], list[mx.array], mx.array]:
        """Return the metrics, the gradients, the partial ones summed, the square of their norm, the summed signals."""
        if partial := {path: part[path] for part in gradients for path in part if path in self.partial}:
            summed = self.ranks.sum_all(partial)
            gradients = [{path: summed.get(path, value) for path, value in part.items()} for part in gradients]
        counted = [{path: value for path, value in part.items() if self._is_first(path)} for part in gradients]
        squares = [sum_of_squares(part) for part in counted if part]
        own = mx.concatenate([mx.array(signals, mx.float32), sum(squares, mx.zeros(())).reshape(1)])
        # Behind every other message of the step, on each rank: some gradients count on the first one only.
        everything = [value for part in gradients for value in part.values()]
        total = self.ranks.sum(mx.depends([own], everything)[0])
        return metrics, gradients, [total[-1]], total[:-1]

    def _is_first(self, path: str) -> bool:
        """Whether this rank counts the gradient of a parameter in the norm of all."""
        return path in self.axes or self.ranks.rank == 0

    def whole(self, arrays: Arrays) -> Arrays:
        """Return arrays as one process has them, by name, on rank 0; {} on the others, which must call it as well.

        arrays: of this rank, named as in a checkpoint.
        """
        own = {name: [list(value.shape), str(value.dtype)] for name, value in arrays.items()}
        everyone: list[dict[str, Any]] = self.ranks.gather(own)
        result: Arrays = {}
        for name in sorted(set().union(*everyone)):
            first = next(rank for rank, theirs in enumerate(everyone) if name in theirs)
            axis = self._axis(name)
            if axis is not None:
                value = self.ranks.join_slices({name: arrays[name]}, {name: axis})[name]
            elif first == 0:
                value = arrays.get(name, mx.zeros(()))
            else:
                value = self.ranks.spread(arrays[name] if first == self.ranks.rank else None, *everyone[first][name])
            mx.eval(value)
            if self.ranks.rank == 0:
                result[name] = value
        return result

    def own(self, arrays: Arrays) -> Arrays:
        """Return this rank's part of whole arrays, named as in a checkpoint."""
        return {name: self.own_slice(value, self._axis(name)) for name, value in arrays.items()}

    def own_slice(self, value: mx.array, axis: int | None) -> mx.array:
        """Return this rank's slice of an array, lazily; axis None: all of it."""
        if axis is None:
            return value
        return mx.contiguous(mx.split(value, self.ranks.size, axis=axis)[self.ranks.rank])

    def _axis(self, name: str) -> int | None:
        """Return the axis along which an array of a checkpoint is sliced; None: it is not."""
        kind, path = parameter_of(name, self.axes)
        return None if kind == "optimizers" and path in self.whole_states else self.axes.get(path)

    def check_alike(self) -> None:
        """Raise BadInput where parameters that all ranks have differ, or the streams that each computes on."""
        digest = hashlib.sha256()
        for path, value in by_path(self.model.parameters()).items():
            if self._is_shared(path):
                digest.update(path.encode() + np.array(value.astype(mx.float32)).tobytes())
        self.ranks.check_equal({"set of weights": digest.hexdigest(), "number of CPU threads": len(streams())})

    def _is_shared(self, path: str) -> bool:
        """Whether all ranks have a parameter."""
        return path not in self.axes

    def join(self) -> None:
        """Put the model together again, on rank 0; on the others it stays a part, and they must call it as well."""
        found = self.whole({f"model.{path}": value for path, value in by_path(self.model.parameters()).items()})
        if self.ranks.rank == 0:
            self.restore_parts()
            whole = [(name.removeprefix("model."), value) for name, value in found.items()]
            self.model.update(tree_unflatten(whole))

    def restore_parts(self) -> None:
        """Undo what was changed of the model but for its parameters."""


def parameter_of(name: str, paths: Container[str]) -> tuple[str, str]:
    """Split the name of an array in a checkpoint into the tree that it is in and the path of its parameter, or "".

    "optimizers.0.blocks.1.ffn.up_proj.weight.m" -> ("optimizers", "blocks.1.ffn.up_proj.weight")
    """
    kind, *words = name.split(".")
    words = words[_BEFORE_PATH[kind] :]
    for end in (len(words), len(words) - 1):
        if (path := ".".join(words[:end])) in paths:
            return kind, path
    return kind, ""
