"""Throughput of variants, measured interleaved; and parity: MLX's losses against the reference's, step by step."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare import stats
from bench.compare.runs import Run
from bench.compare.stats import Interval
from bench.compare.target import Throughput, as_json
from bench.compare.variants import Variant
from bench.workers import training_step
from bench.workers.interleave import interleave
from bench.workers.mlx_worker import make_recipe
from bench.workers.process import Worker, started
from bench.workers.training_step import BATCHES, Task
from mlx_transformer.nn.config import SIZES

PARITY_STEPS, PARITY_LEARNING_RATE, PARITY_SIZE = 200, 3e-4, "nano"
_LEARNING_RATE = 1e-6  # while steps are timed: it costs no time, and no loss diverges
_MOST_WORKERS, _MOST_BYTES = 6, 12e9  # at a time; what a machine of 16 GB has left for them
Say = Callable[[str], None]
Group = dict[str, dict[str, Any]]  # what was measured interleaved, by the variant's name


def grouped(
    by_variant: Sequence[Sequence[Run]], parameters: Mapping[str, int], bases: Collection[str]
) -> list[list[Run]]:
    """Choose which variants to measure interleaved. by_variant: each in MLX, then in the reference's backends.

    All of them if they fit. Otherwise the first, the baseline, is a group of its own if it has references, and every
    other group has the variants that others are compared with (`bases`, by name), one more variant, and as many further
    ones as fit. So whatever is compared was measured interleaved. parameters: by name.
    """
    shared = [run for runs in by_variant for run in runs if run.variant.name in bases]

    def fit(runs: Sequence[Run]) -> bool:
        size = sum(_bytes(run, parameters[run.variant.name]) for run in runs)
        return len(runs) <= _MOST_WORKERS and size <= _MOST_BYTES

    if fit(everything := [run for runs in by_variant for run in runs]):
        return [everything]
    baseline, *others = by_variant
    groups: list[list[Run]] = []
    for runs in others:
        more = [run for run in runs if run.variant.name not in bases]
        if not groups or not fit([*groups[-1], *more]):
            groups.append(list(shared))
        groups[-1] += more
    return groups if groups and len(baseline) == 1 else [list(baseline), *groups]


def _bytes(run: Run, parameters: int) -> float:
    """Estimate the memory of a training run, in float32.

    Four numbers per parameter: weight, gradient, two moments. Per token computed at a time some 36 activations as wide
    as the model in each layer, kept for the backward pass; in PyTorch also three as wide as the vocabulary (logits,
    their softmax, its gradient), which MLX's chunked loss never has whole.
    """
    config, recipe = run.plan.config, run.plan.recipe
    widths = 36 * config.n_layers * config.d_model + (0 if run.variant.backend == "mlx" else 3 * config.vocab_size)
    return 16 * parameters + 4 * run.step_tokens / recipe.accumulate * widths


def measure(runs: Sequence[Run], rounds: int, least: float, say: Say) -> Group:
    """Measure interleaved rounds of training steps, each of at least `least` seconds. Raises RunFailed."""
    tokens = {run.variant.name: run.step_tokens for run in runs}
    with tempfile.TemporaryDirectory() as folder, started(list(_workers(runs, Path(folder)))) as workers:
        seconds = {name: answers[-1]["seconds"] for name, answers in training_step.warm_up(workers, say).items()}
        steps = training_step.steps_per_round(seconds, tokens, least)
        requests = {name: {"steps": count} for name, count in steps.items()}
        return {
            name: {
                "step_tokens": tokens[name],
                "steps_per_round": steps[name],
                "seconds_per_step": [answer["seconds"] / steps[name] for answer in answers],
                "memory_bytes": max(answer.get("memory_bytes", answer["max_rss_bytes"]) for answer in answers),
                "facts": workers[name].describe(),
            }
            for name, answers in interleave(workers, rounds, requests, say).items()
        }


def _workers(runs: Sequence[Run], folder: Path) -> Iterator[Worker]:
    """Lay out a folder for each run, since they differ in model and batch."""
    for i, run in enumerate(runs):
        task, place = task_of(run), folder / f"task{i}"
        task = replace(task, recipe=replace(task.recipe, learning_rate=_LEARNING_RATE))
        tokens = np.array(run.plan.tokens.train[: BATCHES * task.step_tokens + 1])
        training_step.lay_out(task, run.plan.make_model(), tokens, BATCHES, place)
        yield _worker(run.variant, task, place)


def _worker(variant: Variant, task: Task, folder: Path) -> Worker:
    if variant.backend == "mlx":
        return training_step.mlx_training(variant.name, task, folder)
    return training_step.torch_training(variant.name, task, folder, compiled=variant.backend == "torch-compile")


def task_of(run: Run) -> Task:
    """Return the training step that a run repeats."""
    plan, variant = run.plan, run.variant
    return Task(
        phase=variant.phase,
        file=variant.file,
        branch=variant.branch,
        recipe_name=plan.settings.recipe,
        size=plan.size,
        config=plan.config,
        recipe=plan.recipe,
        device=plan.settings.device or "auto",
    )


def read(groups: Sequence[Group]) -> Throughput:
    """Return medians and ratios of what was measured."""

    def per_second(group: Group, name: str) -> np.ndarray:
        return group[name]["step_tokens"] / np.array(group[name]["seconds_per_step"])

    def ratio(a: str, b: str) -> Interval:
        group = next(group for group in groups if {a, b} <= group.keys())
        return stats.ratio_of_medians(per_second(group, a), per_second(group, b))

    medians = {name: stats.median(per_second(group, name)) for group in reversed(groups) for name in group}
    return Throughput(medians=medians, ratio=ratio)


def rows(groups: Sequence[Group], parameters: dict[str, int]) -> list[dict[str, Any]]:
    """Return `throughput` of compare.json."""
    medians = read(groups).medians
    measured = {name: values for group in reversed(groups) for name, values in group.items()}
    return [
        {
            "name": name,
            "tokens_per_second": as_json(medians[name], "median"),
            "rounds": len(measured[name]["seconds_per_step"]),
            "memory_bytes": measured[name]["memory_bytes"],
            "parameters": count,
        }
        for name, count in parameters.items()
        if name in medians
    ]


def speed(groups: Sequence[Group], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return `speed` of compare.json: for each pair (a, b) the throughput of a relative to b."""
    throughput, measured = read(groups), {name: values for group in groups for name, values in group.items()}
    ratios = []
    for a, b in pairs:
        if {a, b} <= measured.keys():
            interval, rounds = throughput.ratio(a, b), len(measured[a]["seconds_per_step"])
            ratio = as_json(interval, "ratio")
            ratios.append({"a": a, "b": b, **ratio, "rounds": rounds, "verdict": interval.verdict})
    return ratios


def parity(run: Run, say: Say) -> dict[str, Any]:
    """Return a row of compare.json: how far the losses of MLX and the reference differ, from equal weights and batches.

    The size is nano with the run's vocabulary and text, without dropout, at a peak learning rate of 3e-4.
    """
    variant, plan = run.variant, run.plan
    numbers: dict[str, Any] = {**SIZES[PARITY_SIZE], "vocab_size": plan.config.vocab_size, "dropout": 0.0}
    kind = plan.kind
    config = kind.Config(**numbers)
    name = plan.settings.recipe
    recipe = make_recipe(plan.experiment, PARITY_SIZE, None, config.seq_len, name, PARITY_LEARNING_RATE)
    task = replace(task_of(run), size=PARITY_SIZE, config=config, recipe=recipe)
    tokens = np.array(plan.tokens.train[: PARITY_STEPS * task.step_tokens + 1])
    say(f"{variant.name}: {PARITY_STEPS} steps in MLX and in PyTorch from the same weights")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        training_step.lay_out(task, kind(config), tokens, PARITY_STEPS, folder)
        both = [training_step.mlx_training("mlx", task, folder), training_step.torch_training("torch", task, folder)]
        with started(both) as workers:
            ours, theirs = (np.array(worker.ask(steps=PARITY_STEPS)["losses"]) for worker in workers.values())
    differences = np.abs(ours - theirs)
    return {
        "phase": variant.phase,
        "branch": variant.branch,
        "steps": PARITY_STEPS,
        "max_difference": float(differences.max()),
        "differences": differences.tolist(),
        "learning_rate": PARITY_LEARNING_RATE,
        "seed": 0,
    }
