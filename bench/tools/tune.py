"""Tune a phase's learning rates, with one search and as many trials for every phase.

`python -m bench tune --phase 2 --size small --data stories.txt` tunes three numbers of the recipe: the peak learning
rate, and the factors by which the groups `embedding` and `head` multiply it. The search (Hooke & Jeeves 1961, compass
search) begins at the recipe's own values and looks at both neighbors of the best so far along each number, a factor of
two apart for the peak and of three for the multipliers, until TRIALS values were tried. Where all six neighbors of the
best are known before that, the factors shrink to their square roots. A trial is trained over the whole schedule, two
seeds each; the criterion is the median over the seeds of the best validation loss, and a diverged run counts as
infinite. Finished runs are reused, so the same command resumes. It writes a JSON log; the result is entered into the
phase's RECIPE by hand.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from bench import logfile
from bench.compare.runs import RUNS, Finished, Run, execute
from bench.compare.variants import DEFAULT, Variant, write_recipe
from bench.options import BUDGETS, Say, TrainFlags, resumable
from bench.workers.machine import describe_machine
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.run.flags import Extent, File, Text, WholeNumber, parse
from mlx_transformer.run.settings import Settings
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.terminal import Terminal

TRIALS = 20
SEEDS = 2
FACTORS = (2.0, 3.0, 3.0)  # between neighbors: peak learning rate, multipliers of embedding and head
GROUPS = {"embedding": ("embedding", "embeddings"), "head": ("head",)}  # number -> names of its optimizer group
NAMES = ("learning_rate", *GROUPS)
_PARTS = 8  # of a factor, so that places are whole numbers
_STEPS = (8, 4, 2, 1)  # parts between neighbors, from a whole factor on: the factors shrink three times


@dataclass
class Flags(TrainFlags):
    """Tune the learning rates of a phase, with the same search and number of trials for every phase."""

    phase: WholeNumber = None
    """phase of the ladder (default: 1)"""
    branch: Text = None
    """branch of the phase"""
    recipe: Text = None
    """one of the phase's recipes"""
    batch_size: Extent = None
    """sequences of a step (default: the recipe's)"""
    seeds: WholeNumber = None
    """runs of each trial (default: 2)"""
    trials: WholeNumber = None
    """values to try, at least 7 (default: 20)"""
    max_tokens: WholeNumber = None
    """tokens of each run (default: the whole schedule; where it has no end 2M at nano, 5M at small, 20M at base)"""
    out: File = None
    """the JSON log (default: results/bench/tune_phase<n>_<size>.json)"""


class Point(NamedTuple):
    """A place on the grid: how many eighths of a factor each number is away from the recipe's own value."""

    learning_rate: int = 0
    embedding: int = 0
    head: int = 0


@dataclass
class Trial:
    """The numbers at a place, with their runs so far, one per seed, each with its fingerprint."""

    values: dict[str, float]
    runs: list[tuple[str, Finished]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The best validation loss of each seed, nats per token; inf where it diverged."""
        return [_loss(finished) for _, finished in self.runs]

    @property
    def median(self) -> float:
        """The median of the losses."""
        return float(np.median(self.losses))

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as the log records it; inf becomes null there."""
        return {**self.values, "losses": self.losses, "median": self.median}


Trials = dict[Point, Trial]


def _loss(finished: Finished) -> float:
    assert finished.result is not None
    return finished.result["best_valid_loss"] if finished.status == "done" else math.inf


def best_of(trials: Mapping[Point, Trial]) -> Point:
    """Return the place of the lowest median; of equal ones that of the lowest numbers."""
    return min(trials, key=lambda point: (trials[point].median, point))


def neighbors(point: Point, step: int) -> list[Point]:
    """Return the places `step` eighths of a factor away along each number: up, then down."""
    return [point._replace(**{name: getattr(point, name) + sign * step}) for name in NAMES for sign in (1, -1)]


def is_settled(trials: Mapping[Point, Trial]) -> bool:
    """Whether the best is at no edge: of each number a higher and a lower value were tried."""
    columns = zip(best_of(trials), zip(*trials, strict=True), strict=True)
    return all(min(tried) < best < max(tried) for best, tried in columns)


def search(count: int, measure: Callable[[Point], Trial], save: Callable[[Trials], None]) -> Trials:
    """Measure `count` places; returns the trials in the order in which they were made."""
    trials: Trials = {}

    def try_at(point: Point) -> None:
        trials[point] = measure(point)
        save(trials)

    try_at(Point())
    for step in _STEPS:
        while len(trials) < count and (unknown := [p for p in neighbors(best_of(trials), step) if p not in trials]):
            try_at(unknown[0])
    return trials


def values_at(point: Point, own: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers at a place, rounded to three digits as one would write them into a recipe."""
    moved = zip(NAMES, point, FACTORS, strict=True)
    return {name: float(f"{own[name] * factor ** (eighths / _PARTS):.3g}") for name, eighths, factor in moved}


def own_values(recipe: Recipe) -> dict[str, float]:
    """Return the recipe's own numbers. Raises BadInput where it has no such group."""
    values = {"learning_rate": recipe.learning_rate}
    for name, groups in GROUPS.items():
        found = [group.lr_multiplier for group in recipe.groups if group.name in groups]
        if len(found) != 1:
            raise BadInput(f"the recipe has no optimizer group named {groups[0]}, whose learning rate is to be tuned")
        values[name] = found[0]
    return values


def verdict(trials: Mapping[Point, Trial]) -> list[str]:
    """State the best numbers, whether the search settled, and how far each neighbor is behind."""
    best = best_of(trials)
    one = trials[best]
    if math.isinf(one.median):
        return [f"every one of {len(trials)} trials diverged: there is no best"]
    numbers = ", ".join(f"{name} {value:g}" for name, value in one.values.items())
    sentences = [f"best: {numbers} (validation loss {one.median:.4f})"]
    if not is_settled(trials):
        sentences.append(f"not settled after {len(trials)} trials: it is at an edge; give more --trials")
    near = [(NAMES[i // 2], point) for step in _STEPS for i, point in enumerate(neighbors(best, step))]
    known = [(name, trials[point]) for name, point in near if point in trials]
    return sentences + [f"{name} {other.values[name]:g} {behind(one, other)}" for name, other in known]


def behind(best: Trial, other: Trial) -> str:
    """State how far a neighbor is behind the best trial, and with how many paired seeds (sign test).

    Counted, since with two seeds one outlier makes the standard error so large that no trials differ.
    """
    if math.isinf(other.median):
        return "diverged"
    text, count = f"is {other.median - best.median:.4f} behind", len(best.losses)
    if count == 1:
        return f"{text}; one seed cannot tell this from noise"
    worse = sum(theirs > own for own, theirs in zip(best.losses, other.losses, strict=True))
    if worse == count:
        return f"{text}, with every seed: by chance once in {2**count}"
    return f"{text}, with {worse} of {count} seeds: within seed noise"


def show(log: Mapping[str, Any]) -> Table:
    """Return a table for people, one row per trial, the best first."""
    name = Variant(phase=log["phase"], branch=log["branch"], recipe=log["recipe"]).name
    title = f"{name}, {log['size']}, {log['corpus']['name']}, {log['budget_tokens']:,} tokens"
    heads = (*(name.replace("_", " ") for name in NAMES), *(f"seed {seed}" for seed in log["seeds"]), "median")
    table = Table(*heads, title=title, caption="best validation loss, nats per token; multipliers of the learning rate")
    for i, one in enumerate(sorted(log["trials"], key=lambda one: one["median"])):
        losses = ("diverged" if math.isinf(loss) else f"{loss:.4f}" for loss in (*one["losses"], one["median"]))
        table.add_row(*(f"{one[name]:g}" for name in NAMES), *losses, style="" if i else "bold")
    return table


@dataclass(frozen=True, kw_only=True)
class Task:
    """A phase to tune: all runs are those of `flags` except for the tuned numbers and the seed."""

    variant: Variant
    flags: Settings
    own: Run  # with the recipe's own numbers
    seeds: list[int]

    @classmethod
    def read(cls, flags: Flags, say: Say) -> "Task":
        """Read the flags. Raises BadInput for what cannot be trained."""
        size = flags.choose()
        variant = Variant(phase=flags.phase or 1, branch=flags.branch, recipe=flags.recipe or DEFAULT)
        recipe = variant.experiment.find_recipe(variant.recipe_name)[0].at(size)
        own_values(recipe)
        budget = flags.max_tokens or getattr(recipe.schedule, "total_tokens", BUDGETS[size])
        train = flags.settings(size, max_tokens=budget, batch_size=flags.batch_size)
        return cls(
            variant=variant, flags=train, own=Run.of(variant, train, say), seeds=list(range(flags.seeds or SEEDS))
        )

    def values(self, point: Point) -> dict[str, float]:
        """Return the numbers at a place."""
        return values_at(point, own_values(self.own.plan.recipe))

    def runs(self, values: Mapping[str, float]) -> list[Run]:
        """Return one run per seed."""
        known = {group.name for group in self.own.plan.recipe.groups}
        multipliers = {group: values[name] for name, groups in GROUPS.items() for group in groups if group in known}
        changed = f"groups=recipe.with_rates(recipe.learning_rate, **{multipliers}).groups"
        name = "_".join(f"{values[name]:g}" for name in GROUPS)
        settings = replace(self.flags, learning_rate=values["learning_rate"])
        run = Run.of(replace(self.variant, recipe=write_recipe(self.variant, changed, f"multipliers_{name}")), settings)
        return [run.with_settings(seed=seed) for seed in self.seeds]

    def describe(self) -> dict[str, Any]:
        """Return what two logs of the same task have in common."""
        plan = self.own.plan
        return {
            "phase": self.variant.phase,
            "branch": self.variant.branch,
            "recipe": self.variant.recipe,
            "size": plan.size,
            "corpus": {"name": plan.corpus.name, "sha256": plan.corpus.sha256},
            "batch_tokens": plan.recipe.batch_tokens,
            "budget_tokens": plan.limits.max_tokens,
            "seeds": self.seeds,
            "own": own_values(plan.recipe),
        }


def measure(task: Task, point: Point, say: Say) -> Trial:
    """Train, or find, the runs at a place. Raises RunFailed for one that ends without a result."""
    trial = Trial(task.values(point))
    numbers = ", ".join(f"{name} {value:g}" for name, value in trial.values.items())
    for run, seed in zip(task.runs(trial.values), task.seeds, strict=True):
        finished = execute(run, say=say)
        if finished.status == "failed":
            raise RunFailed(f"{numbers}, seed {seed}: {finished.error}")
        trial.runs.append((run.fingerprint, finished))
        loss = trial.losses[-1]
        say(f"{numbers}, seed {seed}: {'diverged' if math.isinf(loss) else f'{loss:.4f}'}")
    return trial


def record(task: Task, trials: Trials, complete: bool) -> dict[str, Any]:
    """Return the log: every trial, and every run with its evaluations."""
    names = ("seed", "stopped", "best_valid_loss", "tokens", "train_seconds", "versions")
    runs = [
        {
            **one.values,
            "fingerprint": fingerprint,
            "status": finished.status,
            **{name: finished.result[name] for name in names},
            "evals": finished.evals,
        }
        for one in trials.values()
        for fingerprint, finished in one.runs
        if finished.result is not None
    ]
    best = trials[best_of(trials)]
    return {
        "schema_version": 3,
        "measures": "tune",
        "complete": complete,
        "machine": describe_machine(),
        **task.describe(),
        "best": None if math.isinf(best.median) else best.values,
        "settled": is_settled(trials),
        "verdict": verdict(trials),
        "trials": [one.to_dict() for one in trials.values()],
        "runs": runs,
    }


def check_log(path: Path, task: Task) -> None:
    """Raise BadInput if a file is there that is no log of this task, or where none can be written."""
    if not logfile.exists(path):
        logfile.check_out(path)
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differs = [name for name, value in task.describe().items() if theirs[name] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--out {path} is not a log of this command: give another name") from error
    if differs:
        raise BadInput(f"--out {path} holds a log with another {differs[0]}: give another name")


def main(prog: str = "python -m bench tune", args: list[str] | None = None) -> None:
    """Run the command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, prog, args=args)
    terminal = Terminal(width=120)
    task = Task.read(flags, terminal.say)
    count = flags.trials or TRIALS
    if count < 2 * len(NAMES) + 1:
        raise BadInput(f"--trials {count}: expected at least {2 * len(NAMES) + 1}, a place and its neighbors")
    name = "_".join(filter(None, (f"phase{flags.phase or 1}", flags.branch, flags.recipe, task.own.plan.size)))
    out = flags.out or RUNS.parent / f"tune_{name}.json"
    check_log(out, task)

    def save(trials: Trials) -> None:
        logfile.write_log(out, record(task, trials, complete=False))

    with resumable():
        trials = search(count, lambda point: measure(task, point, terminal.say), save)
    log = record(task, trials, complete=True)
    logfile.write_log(out, log)
    terminal.print(show(log))
    for line in (*log["verdict"], f"written: {out}"):
        terminal.say(line)
