"""Time to a target loss, from the evaluations of finished runs, and who is how many times sooner (docs/COMPARE.md)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.compare import stats
from bench.compare.plan import Finished, Variant
from bench.compare.stats import Interval

Runs = Mapping[int, Finished]  # of one contender by seed, none of them missing


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Interleaved tokens per second: medians by name, and the ratio of two contenders'."""

    medians: Mapping[str, Interval]
    ratio: Callable[[str, str], Interval]


def crossing(evals: tuple[dict[str, Any], ...], target: float) -> tuple[float, float]:
    """Tokens and seconds at which the validation loss first meets the target; both inf if it never does.

    Linear between the evaluation that met it and the one before. A loss curve is convex, so this is a little late (by
    under a fortieth of the distance of two evaluations once five lie behind), and alike for all.
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
    """The lowest validation loss up to the step that uses up so many tokens; inf if there is no evaluation by then."""
    if finished.result is None or not finished.result["steps"]:
        return math.inf
    seq_len = finished.result["config"]["seq_len"]
    step = (
        max(1, finished.result["recipe"]["batch_tokens"] // seq_len) * seq_len
    )  # whole, whatever the batch began with
    return min((one["valid_loss"] for one in finished.evals if one["tokens"] < tokens + step), default=math.inf)


def best_losses(runs: Runs, tokens: float) -> list[float]:
    """The best loss within so many tokens of each seed that has one.

    A run that diverged or failed has no say: it would make any loss a target.
    """
    losses = [best_within(finished, tokens) for finished in runs.values() if finished.status == "done"]
    return [loss for loss in losses if math.isfinite(loss)]


def target_of(runs: Runs, tokens: float) -> float | None:
    """The highest of these losses, so that each of their seeds reaches it; None if there is none."""
    return max(best_losses(runs, tokens), default=None)


def needed(runs: Runs, target: float | None) -> np.ndarray:
    """Tokens and seconds to the target of each seed, in order: (2, seeds); inf for a run that diverged or failed."""
    aim = math.nan if target is None else target
    found = [crossing(own.evals, aim) if own.status == "done" else (math.inf,) * 2 for _, own in sorted(runs.items())]
    return np.array(found, float).reshape(-1, 2).T


def time_to_target(variant: Variant, runs: Runs, target: float | None, rates: Rates) -> dict[str, Any]:
    """A row of compare.json."""
    row = {"name": variant.name, "phase": variant.phase, "branch": variant.branch, "recipe": variant.recipe}
    row |= {"backend": variant.backend}
    tokens, seconds = needed(runs, target)
    rate = rates.medians.get(variant.name)
    spent = {"clock": stats.median(seconds), "tokens": stats.median(tokens)}
    return {
        **row,
        "reached": int(np.isfinite(tokens).sum()),
        "seeds": len(tokens),
        **{key: as_json(interval, "median") for key, interval in spent.items()},
        "tokens_over_rate": as_json(stats.product(spent["tokens"], rate.inverse), "median") if rate else None,
    }


def speedup(
    variant: Variant, runs: Runs, over: Variant, baseline: Runs, share: float, target: float, rates: Rates
) -> dict[str, Any]:
    """A row of compare.json: how many times sooner than the baseline, over the seeds that both have."""
    row = {"name": variant.name, "over": over.name, "share_of_budget": share, "target_loss": target}
    both = runs.keys() & baseline.keys()
    if not both:
        return row | {"clock": None, "tokens": None, "tokens_over_rate": None}
    mine, theirs = (needed({seed: own[seed] for seed in both}, target) for own in (runs, baseline))
    tokens, clock = (stats.ratio_of_medians(theirs[i], mine[i]) for i in range(2))
    measured = {variant.name, over.name} <= rates.medians.keys()
    combined = stats.product(tokens, rates.ratio(variant.name, over.name)) if measured else None
    found = {"clock": clock, "tokens": tokens, "tokens_over_rate": combined}
    return row | {key: one and {**as_json(one, "ratio"), "verdict": one.verdict} for key, one in found.items()}


def as_json(interval: Interval, name: str) -> dict[str, float | None]:
    """The estimate under a name, and its bounds; null where there is no bound, or none was reached."""
    values = {name: interval.value, "low": interval.low, "high": interval.high}
    return {key: value if value and math.isfinite(value) else None for key, value in values.items()}
