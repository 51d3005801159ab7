"""Rounds of several workers interleaved, A B A B, and the ratio of their throughputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.compare import stats
from bench.workers.process import WorkerProcess


def interleave(
    workers: Mapping[str, WorkerProcess],
    rounds: int,
    requests: Mapping[str, dict[str, Any]],
    say: Callable[[str], None],
) -> dict[str, list[dict[str, Any]]]:
    """In every round send each worker its request, one after the other; all answers by name."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for i in range(rounds):
        for name, worker in workers.items():
            answers[name].append(worker.ask(**requests[name]))
        seconds = ", ".join(f"{name} {latest['seconds']:.2f} s" for name, (*_, latest) in answers.items())
        say(f"round {i + 1} of {rounds}: {seconds}")
    return answers


@dataclass(frozen=True)
class Ratio:
    """How many times faster a is than b: median seconds b / a, and its 95 % interval (None: too few rounds)."""

    a: str
    b: str
    ratio: float
    low: float | None
    high: float | None
    rounds: int

    def __str__(self) -> str:
        few = f"no interval: {self.rounds} round{'s' if self.rounds > 1 else ''}"
        return f"{self.ratio:.2f}x ({few if self.low is None else f'{self.low:.2f}-{self.high:.2f}'})"


def speed_ratio(a: str, b: str, seconds: Mapping[str, list[float]]) -> Ratio:
    """Return how many times faster a is than b, from seconds by name, paired by round."""
    rounds = min(len(seconds[a]), len(seconds[b]))
    if rounds < stats.FEWEST_ROUNDS:
        return Ratio(a, b, float(np.median(seconds[b]) / np.median(seconds[a])), None, None, rounds)
    interval = stats.ratio_of_medians(np.array(seconds[b][:rounds]), np.array(seconds[a][:rounds]))
    return Ratio(a, b, interval.value, interval.low, interval.high, rounds)
