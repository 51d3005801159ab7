"""Accuracy on the tasks with exact scores over training: `python -m bench tasks --phases 1 5 6 6/hybrid --size nano`.

Trains every variant on every task from each seed for the same tokens (finished runs are reused, so the same command
resumes). A schedule that ends is stretched to the budget, and nothing stops early, so that all train equally long. The
accuracy is the mean over the trained levels of 64 held-out examples each during training, and of 200 at the end, where
the longer levels are scored too (docs/tasks.md). It writes tasks.json, a plot, and the logs of each run in runs/.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import logfile
from bench.compare import tables
from bench.compare.command import Phases
from bench.compare.comparison import summarize
from bench.compare.runs import RUNS, Finished, Run, execute, keep_logs
from bench.compare.variants import Variant
from bench.options import Say, read_names, resumable
from bench.tools import task_plots
from bench.tools.horizon import ending_at
from bench.workers.machine import describe_machine
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.backend import use_device
from mlx_transformer.data.tasks import PREFIX, TASKS
from mlx_transformer.nn.config import choose_size
from mlx_transformer.run.flags import Device, Folder, Size, Text, WholeNumber, parse
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import RunFailed
from mlx_transformer.utils.terminal import Terminal

LOG = "tasks.json"
PHASES = ("1", "5", "6")
BUDGETS = {"nano": 1_200_000, "small": 3_000_000, "base": 12_000_000}
SEEDS = 3


@dataclass
class Flags:
    """Train on the tasks with exact scores, and record the accuracy over training."""

    phases: Phases = ()
    """such as 5, 6/deltanet, 6:RECIPE, my_idea.py (default: 1 5 6)"""
    tasks: Text = None
    """names with commas (default: all)"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    seeds: WholeNumber = None
    """runs of each variant on each task (default: 3)"""
    max_tokens: WholeNumber = None
    """tokens of a run; schedules are stretched to it (default: 1.2M at nano, 3M at small, 12M at base)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: Folder = None
    """the folder of the results (default: results/bench/tasks_<size>_<checksum>)"""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained on what: a run of each variant on each task, of the first seed."""

    size: str
    seeds: range
    budget: int
    runs: list[tuple[str, str, Run]]  # variant, task, run

    @classmethod
    def read(cls, flags: Flags, say: Say) -> "Study":
        """Read the flags. Raises BadInput for what cannot be trained."""
        use_device(flags.device or "auto")
        size = choose_size(flags.size)
        budget = flags.max_tokens or BUDGETS[size]
        tasks = read_names("--tasks", flags.tasks, tuple(TASKS), tuple(TASKS))
        variants = dict.fromkeys(Variant.read(text) for text in flags.phases or PHASES)
        runs = []
        for task in tasks:
            settings = Settings(size=size, data=PREFIX + task, device=flags.device, max_tokens=budget)
            for one in variants:
                runs.append((one.name, task, Run.of(ending_at(one, size, budget), settings, say)))
        return cls(size=size, seeds=range(flags.seeds or SEEDS), budget=budget, runs=runs)

    @property
    def all_runs(self) -> list[tuple[str, str, Run]]:
        """All runs, the variants interleaved within a task and a seed."""
        return [(name, task, run.with_settings(seed=seed)) for seed in self.seeds for name, task, run in self.runs]

    @property
    def identity(self) -> str:
        """Checksum of everything that determines the results."""
        return hashlib.sha256("".join(run.fingerprint for *_, run in self.all_runs).encode()).hexdigest()[:20]


def measure(study: Study, folder: Path, say: Say) -> dict[str, Any]:
    """Train, or find, every run; the log, written after each. Raises RunFailed for a run without a result."""
    folder.mkdir(parents=True, exist_ok=True)
    machine, rows = describe_machine(), list[dict[str, Any]]()
    for name, task, run in study.all_runs:
        finished = execute(run, say=say)
        label = f"{name} {task} seed{run.plan.seed}"
        if finished.folder is None:
            raise RunFailed(f"{label}: {finished.error}; the same command tries again")
        rows.append(row(name, task, run, finished))
        logfile.write_log(folder / LOG, log := record(study, machine, rows))
        keep_logs(finished, folder / "runs", label)
        say(f"{len(rows)} of {len(study.all_runs)}: {label}: {summarize(finished)}")
    return log


def row(name: str, task: str, run: Run, finished: Finished) -> dict[str, Any]:
    """Return a run as the log records it: the accuracy at each evaluation, and the final score by level."""
    assert finished.result is not None
    assert finished.folder is not None
    lines = (finished.folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    evals = [one for line in lines if (one := json.loads(line))["kind"] == "eval"]
    score = finished.result["quality"].get("task") or {"accuracy": None, "levels": []}
    return {
        "name": name,
        "task": task,
        "seed": run.plan.seed,
        "status": finished.status,
        "fingerprint": run.fingerprint,
        "parameters": finished.result["parameters"]["total"],
        "evals": [{key: one.get(key) for key in ("tokens", "valid_loss", "accuracy")} for one in evals],
        "accuracy": score["accuracy"],
        "levels": score["levels"],
    }


def record(study: Study, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the log."""
    return {
        "schema_version": 2,
        "measures": "tasks",
        "complete": len(rows) == len(study.all_runs),
        "machine": machine,
        "identity": study.identity,
        "size": study.size,
        "budget_tokens": study.budget,
        "seeds": list(study.seeds),
        "names": list(dict.fromkeys(name for name, *_ in study.runs)),
        "tasks": list(dict.fromkeys(task for _, task, _ in study.runs)),
        "runs": list(rows),
    }


def main(prog: str = "python -m bench tasks", args: list[str] | None = None) -> None:
    """Run the command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, prog, args=args)
    terminal = Terminal(width=140)
    study = Study.read(flags, terminal.say)
    folder = flags.out or RUNS.parent / f"tasks_{study.size}_{study.identity[:8]}"
    logfile.check_folder(folder, LOG, {"identity": study.identity})
    try:
        with resumable():
            log = measure(study, folder, terminal.say)
        task_plots.draw(log).write(folder)
    except OSError as error:
        raise RunFailed(f"could not write to '{folder}': {error}; the same command resumes") from error
    terminal.print(tables.on_terminal(task_plots.table(log)))
    terminal.say(f"written: {folder}")
