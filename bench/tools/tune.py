"""The learning rate of a phase, found by one procedure and one budget for all phases.

`python -m bench tune --phase 2 --size small --data stories.txt` trains with five rates, a factor of two apart around
the recipe's own, two seeds each, for 30 % of the size's bench budget. What counts is the median over the seeds of the
best validation loss within the budget; a run that diverges counts as infinitely bad. While the best rate is the lowest
or the highest one, the next on that side is tried, up to MOST_RATES in all. Finished runs are found again
(bench/plan.py), so the same command goes on where it was cut off. It writes a JSON log, to which the same command with
other --rates adds; its result is written into the phase's RECIPE by hand.

A schedule's horizon does not shrink with the budget: a recipe that decays over more tokens is tuned on its beginning.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import logfile
from bench.compare.plan import DEFAULT, RUNS, Finished, Run, Variant, execute
from bench.options import BUDGETS
from bench.workers.machine import describe_machine
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.backend import use_device
from mlx_transformer.nn.config import choose_size
from mlx_transformer.run.flags import Device, Extent, File, Place, Size, Text, WholeNumber, parse
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed, exit_cleanly

SHARE = 0.3  # of a comparison's budget, for each run
STEPS = (-2, -1, 0, 1, 2)  # powers of two around the recipe's own rate
MOST_RATES = 10
SEEDS = 2


@dataclass
class Flags:
    """Find a phase's learning rate, by the same procedure and budget for every phase."""

    phase: WholeNumber = None
    """of the ladder (default: 1)"""
    branch: Text = None
    """one idea on top of the phase's trunk"""
    recipe: Text = None
    """a named variant of the phase's recipe"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    data: Place = None
    """auto, fables, tinystories or a text (default: auto)"""
    valid: Place = None
    """validation text"""
    batch_size: Extent = None
    """rows of a step (default: the recipe's)"""
    seeds: WholeNumber = None
    """of each rate (default: 2)"""
    max_tokens: WholeNumber = None
    """of each run (default: 600,000 at nano, 1,500,000 at small, 6,000,000 at base)"""
    rates: Text = None
    """to begin with, with commas, three at least (default: 1/4, 1/2, 1, 2 and 4 times the recipe's)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: File = None
    """the JSON log (default: results/bench/tune_phase<n>_<size>.json)"""


@dataclass
class Tried:
    """One learning rate with its runs so far, a seed each, under their fingerprints."""

    rate: float
    runs: list[tuple[str, Finished]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The best validation loss of each seed, nats per piece; inf where it diverged."""
        return [_loss(finished) for _, finished in self.runs]

    @property
    def median(self) -> float:
        return float(np.median(self.losses))

    def to_dict(self) -> dict[str, Any]:
        return {"learning_rate": self.rate, "losses": self.losses, "median": self.median}  # inf becomes null


def _loss(finished: Finished) -> float:
    assert finished.result is not None
    return finished.result["best_valid_loss"] if finished.status == "done" else math.inf


def best_of(tried: list[Tried]) -> int:
    """Index of the lowest median; of the lowest rate where all diverged."""
    return min(range(len(tried)), key=lambda i: tried[i].median)


def next_rate(tried: list[Tried]) -> float | None:
    """The rate beyond the edge at which the best one stands, as far off as its neighbour; None if there is none."""
    best, rates = best_of(tried), [one.rate for one in tried]
    if 0 < best < len(rates) - 1 or len(rates) >= MOST_RATES:
        return None
    edge, inner = (rates[0], rates[1]) if best == 0 else (rates[-1], rates[-2])
    return rounded(edge * edge / inner)


def rounded(rate: float) -> float:
    """To three digits, as one would write it into a recipe."""
    return float(f"{rate:.3g}")


def search(rates: list[float], measure: Callable[[float], Tried], save: Callable[[list[Tried]], None]) -> list[Tried]:
    """Every rate measured, in order of rates; those beyond the given ones too, as long as the best is at the edge."""
    tried: list[Tried] = []
    todo: list[float] = list(rates)
    while todo:
        tried = sorted([*tried, measure(todo.pop(0))], key=lambda one: one.rate)
        save(tried)
        if not todo and (more := next_rate(tried)) is not None:
            todo.append(more)
    return tried


def verdict(tried: list[Tried]) -> list[str]:
    """The best rate, and each of its neighbours against it, in sentences."""
    best = best_of(tried)
    one = tried[best]
    if math.isinf(one.median):
        return [f"every rate diverged, down to {one.rate:g}: there is no best"]
    said = [f"best learning rate: {one.rate:g} (validation loss {one.median:.4f})"]
    if best in (0, len(tried) - 1):
        said.append(f"it is at the edge of {len(tried)} rates: not settled; go on with --rates around it")
    return said + [judged(one, tried[i]) for i in (best - 1, best + 1) if 0 <= i < len(tried)]


def judged(best: Tried, other: Tried) -> str:
    """How far a neighbour is behind the best rate, and with how many of their paired seeds (the sign test).

    Counted, because of two seeds one that broke apart makes the standard error so large that it calls every rate alike.
    """
    if math.isinf(other.median):
        return f"{other.rate:g} diverged"
    behind, count = f"{other.rate:g} is {other.median - best.median:.4f} behind", len(best.losses)
    if count == 1:
        return f"{behind}: whether that is more than seed noise, one seed does not tell"
    worse = sum(theirs > own for own, theirs in zip(best.losses, other.losses, strict=True))
    if worse == count:
        return f"{behind}, with every seed: by chance that is so once in {2**count}"
    return f"{behind}, with {worse} of {count} seeds: within seed noise"


def show(log: dict[str, Any]) -> Table:
    """Rate by rate, for people."""
    name = Variant(phase=log["phase"], branch=log["branch"], recipe=log["recipe"]).name
    title = f"{name}, {log['size']}, {log['corpus']['name']}, {log['budget_tokens']:,} tokens"
    heads = ("learning rate", *(f"seed {seed}" for seed in log["seeds"]), "median")
    table = Table(*heads, title=title, caption="best validation loss within the budget, nats per piece")
    for one in log["rates"]:
        rate, losses = one["learning_rate"], (*one["losses"], one["median"])
        told = ("diverged" if math.isinf(loss) else f"{loss:.4f}" for loss in losses)
        table.add_row(f"{rate:g}", *told, style="bold" if rate == log["best"] else "")
    return table


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is tuned: all runs are those of `flags`, but for rate and seed."""

    variant: Variant
    flags: Settings
    own: Run  # at the recipe's own rate
    seeds: list[int]
    rates: list[float]

    @classmethod
    def read(cls, flags: Flags, say: Callable[[str], None]) -> "Task":
        """Raises BadInput for what cannot be trained."""
        use_device(flags.device or "auto")
        size = choose_size(flags.size)
        recipe = flags.recipe or DEFAULT
        variant = Variant(phase=flags.phase or 1, branch=flags.branch, recipe=recipe)
        given = {name: getattr(flags, name) for name in ("data", "valid", "batch_size", "device")}
        budget = flags.max_tokens or int(SHARE * BUDGETS[size])
        train = Settings(size=size, max_tokens=budget, **given)
        own = Run.of(variant, train, say)
        rates = read_rates(flags.rates) or [rounded(own.plan.recipe.learning_rate * 2.0**step) for step in STEPS]
        return cls(variant=variant, flags=train, own=own, seeds=list(range(flags.seeds or SEEDS)), rates=rates)

    def runs(self, rate: float) -> list[Run]:
        """One for each seed."""
        run = Run.of(self.variant, replace(self.flags, learning_rate=rate))
        return [run.with_settings(seed=seed) for seed in self.seeds]

    def describe(self) -> dict[str, Any]:
        """What two logs of the same task have in common."""
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
            "recipe_rate": plan.recipe.learning_rate,
        }


def read_rates(text: str | None) -> list[float]:
    """ "0.001,0.002,0.004" -> numbers, ascending. Raises BadInput unless there are three."""
    if text is None:
        return []
    try:
        rates = sorted({float(word) for word in text.split(",")})
    except ValueError:
        rates = []
    if len(rates) < 3 or not all(0 < rate < math.inf for rate in rates):
        raise BadInput(f"--rates {text!r}: expected at least three different numbers above 0, with commas")
    return rates


def measure(task: Task, rate: float, say: Callable[[str], None], cache: Path = RUNS) -> Tried:
    """The runs of a rate, made or found. Raises RunFailed for one that ends without a result."""
    tried = Tried(rate)
    for run, seed in zip(task.runs(rate), task.seeds, strict=True):
        finished = execute(run, cache)
        if finished.status == "failed":
            raise RunFailed(f"rate {rate:g}, seed {seed}: {finished.error}")
        tried.runs.append((run.fingerprint, finished))
        loss = tried.losses[-1]
        say(f"rate {rate:g}, seed {seed}: {'diverged' if math.isinf(loss) else f'{loss:.4f}'}")
    return tried


def record(task: Task, tried: list[Tried], complete: bool) -> dict[str, Any]:
    """The log: every rate, and every run with its evaluations."""
    names = ("seed", "stopped", "best_valid_loss", "tokens", "train_seconds", "versions")
    runs = [
        {
            "learning_rate": one.rate,
            "fingerprint": fingerprint,
            "status": finished.status,
            **{name: finished.result[name] for name in names},
            "evals": finished.evals,
        }
        for one in tried
        for fingerprint, finished in one.runs
        if finished.result is not None
    ]
    best = tried[best_of(tried)]
    return {
        "schema_version": 1,
        "measures": "tune",
        "complete": complete,
        "machine": describe_machine(),
        **task.describe(),
        "best": None if math.isinf(best.median) else best.rate,
        "verdict": verdict(tried),
        "rates": [one.to_dict() for one in tried],
        "runs": runs,
    }


def logged_rates(path: Path, task: Task) -> list[float]:
    """Those that the log has already. Raises BadInput if it is of another task, or none can be put there."""
    if not logfile.exists(path):
        logfile.check_out(path)
        return []
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differs = [name for name, value in task.describe().items() if theirs[name] != value]
        rates = [float(one["learning_rate"]) for one in theirs["rates"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--out {path} holds no log of this command: give another name") from error
    if differs:
        raise BadInput(f"--out {path} holds a log with another {differs[0]}: give another name")
    return rates


def main() -> None:
    """The command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, "python -m bench tune")
    terminal = Console(width=120)

    def say(text: str) -> None:
        terminal.print(text, soft_wrap=True, highlight=False)

    task = Task.read(flags, say)
    name = "_".join(filter(None, (f"phase{flags.phase or 1}", flags.branch, flags.recipe, task.own.plan.size)))
    out = flags.out or RUNS.parent / f"tune_{name}.json"
    logged = logged_rates(out, task)

    def save(tried: list[Tried]) -> None:
        if len(tried) >= len(logged):  # it never holds fewer than before
            logfile.write_log(out, record(task, tried, complete=False))

    try:
        tried = search(list(dict.fromkeys([*logged, *task.rates])), lambda rate: measure(task, rate, say), save)
    except KeyboardInterrupt:
        raise Interrupted("stopped, and the run that was begun is saved; the same command goes on") from None
    log = record(task, tried, complete=True)
    logfile.write_log(out, log)
    terminal.print(show(log))
    for line in (*log["verdict"], f"all of it: {out}"):
        say(line)


if __name__ == "__main__":
    exit_cleanly(main)
