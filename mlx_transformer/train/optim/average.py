"""Averages of the weights over the steps, which are evaluated and kept; training continues from the weights."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_transformer.utils.errors import BadInput

Arrays = dict[str, mx.array]  # by path


class Average(ABC):
    """An average of the weights: what a recipe has in its slot `average`.

    One that changes at each step does so inside the compiled step (`start`, `after`). One of few steps keeps their
    weights outside of it (`start_snapshots`, `taken`), so that the steps in between cost nothing.
    """

    @abstractmethod
    def check(self) -> None:
        """Raise BadInput for a number out of its range."""

    @abstractmethod
    def horizon(self) -> int:
        """Return the tokens over which the average reaches back."""

    @abstractmethod
    def n_copies(self) -> int:
        """Return the copies of the weights, of 4 bytes a parameter, that are kept in memory and in a checkpoint."""

    @abstractmethod
    def share(self, step_tokens: int, tokens: int) -> float:
        """Return the share of the new weights in the average, after a step of step_tokens that ended at `tokens`."""

    def start(self, weights: Arrays) -> Arrays:
        """Return the average before the first step; {} if it is made of snapshots."""
        return {}

    def after(self, average: Arrays, weights: Arrays, share: mx.array) -> Arrays:
        """Return the entries of the average that change with the new weights of some paths."""
        return {}

    def start_snapshots(self, weights: Arrays) -> dict[str, Any]:
        """Return the tree of snapshots before the first; {} if the average needs none."""
        return {}

    def taken(self, snapshots: dict[str, Any], weights: Arrays) -> dict[str, Any]:
        """Return the snapshots after one more, of these weights."""
        return snapshots

    @abstractmethod
    def value(self, average: Arrays, snapshots: dict[str, Any]) -> Arrays:
        """Return the averaged weights by path; {} before there are any."""


@dataclass(frozen=True, kw_only=True)
class EMA(Average):
    """An exponential moving average (Polyak & Juditsky 1992; in this form Szegedy et al. 2016, sec. 8).

    average += share * (weights - average), share = step_tokens / window. The window is the last tenth of the run so
    far, which leaves out the poor early weights, but at most horizon_tokens.
    """

    horizon_tokens: Any  # int, or a BySize

    def check(self) -> None:
        if self.horizon_tokens < 1:
            raise BadInput(f"horizon_tokens = {self.horizon_tokens}: expected a number of tokens of at least 1")

    def horizon(self) -> int:
        return self.horizon_tokens

    def n_copies(self) -> int:
        return 1

    def share(self, step_tokens: int, tokens: int) -> float:
        return min(1.0, step_tokens / min(self.horizon_tokens, tokens / 10))

    def start(self, weights: Arrays) -> Arrays:
        return dict(weights)

    def after(self, average: Arrays, weights: Arrays, share: mx.array) -> Arrays:
        return {path: average[path] + share * (weight - average[path]) for path, weight in weights.items()}

    def value(self, average: Arrays, snapshots: dict[str, Any]) -> Arrays:
        return average


@dataclass(frozen=True, kw_only=True)
class CheckpointAverage(Average):
    """The mean of the last snapshots of the weights (Vaswani et al. 2017, sec. 6.1: 5 for base, 20 for big).

    A snapshot is taken after the step in which the tokens pass a multiple of every_tokens; until there are `last`, the
    mean is over those taken, and before the first there is no average. A step in between costs nothing.

    Differs from the paper: the interval is a number of tokens instead of ten minutes, and the snapshots are in memory
    (`last` copies of the weights) and in each checkpoint, so that a resumed run has the same average.
    """

    last: Any = 5  # int, or a BySize
    every_tokens: Any

    def check(self) -> None:
        if self.last < 1:
            raise BadInput(f"last = {self.last}: expected a number of snapshots of at least 1")
        if self.every_tokens < 1:
            raise BadInput(f"every_tokens = {self.every_tokens}: expected a number of tokens of at least 1")

    def horizon(self) -> int:
        return self.last * self.every_tokens

    def n_copies(self) -> int:
        return self.last

    def share(self, step_tokens: int, tokens: int) -> float:
        """Return 1 if the step takes a snapshot, else 0."""
        return float(tokens // self.every_tokens > (tokens - step_tokens) // self.every_tokens)

    def start_snapshots(self, weights: Arrays) -> dict[str, Any]:
        return {"count": mx.array(0), "newest_first": [dict(weights) for _ in range(self.last)]}

    def taken(self, snapshots: dict[str, Any], weights: Arrays) -> dict[str, Any]:
        count = min(self.last, snapshots["count"].item() + 1)
        return {"count": mx.array(count), "newest_first": [dict(weights), *snapshots["newest_first"][:-1]]}

    def value(self, average: Arrays, snapshots: dict[str, Any]) -> Arrays:
        newest, *older = snapshots["newest_first"][: snapshots["count"].item()] or [{}]
        return {path: sum((one[path] for one in older), own) / (1 + len(older)) for path, own in newest.items()}
