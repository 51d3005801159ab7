"""A model of which each of several ranks has a part, slices of its matrices (tensor.py) or some of its blocks.

All ranks train their parts on the same batches. Checkpoints and the trained model are whole: rank 0 gathers them.
"""

import hashlib
from collections.abc import Container, Iterator, Sequence
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
# Words of a name in a checkpoint between the first one and the path of a parameter.
_BEFORE_PATH = {"model": 0, "best": 0, "memory": 1, "optimizers": 1, "snapshots": 2}


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
        self.absent: frozenset[str] = frozenset()  # the parameters that other ranks have
        self._owners: dict[str, int] = {}  # the first rank that has an array of a checkpoint, by name
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

    def describe(self, arrays: Arrays) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Return the whole shape and the dtype of every array of a checkpoint, by name; all ranks must call it.

        arrays: those of this rank, by name.
        """
        everyone: list[dict[str, Any]] = self.ranks.gather(
            {name: [list(value.shape), str(value.dtype).removeprefix("mlx.core.")] for name, value in arrays.items()}
        )
        self._owners = {name: rank for rank, own in reversed([*enumerate(everyone)]) for name in own}
        result = {}
        for name, rank in sorted(self._owners.items()):
            shape, dtype = everyone[rank][name]
            if (axis := self._axis(name)) is not None:
                shape[axis] *= self.ranks.size
            result[name] = tuple(shape), getattr(mx, dtype)
        return result

    def stream(
        self, arrays: Arrays, described: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    ) -> Iterator[tuple[str, int, mx.array]]:
        """Yield (name, 0, array) of every array of a checkpoint, whole, on rank 0 alone; all ranks must take part.

        described: as `describe` returns it. One array of other ranks is in memory at a time. Raises RuntimeError where
        a rank is lost, at the latest after the last one.
        """
        for name, (shape, dtype) in described.items():
            owner, axis = self._owners[name], self._axis(name)
            if axis is not None:
                value = self.ranks.join_slices({name: arrays[name]}, {name: axis})[name]
            elif owner == 0:
                value = arrays.get(name, mx.zeros(()))
            else:
                value = self.ranks.spread(arrays[name] if owner == self.ranks.rank else None, list(shape), str(dtype))
            mx.eval(value)
            if self.ranks.rank == 0:
                yield name, 0, value
        self.ranks.gather(None)

    def whole(self, arrays: Arrays) -> Arrays:
        """Return arrays as one process has them, by name, on rank 0; {} on the others, which must call it as well."""
        return {name: value for name, _, value in self.stream(arrays, self.describe(arrays))}

    def keep(self, name: str, array: mx.array) -> mx.array | None:
        """Return this rank's part of a whole array, named as in a checkpoint; None: another rank has it."""
        return None if parameter_of(name, self.absent)[1] else self.own_slice(array, self._axis(name))

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
