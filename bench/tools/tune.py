"""Tune the learning rate of a phase, with one procedure and budget for all phases.

`python -m bench tune --phase 2 --size small --data stories.txt` trains with five learning rates, a factor of two apart
around the recipe's own, two seeds each, for 30 % of the size's bench budget. The criterion is the median over the seeds
of the best validation loss within the budget; a diverged run counts as infinite. While the best learning rate is the
lowest or the highest one, the next on that side is tried, up to MOST_TRIALS in all. Finished runs are reused, so the
same command resumes. It writes a JSON log, to which the same command with other --learning-rates adds; the result is
entered into the phase's RECIPE by hand.

A schedule does not shrink with the budget: a recipe that decays over more tokens is tuned on its beginning.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench import logfile
from bench.compare.runs import RUNS, Finished, Run, execute
from bench.compare.variants import DEFAULT, Variant
from bench.options import BUDGETS, Say, TrainFlags, resumable
from bench.workers.machine import describe_machine
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.run.flags import Extent, File, Text, WholeNumber, parse
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.terminal import Terminal

SHARE = 0.3  # of a comparison's budget, for each run
STEPS = (-2, -1, 0, 1, 2)  # powers of two around the recipe's own
MOST_TRIALS = 10
SEEDS = 2


@dataclass
class Flags(TrainFlags):
    """Tune the learning rate of a phase, with the same procedure and budget for every phase."""

    phase: WholeNumber = None
    """phase of the ladder (default: 1)"""
    branch: Text = None
    """branch of the phase"""
    recipe: Text = None
    """one of the phase's recipes"""
    batch_size: Extent = None
    """sequences of a step (default: the recipe's)"""
    seeds: WholeNumber = None
    """runs of each learning rate (default: 2)"""
    max_tokens: WholeNumber = None
    """tokens of each run (default: 600,000 at nano, 1,500,000 at small, 6,000,000 at base)"""
    learning_rates: Text = None
    """initial ones, with commas, at least three (default: 1/4, 1/2, 1, 2 and 4 times the recipe's)"""
    out: File = None
    """the JSON log (default: results/bench/tune_phase<n>_<size>.json)"""


@dataclass
class Trial:
    """A learning rate with its runs so far, one per seed, each with its fingerprint."""

    learning_rate: float
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
        return {"learning_rate": self.learning_rate, "losses": self.losses, "median": self.median}


def _loss(finished: Finished) -> float:
    assert finished.result is not None
    return finished.result["best_valid_loss"] if finished.status == "done" else math.inf


def best_of(trials: list[Trial]) -> int:
    """Return the index of the lowest median; 0 if all diverged."""
    return min(range(len(trials)), key=lambda i: trials[i].median)


def next_learning_rate(trials: list[Trial]) -> float | None:
    """Return the one beyond the edge if the best trial is at an edge, at its neighbor's ratio; else None."""
    best, rates = best_of(trials), [one.learning_rate for one in trials]
    if 0 < best < len(rates) - 1 or len(rates) >= MOST_TRIALS:
        return None
    edge, inner = (rates[0], rates[1]) if best == 0 else (rates[-1], rates[-2])
    return rounded(edge * edge / inner)


def rounded(learning_rate: float) -> float:
    """Round to three digits, as one would write it into a recipe."""
    return float(f"{learning_rate:.3g}")


def search(
    learning_rates: list[float], measure: Callable[[float], Trial], save: Callable[[list[Trial]], None]
) -> list[Trial]:
    """Measure these learning rates, and further ones while the best is at the edge; the trials in ascending order."""
    trials: list[Trial] = []
    todo = list(learning_rates)
    while todo:
        trials = sorted([*trials, measure(todo.pop(0))], key=lambda one: one.learning_rate)
        save(trials)
        if not todo and (more := next_learning_rate(trials)) is not None:
            todo.append(more)
    return trials


def verdict(trials: list[Trial]) -> list[str]:
    """State the best learning rate, and compare each neighbor with it, in sentences."""
    best = best_of(trials)
    one = trials[best]
    if math.isinf(one.median):
        return [f"every learning rate diverged, down to {one.learning_rate:g}: there is no best"]
    sentences = [f"best learning rate: {one.learning_rate:g} (validation loss {one.median:.4f})"]
    if best in (0, len(trials) - 1):
        sentences.append(f"it is at the edge of {len(trials)}: not settled; continue with --learning-rates around it")
    return sentences + [judged(one, trials[i]) for i in (best - 1, best + 1) if 0 <= i < len(trials)]


def judged(best: Trial, other: Trial) -> str:
    """State how far a neighbor is behind the best trial, and with how many paired seeds (sign test).

    Counted, since with two seeds one outlier makes the standard error so large that no trials differ.
    """
    if math.isinf(other.median):
        return f"{other.learning_rate:g} diverged"
    behind, count = f"{other.learning_rate:g} is {other.median - best.median:.4f} behind", len(best.losses)
    if count == 1:
        return f"{behind}; one seed cannot tell this from noise"
    worse = sum(theirs > own for own, theirs in zip(best.losses, other.losses, strict=True))
    if worse == count:
        return f"{behind}, with every seed: by chance once in {2**count}"
    return f"{behind}, with {worse} of {count} seeds: within seed noise"


def show(log: dict[str, Any]) -> Table:
    """Return a table for people, one row per learning rate."""
    name = Variant(phase=log["phase"], branch=log["branch"], recipe=log["recipe"]).name
    title = f"{name}, {log['size']}, {log['corpus']['name']}, {log['budget_tokens']:,} tokens"
    heads = ("learning rate", *(f"seed {seed}" for seed in log["seeds"]), "median")
    table = Table(*heads, title=title, caption="best validation loss within the budget, nats per token")
    for one in log["learning_rates"]:
        rate, losses = one["learning_rate"], (*one["losses"], one["median"])
        cells = ("diverged" if math.isinf(loss) else f"{loss:.4f}" for loss in losses)
        table.add_row(f"{rate:g}", *cells, style="bold" if rate == log["best"] else "")
    return table


@dataclass(frozen=True, kw_only=True)
class Task:
    """A phase to tune: all runs are those of `flags` except for learning rate and seed."""

    variant: Variant
    flags: Settings
    own: Run  # at the recipe's own learning rate
    seeds: list[int]
    learning_rates: list[float]

    @classmethod
    def read(cls, flags: Flags, say: Say) -> "Task":
        """Read the flags. Raises BadInput for what cannot be trained."""
        size = flags.choose()
        recipe = flags.recipe or DEFAULT
        variant = Variant(phase=flags.phase or 1, branch=flags.branch, recipe=recipe)
        budget = flags.max_tokens or int(SHARE * BUDGETS[size])
        train = flags.settings(size, max_tokens=budget, batch_size=flags.batch_size)
        own = Run.of(variant, train, say)
        rates = read_learning_rates(flags.learning_rates) or [
            rounded(own.plan.recipe.learning_rate * 2.0**step) for step in STEPS
        ]
        return cls(variant=variant, flags=train, own=own, seeds=list(range(flags.seeds or SEEDS)), learning_rates=rates)

    def runs(self, learning_rate: float) -> list[Run]:
        """Return one run per seed."""
        run = Run.of(self.variant, replace(self.flags, learning_rate=learning_rate))
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
            "recipe_learning_rate": plan.recipe.learning_rate,
        }


def read_learning_rates(text: str | None) -> list[float]:
    """Read "0.001,0.002,0.004" as numbers, ascending. Raises BadInput unless there are three."""
    if text is None:
        return []
    try:
        rates = sorted({float(word) for word in text.split(",")})
    except ValueError:
        rates = []
    if len(rates) < 3 or not all(0 < rate < math.inf for rate in rates):
        raise BadInput(f"--learning-rates {text!r}: expected at least three different numbers above 0, with commas")
    return rates


def measure(task: Task, learning_rate: float, say: Say) -> Trial:
    """Train, or find, the runs of a learning rate. Raises RunFailed for one that ends without a result."""
    trial = Trial(learning_rate)
    for run, seed in zip(task.runs(learning_rate), task.seeds, strict=True):
        finished = execute(run, say=say)
        if finished.status == "failed":
            raise RunFailed(f"learning rate {learning_rate:g}, seed {seed}: {finished.error}")
        trial.runs.append((run.fingerprint, finished))
        loss = trial.losses[-1]
        say(f"learning rate {learning_rate:g}, seed {seed}: {'diverged' if math.isinf(loss) else f'{loss:.4f}'}")
    return trial


def record(task: Task, trials: list[Trial], complete: bool) -> dict[str, Any]:
    """Return the log: every learning rate, and every run with its evaluations."""
    names = ("seed", "stopped", "best_valid_loss", "tokens", "train_seconds", "versions")
    runs = [
        {
            "learning_rate": one.learning_rate,
            "fingerprint": fingerprint,
            "status": finished.status,
            **{name: finished.result[name] for name in names},
            "evals": finished.evals,
        }
        for one in trials
        for fingerprint, finished in one.runs
        if finished.result is not None
    ]
    best = trials[best_of(trials)]
    return {
        "schema_version": 2,
        "measures": "tune",
        "complete": complete,
        "machine": describe_machine(),
        **task.describe(),
        "best": None if math.isinf(best.median) else best.learning_rate,
        "verdict": verdict(trials),
        "learning_rates": [one.to_dict() for one in trials],
        "runs": runs,
    }


def logged_learning_rates(path: Path, task: Task) -> list[float]:
    """Return those that the log already has. Raises BadInput for another task's, or where none can be written."""
    if not logfile.exists(path):
        logfile.check_out(path)
        return []
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differs = [name for name, value in task.describe().items() if theirs[name] != value]
        rates = [float(one["learning_rate"]) for one in theirs["learning_rates"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--out {path} is not a log of this command: give another name") from error
    if differs:
        raise BadInput(f"--out {path} holds a log with another {differs[0]}: give another name")
    return rates


def main(prog: str = "python -m bench tune", args: list[str] | None = None) -> None:
    """Run the command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, prog, args=args)
    terminal = Terminal(width=120)
    task = Task.read(flags, terminal.say)
    name = "_".join(filter(None, (f"phase{flags.phase or 1}", flags.branch, flags.recipe, task.own.plan.size)))
    out = flags.out or RUNS.parent / f"tune_{name}.json"
    logged = logged_learning_rates(out, task)

    def save(trials: list[Trial]) -> None:
        if len(trials) >= len(logged):  # a log never loses trials
            logfile.write_log(out, record(task, trials, complete=False))

    with resumable():
        rates = list(dict.fromkeys([*logged, *task.learning_rates]))
        trials = search(rates, lambda rate: measure(task, rate, terminal.say), save)
    log = record(task, trials, complete=True)
    logfile.write_log(out, log)
    terminal.print(show(log))
    for line in (*log["verdict"], f"written: {out}"):
        terminal.say(line)
