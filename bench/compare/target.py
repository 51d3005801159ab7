"""Time to a target loss, from the evaluations of finished runs, and speedups over the baseline (docs/COMPARE.md)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.compare import stats
from bench.compare.runs import Finished
from bench.compare.stats import Interval
from bench.compare.variants import Variant

Runs = Mapping[int, Finished]  # of one variant, by seed; none of them is missing


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Interleaved tokens per second: medians by name, and the ratio of two variants'."""

    medians: Mapping[str, Interval]
    ratio: Callable[[str, str], Interval]


def crossing(evals: tuple[dict[str, Any], ...], target: float) -> tuple[float, float]:
    """Return tokens and seconds at which the validation loss first reaches the target; both inf if it never does.

    Interpolates linearly from the previous evaluation. A loss curve is convex, so the result is a little late (by under
    a fortieth of the distance of two evaluations after the fifth), and alike for all variants.
    """
    before = None
    for now in evals:
        if now["valid_loss"] <= target:
            if before is None:
                return now["tokens"], now["seconds"]
            share = (before["valid_loss"] - target) / (before["valid_loss"] - now["valid_loss"])
            tokens, seconds = (before[key] + share * (now[key] - before[key]) for key in ("tokens", "seconds"))
            return tokens, seconds
        before = now
    return math.inf, math.inf


def best_within(finished: Finished, tokens: float) -> float:
    """Return the lowest validation loss up to the step that completes so many tokens; inf without an evaluation."""
    if finished.result is None or not finished.result["steps"]:
        return math.inf
    seq_len = finished.result["config"]["seq_len"]
    step = max(1, finished.result["recipe"]["batch_tokens"] // seq_len) * seq_len  # after any batch warm-up
    return min((one["valid_loss"] for one in finished.evals if one["tokens"] < tokens + step), default=math.inf)


def best_losses(runs: Runs, tokens: float) -> list[float]:
    """Return each seed's best loss within so many tokens.

    Runs that diverged or failed are left out: with them any loss would be a target.
    """
    losses = [best_within(finished, tokens) for finished in runs.values() if finished.status == "done"]
    return [loss for loss in losses if math.isfinite(loss)]


def target_of(runs: Runs, tokens: float) -> float | None:
    """Return the highest of these losses, which each of their seeds reaches; None if there is none."""
    return max(best_losses(runs, tokens), default=None)


def needed(runs: Runs, target: float | None) -> np.ndarray:
    """Return tokens and seconds to the target by seed: (2, seeds); inf for a run that diverged or failed."""
    aim = math.nan if target is None else target
    both = [crossing(run.evals, aim) if run.status == "done" else (math.inf,) * 2 for _, run in sorted(runs.items())]
    return np.array(both, float).reshape(-1, 2).T


def _with_preparation(tokens: np.ndarray, runs: Runs, throughput: float) -> np.ndarray:
    """Add the tokens that training makes in the time that a run prepares in, before its first step."""
    seconds = [(run.result or {}).get("preparation_seconds", 0.0) for _, run in sorted(runs.items())]
    return tokens + np.array(seconds) * throughput


def time_to_target(variant: Variant, runs: Runs, target: float | None, throughput: Throughput) -> dict[str, Any]:
    """Return a row of `time_to_target` of compare.json."""
    tokens, seconds = needed(runs, target)
    median = throughput.medians.get(variant.name)
    spent = {"clock": stats.median(seconds), "tokens": stats.median(tokens)}
    combined = None
    if median is not None:
        combined = stats.product(stats.median(_with_preparation(tokens, runs, median.value)), median.inverse)
    return {
        **variant.describe(),
        "reached": int(np.isfinite(tokens).sum()),
        "seeds": len(tokens),
        **{key: as_json(interval, "median") for key, interval in spent.items()},
        "tokens_over_throughput": combined and as_json(combined, "median"),
    }


def speedup(
    variant: Variant,
    runs: Runs,
    over: Variant,
    baseline: Runs,
    share: float,
    target: float,
    throughput: Throughput,
) -> dict[str, Any]:
    """Return a row of `speedups` of compare.json: how much faster than the baseline, over the seeds that both have.

    A run that failed counts as one that never reaches the target, but if all of a variant failed nothing is known.
    """
    row = {"name": variant.name, "over": over.name, "share_of_budget": share, "target_loss": target}
    both = runs.keys() & baseline.keys()
    if not both or any(all(run.status == "failed" for run in of.values()) for of in (runs, baseline)):
        return row | {"clock": None, "tokens": None, "tokens_over_throughput": None}
    paired = [{seed: of[seed] for seed in both} for of in (runs, baseline)]
    mine, theirs = (needed(of, target) for of in paired)
    tokens, clock = (stats.ratio_of_medians(theirs[i], mine[i]) for i in range(2))
    combined = None
    if {variant.name, over.name} <= throughput.medians.keys():
        own, others = (
            _with_preparation(each[0], of, throughput.medians[one.name].value)
            for each, of, one in zip((mine, theirs), paired, (variant, over), strict=True)
        )
        combined = stats.product(stats.ratio_of_medians(others, own), throughput.ratio(variant.name, over.name))
    ratios = {"clock": clock, "tokens": tokens, "tokens_over_throughput": combined}
    return row | {key: one and {**as_json(one, "ratio"), "verdict": one.verdict} for key, one in ratios.items()}


def as_json(interval: Interval, name: str) -> dict[str, float | None]:
    """Return the estimate under a name, and its bounds; None where there is no bound, or none was reached."""
    values = {name: interval.value, "low": interval.low, "high": interval.high}
    return {key: value if value and math.isfinite(value) else None for key, value in values.items()}
