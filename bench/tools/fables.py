"""Distance of each phase to the entropy of the fables, and consistency of its samples, at equal tokens and equal time.

`python -m bench fables --size nano` trains each phase on the built-in corpus, from each seed twice: for a number of
tokens, and for a number of seconds of the training clock. The corpus's entropy is known exactly; its parser judges the
samples, and knows which words a story determines. Finished runs are reused, so the same command resumes. It writes
fables.json, a plot, and the logs of each run in runs/.

Each phase trains with its own recipe: a run whose schedule ends before the budget stops there.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import logfile
from bench.compare import stats, tables
from bench.compare.command import Phases, present_phases
from bench.compare.comparison import summarize
from bench.compare.runs import RUNS, Finished, Run, execute, keep_logs
from bench.compare.summary import FEWEST_SEEDS
from bench.compare.variants import Variant
from bench.options import BUDGETS, SEEDS, Say, resumable
from bench.tools import floor
from bench.tools.floor import MEASURES, SHARES
from bench.workers.machine import describe_machine
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.backend import use_device
from mlx_transformer.nn.config import choose_size
from mlx_transformer.run.flags import Device, Folder, Positive, Size, WholeNumber, parse
from mlx_transformer.run.plan import DEFAULT_SECONDS
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import RunFailed
from mlx_transformer.utils.terminal import Terminal

LOG = "fables.json"


@dataclass
class Flags:
    """Train every phase on the fables for equal tokens and equal time, and compare it with their entropy."""

    phases: Phases = ()
    """such as 2, 3/BRANCH, 2:RECIPE (default: every phase)"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    seeds: WholeNumber = None
    """runs of each phase within each budget (default: 5)"""
    max_tokens: WholeNumber = None
    """tokens of a run; cuts a schedule off, does not shrink it (default: 2M at nano, 5M at small, 20M at base)"""
    max_seconds: Positive = None
    """training time of a run (default: 240)"""
    stories: WholeNumber = None
    """number of fables to train on"""
    device: Device = None
    """where to compute (default: auto)"""
    out: Folder = None
    """the folder of the results (default: results/bench/fables_<size>_<checksum>)"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The variants to train, and their budgets."""

    size: str
    seeds: range
    budgets: dict[str, float]  # by the flag that sets it
    runs: list[tuple[str, Run]]  # each with its budget, of the first seed

    @classmethod
    def read(cls, flags: Flags, say: Say) -> "Task":
        """Read the flags. Raises BadInput for what cannot be trained."""
        use_device(flags.device or "auto")
        size = choose_size(flags.size)
        variants = dict.fromkeys(Variant.read(text) for text in flags.phases or map(str, present_phases()))
        budgets = {
            "max_tokens": flags.max_tokens or BUDGETS[size],
            "max_seconds": flags.max_seconds or DEFAULT_SECONDS,
        }
        given: dict[str, Any] = {"size": size, "data": "fables", "stories": flags.stories, "device": flags.device}
        runs: list[tuple[str, Run]] = []
        for name, budget in budgets.items():
            limited = Settings(**given | {name: budget})
            for one in variants:
                runs.append((name, Run.of(one, limited, (lambda text: None) if runs else say)))
        return cls(size=size, seeds=range(flags.seeds or SEEDS), budgets=budgets, runs=runs)

    @functools.cached_property
    def all_runs(self) -> list[tuple[str, Run]]:
        """All runs, the variants interleaved within a seed, so that load drift affects all alike."""
        return [(budget, run.with_settings(seed=seed)) for seed in self.seeds for budget, run in self.runs]

    @property
    def identity(self) -> str:
        """Checksum of everything that determines the results."""
        marks = "".join(run.fingerprint for _, run in self.all_runs)
        return hashlib.sha256(marks.encode()).hexdigest()[:20]


def measure(task: Task, folder: Path, say: Say) -> dict[str, Any]:
    """Train, or find, every run; the log, written after each. Raises RunFailed for a run without a result."""
    folder.mkdir(parents=True, exist_ok=True)
    machine, made = describe_machine(), list[Finished]()
    for budget, run in task.all_runs:
        made.append(finished := execute(run, say=say))
        name = f"{run.variant.name} {budget} seed{run.plan.seed}"
        if finished.result is None:
            raise RunFailed(f"{name}: {finished.error}; the same command tries again")
        log = record(task, machine, made)
        logfile.write_log(folder / LOG, log)
        keep_logs(finished, folder / "runs", name)
        say(f"{len(made)} of {len(task.all_runs)}: {name}: {summarize(finished)}")
    return log


def record(task: Task, machine: Mapping[str, Any], made: Sequence[Finished]) -> dict[str, Any]:
    """Return the log: the result of each variant within each budget, and every run with its evaluations."""
    runs = [
        _row(budget, run, one.result) | {"evals": one.evals}
        for (budget, run), one in zip(task.all_runs, made, strict=False)
        if one.result is not None
    ]
    rows: list[dict[str, Any]] = []
    for name, budget in dict.fromkeys((run["name"], run["budget"]) for run in runs):
        rows.append(row := {"name": name, "budget": budget})
        own = floor.runs_of(runs, row)
        row |= {key: interval([run[key] for run in own]) for key in MEASURES}
    return {
        "schema_version": 2,
        "measures": "fables",
        "complete": len(runs) == len(task.all_runs),
        "machine": machine,
        "identity": task.identity,
        "size": task.size,
        "corpus": next(one.result["corpus"] for one in made if one.result is not None),
        "seeds": list(task.seeds),
        "budgets": task.budgets,
        "rows": rows,
        "runs": runs,
    }


def _row(budget: str, run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run as the log records it, at its best evaluation."""
    bpb, least = result["best_valid_bpb"], result["corpus"]["floor_bpb"]
    names = ("seed", "stopped", "tokens", "train_seconds", "best_valid_bpb", "versions")
    return {
        "name": run.variant.name,
        "budget": budget,
        "fingerprint": run.fingerprint,
        **{name: result[name] for name in names},
        "ratio": None if bpb is None else bpb / least,
        "above_floor": None if bpb is None else bpb - least,
        **{key: result["quality"].get(key) for key in SHARES},
        "bindings": result["quality"].get("bindings", {}),
    }


def interval(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return the median of the known values, and its 95 % bounds if there are enough of them."""
    known = [value for value in values if value is not None]
    if len(known) < FEWEST_SEEDS:
        return {"median": median(known) if known else None, "low": None, "high": None}
    found = stats.median(np.array(known))
    return {"median": found.value, "low": found.low, "high": found.high}


def main(prog: str = "python -m bench fables", args: list[str] | None = None) -> None:
    """Run the command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, prog, args=args)
    terminal = Terminal(width=120)
    task = Task.read(flags, terminal.say)
    folder = flags.out or RUNS.parent / f"fables_{task.size}_{task.identity[:8]}"
    logfile.check_folder(folder, LOG, {"identity": task.identity})
    try:
        with resumable():
            log = measure(task, folder, terminal.say)
        floor.draw(log).write(folder)
    except OSError as error:
        raise RunFailed(f"could not write to '{folder}': {error}; the same command resumes") from error
    for table in (floor.table(log), floor.bindings(log)):
        terminal.print(tables.on_terminal(table))
    terminal.say(f"written: {folder}")
