"""Early stopping: rules as functions of the validation losses so far, so that they can be compared on one curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol


class StopRule(Protocol):
    """A rule for when to stop."""

    def __call__(self, losses: Sequence[float]) -> bool:
        """Whether to stop now; losses: validation losses so far (nats per token, at least one, oldest first)."""


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Stop after `patience` evaluations in a row that do not improve the best loss by `min_improvement` nats."""

    patience: int
    min_improvement: float

    def __call__(self, losses: Sequence[float]) -> bool:
        best, stale = losses[0], 0
        for loss in losses[1:]:
            stale = 0 if loss < best - self.min_improvement else stale + 1
            best = min(best, loss)
        return stale >= self.patience


@dataclass(frozen=True, kw_only=True)
class GeneralizationLoss:
    """Stop once the loss is `percent` above the lowest so far (Prechelt 1998, "Early Stopping - But When?", GL)."""

    percent: float

    def __call__(self, losses: Sequence[float]) -> bool:
        return 100 * (losses[-1] / min(losses) - 1) > self.percent


@dataclass(frozen=True, kw_only=True)
class SuccessiveRises:
    """Stop after `times` rises in a row (Prechelt 1998, UP, with strips of one evaluation)."""

    times: int

    def __call__(self, losses: Sequence[float]) -> bool:
        last = losses[-self.times - 1 :]
        return len(last) > self.times and all(later > earlier for earlier, later in pairwise(last))


@dataclass(frozen=True)
class NoStop:
    """Never stop; only limits and the schedule end the run."""

    def __call__(self, losses: Sequence[float]) -> bool:
        return False
