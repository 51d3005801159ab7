"""How long a run will take: as earlier runs of its kind took, else from this machine's matmul throughput."""

import contextlib
import functools
import json
from pathlib import Path

from bench.compare.runs import RUNS, Run, find_finished
from mlx_transformer.backend import matmul_gflops

_MATMUL_SHARE = 0.3  # of the matmul throughput, assumed of a training step before any was timed


def forecast(run: Run, parameters: int, cache: Path = RUNS) -> float:
    """Return the seconds that a run will take; 0 if it is finished."""
    if find_finished(run, cache).status != "missing":
        return 0.0
    plan, variant, budget = run.plan, run.variant, _expected_tokens(run)
    kind = (variant.phase, variant.branch, plan.size, variant.backend)
    if (known := _seconds_per_token(cache).get(kind)) is not None:
        return known * budget
    evaluated = budget / (run.evaluate_every * run.step_tokens) * len(plan.tokens.valid) / 3
    return 6 * parameters * (budget + evaluated) / (_MATMUL_SHARE * 1e9 * _matmul_gflops())


def _expected_tokens(run: Run) -> int:
    """Return the tokens that a run will train on: its budget, or up to the evaluation at which its recipe ends."""
    between, budget = run.evaluate_every * run.step_tokens, run.plan.limits.max_tokens or 0
    return next((at for at in range(between, budget, between) if run.plan.recipe.is_finished(at)), budget)


@functools.cache
def _seconds_per_token(cache: Path) -> dict[tuple[int | None, str | None, str, str], float]:
    """Return seconds per token of the finished runs in the cache, by kind."""
    times = {}
    for path in cache.glob("*/result.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, ZeroDivisionError):
            result = json.loads(path.read_text(encoding="utf-8"))
            kind = (result["phase"], result["branch"], result["size"], result.get("backend", "mlx"))
            times[kind] = (result["train_seconds"] + result["eval_seconds"]) / result["tokens"]
    return times


@functools.cache
def _matmul_gflops() -> float:
    return matmul_gflops(seconds=0.5)
