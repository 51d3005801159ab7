"""Sharded optimizer state: each rank keeps the state of its share of the parameters, and updates that share.

ZeRO's first stage (Rajbhandari et al. 2020, arXiv 1910.02054, sec. 5.1, P_os). Every rank has all weights and the mean
of all gradients; the updated shares are gathered in few large messages. What is kept beside the weights is divided
alike: their average, and the best weights so far. Differs from the paper, which divides one flat vector: a matrix that
a rule updates as a whole, as Muon does, belongs to one rank, which alone orthogonalizes it; others are cut by rows.
"""

import math
import time
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_transformer.nn.model import Model
from mlx_transformer.train.optim.groups import Arrays, Optimizers
from mlx_transformer.train.parallel import ALONE, BUCKET_BYTES, Ranks, buckets
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import Tree, by_path

OPTIMIZER = "optimizer"


class Shard(NamedTuple):
    """The rows of a parameter that a rank updates; (0, None): all of it."""

    rank: int
    start: int = 0
    end: int | None = None


class Kind(NamedTuple):
    """An array that is divided as a parameter is: its whole shape."""

    path: str  # of the parameter
    shape: tuple[int, ...]
    dtype: mx.Dtype

    def shape_of(self, shard: Shard) -> tuple[int, ...]:
        return self.shape if shard.end is None else (shard.end - shard.start, *self.shape[1:])


class Shards:
    """The division of what is kept for each parameter; without a layout every rank keeps everything.

    layout: by path, the shards in the order of their rows. kinds: of a checkpoint's arrays that are divided, by name.
    Methods that exchange arrays are to be called by all ranks alike.
    """

    def __init__(self, ranks: Ranks = ALONE, layout: dict[str, list[Shard]] | None = None) -> None:
        self.ranks, self.layout = ranks, layout or {}
        self.kinds: dict[str, Kind] = {}
        self._weights: dict[str, Kind] = {}
        self._own = {path: own for path, all_ in self.layout.items() for own in all_ if own.rank == ranks.rank}

    def cut(self, arrays: Arrays) -> Arrays:
        """Return this rank's shards of arrays by path, lazily."""
        if not self.layout:
            return arrays
        return {path: _rows(arrays[path], own) for path, own in self._own.items()}

    def kept(self, tree: Tree) -> Arrays:
        """Return this rank's shards of a tree of weights, without a reference to the rest."""
        if self.layout:
            mx.eval(tree)  # in every message of it all ranks must take part
        own = self.cut(by_path(tree))
        if self.layout:
            own = {path: mx.contiguous(value) for path, value in own.items()}
            mx.eval(own)
        return own

    def join(self, own: Arrays, after: list[mx.array] | None = None) -> Arrays:
        """Return the whole weights, or what has their shapes, from the shards of all ranks, lazily.

        after: arrays to compute before.
        """
        if not self.layout:
            return own
        probes = self.ranks.communication_seconds > 0 and after is not None  # a step of which the messages are timed
        if probes:
            mx.eval(own, after)
        started = time.perf_counter()
        parts: dict[str, dict[Shard, mx.array]] = {}
        for path, shard, part in self._exchange(own, self._weights, after or []):
            parts.setdefault(path, {})[shard] = part
        whole = {path: _joined([parts[path][shard] for shard in shards]) for path, shards in self.layout.items()}
        if probes:
            mx.eval(whole)
            self.ranks.communication_seconds += time.perf_counter() - started
        return whole

    def tree(self, own: Arrays) -> Tree:
        """Return `join` as a tree, computed."""
        whole = self.join(own)
        if self.layout:
            mx.eval(whole)
        return tree_unflatten(list(whole.items()))

    def describe(self, arrays: Arrays) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Return the whole shape and dtype of each array of a checkpoint, of which this rank has `arrays`, by name."""
        alike = {name: (value.shape, value.dtype) for name, value in arrays.items()}
        return alike | {name: (kind.shape, kind.dtype) for name, kind in self.kinds.items()}

    def stream(self, arrays: Arrays) -> Iterator[tuple[str, int, mx.array]]:
        """Yield (name, first row, rows) of every array of a checkpoint, of which this rank has `arrays`.

        One message is in memory at a time. Raises RuntimeError where a rank is lost, at the latest after the last one.
        """
        yield from ((name, 0, value) for name, value in arrays.items() if name not in self.kinds)
        own = {name: value for name, value in arrays.items() if name in self.kinds}
        for name, shard, part in self._exchange(own, self.kinds, []):
            mx.eval(part)
            yield name, shard.start, part
        self.ranks.gather(None)

    def keep(self, name: str, array: mx.array) -> mx.array | None:
        """Return what this rank needs of an array of a checkpoint; None: nothing."""
        kind = self.kinds.get(name)
        if kind is None or array.shape != kind.shape:
            return array
        own = self._own.get(kind.path)
        return None if own is None else mx.contiguous(_rows(array, own))

    def _exchange(
        self, own: Arrays, kinds: dict[str, Kind], after: list[mx.array]
    ) -> Iterator[tuple[str, Shard, mx.array]]:
        """Yield every shard of all ranks, lazily, one message after the other; each message has one dtype."""
        for dtype in sorted({kind.dtype for kind in kinds.values()}, key=str):
            alike = {name: kind for name, kind in kinds.items() if kind.dtype == dtype}
            shards = {(name, shard.rank): shard for name, kind in alike.items() for shard in self.layout[kind.path]}
            sizes = {(name, rank): math.prod(alike[name].shape_of(shards[name, rank])) for name, rank in shards}
            for message in self._messages(sizes, dtype):
                widths = [sum(sizes[name, rank] for name in names) for rank, names in enumerate(message)]
                flat = [own[name].reshape(-1) for name in message[self.ranks.rank]]
                sent = dtype if dtype != mx.bool_ else mx.uint8
                padding = max(widths) - widths[self.ranks.rank]
                packed = mx.concatenate([*(value.astype(sent) for value in flat), mx.zeros(padding, sent)])
                received = self.ranks.gather_arrays(mx.depends([packed], after)[0] if after else packed)
                after = [received]  # the same order on every rank
                for rank, names in enumerate(message):
                    start = rank * max(widths)
                    for name in names:
                        part = received[start : start + sizes[name, rank]].astype(dtype)
                        start += sizes[name, rank]
                        yield name, shards[name, rank], part.reshape(alike[name].shape_of(shards[name, rank]))

    def _messages(self, sizes: dict[tuple[str, int], int], dtype: mx.Dtype) -> Iterator[list[list[str]]]:
        """Yield for each message the names that each rank puts into it."""
        bytes_of = [
            {name: size * dtype.size for (name, other), size in sizes.items() if other == rank}
            for rank in range(self.ranks.size)
        ]
        packed = [buckets(own, BUCKET_BYTES // self.ranks.size) for own in bytes_of]
        yield from ([*names] for names in zip_longest(*packed, fillvalue=[]))


def shard(whole: Optimizers, parameters: Arrays, ranks: Ranks, recipe: Recipe) -> tuple[Optimizers, Shards]:
    """Divide new optimizers among the ranks; return this rank's, and the division.

    whole: of all parameters, not computed: it says what there is. Raises BadInput as `check_shards`.
    """
    layout = _layout(whole, parameters, ranks.size)
    shards = Shards(ranks, layout)
    further = ["best", *(f"snapshots.newest_first.{i}" for i in range(_n_snapshots(recipe, parameters)))]
    further += ["memory.average"] if recipe.average and recipe.average.start(parameters) else []
    shards._weights = {path: Kind(path, value.shape, value.dtype) for path, value in parameters.items()}
    for path, kind in shards._weights.items():
        shards.kinds |= {f"{name}.{path}": kind for name in further}
    for i, state in enumerate(whole.state):
        for path in (path for path in layout if path in state):  # in one order on every rank
            for name, value in by_path(state[path]).items():
                shards.kinds[f"optimizers.{i}.{path}.{name}"] = Kind(path, value.shape, value.dtype)
    own = shards.cut(parameters)
    optimizers = Optimizers(whole.groups, parameters, own)
    optimizers.start(own)
    return optimizers, shards


def check_shards(model: Model, recipe: Recipe, size: int) -> None:
    """Raise BadInput where a model has too few parameters for so many ranks."""
    parameters = by_path(model.trainable_parameters())
    _layout(Optimizers(recipe.groups, parameters), parameters, size)


def _layout(whole: Optimizers, parameters: Arrays, size: int) -> dict[str, list[Shard]]:
    rules = {path: group.optimizer for group in whole.groups for path in whole.paths[group.name]}
    layout = divided(parameters, {path for path, rule in rules.items() if rule.divides(parameters[path])}, size)
    if len({own.rank for shards in layout.values() for own in shards}) < size:
        raise BadInput(f"--shard optimizer: this model has no parameter for each of {size} ranks: start fewer ranks")
    return layout


def _n_snapshots(recipe: Recipe, parameters: Arrays) -> int:
    snapshots = recipe.average.start_snapshots(parameters) if recipe.average else {}
    return len(snapshots.get("newest_first", []))


def divided(parameters: Arrays, by_rows: set[str], size: int) -> dict[str, list[Shard]]:
    """Divide parameters among ranks so that the sums of their sizes are nearly equal.

    by_rows: paths of those that can be divided by rows; the others go whole to the rank that has least, largest first.
    """
    layout: dict[str, list[Shard]] = {}
    loads, left = [0] * size, []
    for path, value in parameters.items():
        if path not in by_rows or len(value) < size:
            left.append(path)
            continue
        ends = [rank * len(value) // size for rank in range(size + 1)]
        layout[path] = [Shard(rank, ends[rank], ends[rank + 1]) for rank in range(size)]
        loads = [load + (ends[rank + 1] - ends[rank]) * (value.size // len(value)) for rank, load in enumerate(loads)]
    for path in sorted(left, key=lambda path: -parameters[path].size):
        lightest = loads.index(min(loads))
        layout[path] = [Shard(lightest)]
        loads[lightest] += parameters[path].size
    return layout


def nbytes(tree: Any) -> int:
    """Return the bytes of the arrays of a tree."""
    return sum(value.nbytes for value in by_path({"tree": tree}).values())


def _rows(array: mx.array, own: Shard) -> mx.array:
    return array if own.end is None else array[own.start : own.end]


def _joined(parts: list[mx.array]) -> mx.array:
    """Copy the parts into one array: one that lies in a message would keep all of it in memory, and be unaligned."""
    return mx.concatenate(parts) if len(parts) > 1 else mx.contiguous(parts[0])
