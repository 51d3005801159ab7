"""Forecast of a run's duration: from earlier runs of its kind, else a range from this machine's matmul throughput."""

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from bench.compare.runs import RUNS, Run, find_finished
from mlx_transformer.backend import matmul_gflops

_MATMUL_SHARES = (0.8, 0.3)  # of the matmul throughput: training steps from nano to small, phases 1 to 6, reach 0.4-0.7


def forecast(run: Run, parameters: int, cache: Path = RUNS) -> tuple[float, float]:
    """Return the least and the most seconds that a run will take; 0 if it is finished."""
    if find_finished(run, cache).status != "missing":
        return 0.0, 0.0
    plan, variant, budget = run.plan, run.variant, _expected_tokens(run)
    kind = (variant.phase, variant.file and variant.file.name, variant.branch, plan.size, variant.backend)
    if (known := _times(cache).get(kind)) is not None:
        return (known[0] * budget + known[1],) * 2
    evaluated = budget / (run.evaluate_every * run.step_tokens) * len(plan.tokens.valid) / 3
    seconds = 6 * parameters * (budget + evaluated) / (1e9 * _matmul_gflops())
    fast, slow = _MATMUL_SHARES
    return seconds / fast, seconds / slow


def remaining(
    runs: Sequence[Run], timed: Mapping[str, Sequence[float]], parameters: Mapping[str, int], cache: Path = RUNS
) -> tuple[float, float]:
    """Return the least and the most seconds that runs will take.

    timed: seconds of the runs made so far, by variant; the others are forecast. parameters: by variant.
    """
    names = [run.variant.name for run in runs]
    ranges = [
        (fmean(timed[name]),) * 2 if name in timed else forecast(run, parameters[name], cache)
        for name, run in zip(names, runs, strict=True)
    ]
    return added(*ranges)


def added(*ranges: tuple[float, float]) -> tuple[float, float]:
    """Return the sum of ranges."""
    return sum(low for low, _ in ranges), sum(high for _, high in ranges)


def describe_range(low: float, high: float) -> str:
    """Format seconds: "50 s", "3 min to 10 min"."""
    low_text, high_text = _duration(low), _duration(high)
    return low_text if low_text == high_text else f"{low_text} to {high_text}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _expected_tokens(run: Run) -> int:
    """Return the tokens that a run will train on: its budget, or up to the evaluation at which its recipe ends."""
    between, budget = run.evaluate_every * run.step_tokens, run.plan.limits.max_tokens or 0
    return next((at for at in range(between, budget, between) if run.plan.recipe.is_finished(at)), budget)


@functools.cache
def _times(cache: Path) -> dict[tuple[object, ...], tuple[float, float]]:
    """Return seconds per token and seconds of compilation of the finished runs in the cache, by kind."""
    times: dict[tuple[object, ...], tuple[float, float]] = {}
    for path in cache.glob("*/result.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, ZeroDivisionError):
            result = json.loads(path.read_text(encoding="utf-8"))
            file, backend = (result.get("code") or {}).get("file"), result.get("backend", "mlx")
            kind = (result["phase"], file, result["branch"], result["size"], backend)
            per_token = (result["train_seconds"] + result["eval_seconds"]) / result["tokens"]
            times[kind] = per_token, result["compile_seconds"]
    return times


@functools.cache
def _matmul_gflops() -> float:
    return matmul_gflops(seconds=0.5)
