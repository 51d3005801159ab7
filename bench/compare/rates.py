"""Tokens per second of contenders, measured interleaved; and parity, ours against the reference step by step."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare import stats
from bench.compare.plan import DEFAULT, Run, Variant
from bench.compare.stats import Interval
from bench.compare.target import Rates, as_json
from bench.workers import training_step
from bench.workers.interleave import interleave
from bench.workers.mlx_worker import make_recipe
from bench.workers.process import Worker, started
from bench.workers.training_step import BATCHES, Task
from mlx_transformer.nn.config import SIZES
from mlx_transformer.run.ladder import find_branch, find_phase

PARITY_STEPS, PARITY_RATE, PARITY_SIZE = 200, 3e-4, "nano"
_RATE = 1e-6  # the learning rate while steps are timed: none takes longer or shorter by it, and none diverges
_TOGETHER, _MEMORY = 6, 12e9  # contestants at a time, and their bytes: what a machine of 16 GB has left for them
Say = Callable[[str], None]
Group = dict[str, dict[str, Any]]  # contenders measured in one go, by name


def grouped(
    families: Sequence[Sequence[Run]], parameters: Mapping[str, int], bases: Collection[str]
) -> list[list[Run]]:
    """Which contenders to measure in one go, from families: a contender by each of its backends. parameters: by name.

    All of them where there is room. Else the first family, the baseline's, is a group of its own if it has references,
    and in every other group stand those that others are compared with (`bases`, by name), a family, and as many more as
    there is room for. So whatever is compared was measured in turn.
    """
    shared = [run for family in families for run in family if run.variant.name in bases]

    def fit(runs: Sequence[Run]) -> bool:
        return len(runs) <= _TOGETHER and sum(_bytes(run, parameters[run.variant.name]) for run in runs) <= _MEMORY

    if fit(everything := [run for family in families for run in family]):
        return [everything]
    baseline, *others = families
    groups: list[list[Run]] = []
    for family in others:
        more = [run for run in family if run.variant.name not in bases]
        if not groups or not fit([*groups[-1], *more]):
            groups.append(list(shared))
        groups[-1] += more
    return groups if groups and len(baseline) == 1 else [list(baseline), *groups]


def _bytes(run: Run, parameters: int) -> float:
    """Roughly the memory of a training run, in float32.

    Four numbers of each parameter: weight, gradient, two moments. Of each token that is computed at a time some 36
    activations as wide as the model in each layer, kept for the backward pass; with a reference also three as wide as
    the vocabulary (logits, what the loss makes of them, their gradient), which ours never has whole.
    """
    config, recipe = run.plan.config, run.plan.recipe
    widths = 36 * config.n_layers * config.d_model + (0 if run.variant.backend == "mlx" else 3 * config.vocab_size)
    return 16 * parameters + 4 * run.step_tokens / recipe.accumulate * widths


def measure(runs: Sequence[Run], count: int, least: float, say: Say) -> Group:
    """Rounds of training steps in turn, `least` seconds or more each. Raises RunFailed if a contestant dies."""
    tokens = {run.variant.name: run.step_tokens for run in runs}
    with (
        tempfile.TemporaryDirectory() as folder,
        started(list(_workers(runs, Path(folder)))) as children,
    ):
        step = {name: own[-1]["seconds"] for name, own in training_step.warm_up(children, say).items()}
        steps = training_step.steps_per_round(step, tokens, least)
        requests = {name: {"steps": own} for name, own in steps.items()}
        answers = interleave(children, count, requests, say)
        return {
            name: {
                "step_tokens": tokens[name],
                "steps_per_round": steps[name],
                "seconds_per_step": [answer["seconds"] / steps[name] for answer in own],
                "memory_bytes": max(answer.get("memory_bytes", answer["max_rss_bytes"]) for answer in own),
                "facts": children[name].describe(),
            }
            for name, own in answers.items()
        }


def _workers(runs: Sequence[Run], folder: Path) -> Iterator[Worker]:
    """A folder for each of them: they differ in model and batch."""
    for i, run in enumerate(runs):
        own, plan, task = folder / f"task{i}", run.plan, task_of(run)
        task = replace(task, recipe=replace(task.recipe, learning_rate=_RATE))
        pieces = np.array(plan.tokens.train[: BATCHES * task.step_tokens + 1])
        training_step.lay_out(task, plan.make_model(), pieces, BATCHES, own)
        yield _worker(run.variant, task, own)


def _worker(variant: Variant, task: Task, folder: Path) -> Worker:
    if variant.backend == "mlx":
        return training_step.mlx_training(variant.name, task, folder)
    return training_step.torch_training(variant.name, task, folder, compiled=variant.backend == "torch-compile")


def task_of(run: Run) -> Task:
    """The step that a run repeats."""
    plan, variant = run.plan, run.variant
    return Task(
        phase=variant.phase,
        branch=variant.branch,
        recipe_name=_recipe_name(variant),
        size=plan.size,
        config=plan.config,
        recipe=plan.recipe,
        device=plan.settings.device or "auto",
    )


def _recipe_name(variant: Variant) -> str | None:
    return None if variant.recipe == DEFAULT else variant.recipe


def read(groups: Sequence[Group]) -> Rates:
    """What was measured, as time to target needs it."""

    def per_second(group: Group, name: str) -> np.ndarray:
        return group[name]["step_tokens"] / np.array(group[name]["seconds_per_step"])

    def ratio(a: str, b: str) -> Interval:
        group = next(group for group in groups if {a, b} <= group.keys())
        return stats.ratio_of_medians(per_second(group, a), per_second(group, b))

    medians = {name: stats.median(per_second(group, name)) for group in reversed(groups) for name in group}
    return Rates(medians=medians, ratio=ratio)


def rows(groups: Sequence[Group], parameters: dict[str, int]) -> list[dict[str, Any]]:
    """`rates` of compare.json."""
    medians, seen = read(groups).medians, {name: own for group in reversed(groups) for name, own in group.items()}
    return [
        {
            "name": name,
            "tokens_per_second": as_json(medians[name], "median"),
            "rounds": len(seen[name]["seconds_per_step"]),
            "memory_bytes": seen[name]["memory_bytes"],
            "parameters": count,
        }
        for name, count in parameters.items()
        if name in medians
    ]


def speed(groups: Sequence[Group], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """`speed` of compare.json: for each pair how many times the tokens per second of b a makes."""
    rates, measured = read(groups), {name: own for group in groups for name, own in group.items()}
    found = []
    for a, b in pairs:
        if {a, b} <= measured.keys():
            interval, count = rates.ratio(a, b), len(measured[a]["seconds_per_step"])
            row = {"a": a, "b": b, **as_json(interval, "ratio"), "rounds": count, "verdict": interval.verdict}
            found.append(row)
    return found


def parity(run: Run, say: Say) -> dict[str, Any]:
    """A row of compare.json: how far the losses of ours and the reference part, from equal weights and batches.

    Nano numbers with the run's own vocabulary and text, no dropout, the recipe at a peak rate of 3e-4.
    """
    variant, plan = run.variant, run.plan
    numbers: dict[str, Any] = {**SIZES[PARITY_SIZE], "vocab_size": plan.config.vocab_size, "dropout": 0.0}
    kind = find_branch(find_phase(variant.phase), variant.branch)
    config = kind.Config(**numbers)
    recipe = make_recipe(variant.phase, PARITY_SIZE, None, config.seq_len, _recipe_name(variant), PARITY_RATE)
    task = replace(task_of(run), size=PARITY_SIZE, config=config, recipe=recipe)
    pieces = np.array(plan.tokens.train[: PARITY_STEPS * task.step_tokens + 1])
    say(f"{variant.name}: {PARITY_STEPS} steps of ours and of the reference from the same weights")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training_step.lay_out(task, kind(config), pieces, PARITY_STEPS, folder)
        sides = [training_step.mlx_training("ours", task, folder), training_step.torch_training("theirs", task, folder)]
        with started(sides) as children:
            ours, theirs = (np.array(child.ask(steps=PARITY_STEPS)["losses"]) for child in children.values())
    apart = np.abs(ours - theirs)
    return {
        "phase": variant.phase,
        "branch": variant.branch,
        "steps": PARITY_STEPS,
        "max_difference": float(apart.max()),
        "differences": apart.tolist(),
        "learning_rate": PARITY_RATE,
        "seed": 0,
    }
