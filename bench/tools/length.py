"""Length extrapolation: train at one sequence length, evaluate at one, two and four times that.

`python -m bench length --size nano` trains phase 3 and its branches about positions (finished runs are reused, so the
same command resumes), cuts the validation text into longer and longer sequences, and writes a JSON log and a plot: nats
per token at each length, and the extra loss at each position of the longest sequences. All lengths predict the same
tokens. `python -m bench length cost` measures time and memory over the length instead (`bench/tools/length_cost.py`).
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.table import Table

from bench import logfile
from bench.compare.command import Phases
from bench.compare.runs import RUNS, Run, execute
from bench.compare.variants import Variant
from bench.options import BUDGETS, Say, TrainFlags, resumable
from bench.tools import length_cost
from bench.workers.machine import describe_machine
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.data.stream import validation_sequences
from mlx_transformer.data.tasks import is_task
from mlx_transformer.nn.model import Model
from mlx_transformer.run.flags import Extent, File, WholeNumber, parse
from mlx_transformer.run.plots import drawing, write_png
from mlx_transformer.run.saved import load
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.terminal import Terminal

_BRANCHES = ("no_position", "rope", "alibi", "t5", "shaw", "transformer_xl", "longformer")
PHASES = ("3", *(f"3/{name}" for name in _BRANCHES))
TIMES = (1, 2, 4)  # the trained length
SEEDS, SHARE = 3, 0.5  # of a comparison's budget
_POINTS = 8  # of the curve, for each trained length
_BATCH_TOKENS = 8192
_SAME = ("measures", "size", "seq_len", "corpus", "budget_tokens", "names", "seeds")  # of a log that resumes
_COLORS = ("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe & Ito 2008


@dataclass
class Flags(TrainFlags):
    """Train at one sequence length, evaluate at one, two and four times that (`length cost`: time and memory)."""

    phases: Phases = ()
    """such as 2, 3/BRANCH, 2:RECIPE (default: phase 3 and its branches about positions)"""
    seq_len: Extent = None
    """tokens of a sequence in training (default: the size's)"""
    seeds: WholeNumber = None
    """runs of each variant (default: 3)"""
    max_tokens: WholeNumber = None
    """tokens of each run (default: half of the size's bench budget)"""
    out: File = None
    """the JSON log; the plot is beside it (default: results/bench/length_<size>.json)"""


def losses(model: Model, valid: np.ndarray, length: int) -> np.ndarray:
    """Return the loss in nats of every token but the first, in order, in sequences of this length."""
    sequences, mask = validation_sequences(valid, length)
    size, found = max(1, _BATCH_TOKENS // length), []
    for start in range(0, len(sequences), size):
        ctx, targets = model.inputs(mx.array(sequences[start : start + size]))
        found.append(np.array(model.evaluation_loss(model.hidden(ctx), targets, ctx)))
    return np.concatenate(found)[mask]


def measure(model: Model, valid: np.ndarray, seq_len: int) -> dict[str, Any]:
    """Return the mean loss at each length, and the extra loss at each position of the longest sequences.

    That is the loss of the same tokens minus their loss at the trained length: 0 up to there, by definition.
    """
    nats = {times: losses(model, valid, times * seq_len) for times in TIMES}
    longest = TIMES[-1] * seq_len
    cost, at = nats[TIMES[-1]] - nats[1], np.arange(len(nats[1])) % longest
    edges = np.linspace(0, longest, TIMES[-1] * min(_POINTS, seq_len) + 1).astype(int)
    curve = [
        {"position": int(b), "cost": float(cost[here].mean())}
        for a, b in pairwise(edges)
        if (here := (a <= at) & (at < b)).any()
    ]
    return {"losses": {str(times * seq_len): float(own.mean()) for times, own in nats.items()}, "curve": curve}


def runs_of(flags: Flags, say: Say) -> list[Run]:
    """Return a run per variant and seed. Raises BadInput for what cannot be trained."""
    size = flags.choose()
    train = flags.settings(size, max_tokens=flags.max_tokens or int(SHARE * BUDGETS[size]), seq_len=flags.seq_len)
    if is_task(flags.data or ""):
        raise BadInput(f"--data {flags.data}: expected a text; evaluate RUN --data {flags.data} scores longer examples")
    first, *others = map(Variant.read, dict.fromkeys(flags.phases or PHASES))
    runs = [Run.of(first, train, say), *(Run.of(variant, train) for variant in others)]
    return [run.with_settings(seed=seed) for seed in range(flags.seeds or SEEDS) for run in runs]


def evaluate_run(run: Run, say: Say) -> dict[str, Any]:
    """Train a run, or find it, and evaluate it at every length. Raises RunFailed if it has no result."""
    finished = execute(run, say=say)
    row = {"name": run.variant.name, "seed": run.plan.seed, "fingerprint": run.fingerprint}
    if finished.status == "diverged":
        return row | {"status": "diverged"}
    if finished.folder is None:
        raise RunFailed(f"{run.variant.name}, seed {run.plan.seed}: {finished.error}")
    model, _ = load(finished.folder)
    return row | {"status": "done"} | measure(model, run.plan.tokens.valid, run.plan.config.seq_len)


def record(runs: Sequence[Run], evaluated: Sequence[dict[str, Any]], complete: bool) -> dict[str, Any]:
    """Return the log."""
    plan = runs[0].plan
    return {
        "schema_version": 2,
        "measures": "length",
        "complete": complete,
        "machine": describe_machine(),
        "size": plan.size,
        "seq_len": plan.config.seq_len,
        "corpus": {"name": plan.corpus.name, "sha256": plan.corpus.sha256},
        "budget_tokens": plan.limits.max_tokens,
        "names": list(dict.fromkeys(run.variant.name for run in runs)),
        "seeds": sorted({run.plan.seed for run in runs}),
        "runs": list(evaluated),
    }


def check_log(path: Path, runs: Sequence[Run]) -> None:
    """Raise BadInput if something else is there, or no log can be written there."""
    logfile.check_json(path)
    if not logfile.exists(path):
        return logfile.check_out(path)
    ours = record(runs, [], complete=False)
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        same = all(theirs[name] == ours[name] for name in _SAME)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise BadInput(f"{path} is there already and is not a log of this command: give another name with --out")
    return None


def median(log: dict[str, Any], name: str, read: Callable[[dict[str, Any]], Any]) -> np.ndarray | None:
    """Return the median over the seeds of a variant; a diverged run counts as infinite, and None is that median."""
    own = [run for run in log["runs"] if run["name"] == name]
    found = [np.asarray(read(run)) for run in own if run["status"] == "done"]
    if 2 * len(found) <= len(own):
        return None
    return np.median([*found, *(np.full_like(found[0], np.inf) for _ in own[len(found) :])], axis=0)


def names_of(log: dict[str, Any]) -> list[str]:
    """Return the names of the variants that were evaluated."""
    return list(dict.fromkeys(run["name"] for run in log["runs"]))


def show(log: dict[str, Any]) -> Table:
    """Return a table for people, one row per variant."""
    lengths = [str(times * log["seq_len"]) for times in TIMES]
    title = f"trained at length {log['seq_len']}: nats per token at length"
    table = Table("variant", *lengths, "seeds", title=title, caption="medians over the seeds", min_width=70)
    for name in names_of(log):
        found = median(log, name, lambda run: [run["losses"][length] for length in lengths])
        cells = ["diverged"] * len(lengths) if found is None else [f"{loss:.4f}" for loss in found]
        table.add_row(name, *cells, str(sum(run["name"] == name for run in log["runs"])))
    return table


@drawing()
def draw(log: dict[str, Any], path: Path) -> None:
    """Plot the extra loss over the position in the longest sequences, a line per variant, as a PNG. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(names_of(log)):
        cost = median(log, name, lambda run: [point["cost"] for point in run["curve"]])
        if cost is not None:
            positions = next(run for run in log["runs"] if "curve" in run)["curve"]
            (line,) = axes.plot([p["position"] for p in positions], cost, label=name, markersize=4, linewidth=1.3)
            line.set(color=_COLORS[i % 7], marker="osD^vPX*"[i % 8], linestyle=("-", "--", ":")[i % 3])
    axes.axvline(log["seq_len"], color="#6a6a6a", linewidth=0.8)
    axes.annotate(" trained length", (log["seq_len"], 1), xycoords=("data", "axes fraction"), va="top", color="#6a6a6a")
    axes.set_xlabel("position in the sequence, tokens")
    axes.set_ylabel("extra loss over the trained length, nats per token")
    figure.legend(loc="outside upper center", frameon=False, ncols=4, fontsize=8)
    write_png(figure, path)


def main(prog: str = "python -m bench length", args: list[str] | None = None) -> None:
    """Run the command line; `cost` as its first word is `bench.tools.length_cost`."""
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["cost"]:
        length_cost.main(f"{prog} cost", given[1:])
        return
    end_as_by_ctrl_c()
    flags = parse(Flags, prog, args=args)
    terminal = Terminal(width=100)
    runs = runs_of(flags, terminal.say)
    out = flags.out or RUNS.parent / f"length_{runs[0].plan.size}.json"
    check_log(out, runs)
    evaluated: list[dict[str, Any]] = []
    with resumable():
        for run in runs:
            evaluated.append(evaluate_run(run, terminal.say))
            logfile.write_log(out, record(runs, evaluated, complete=len(evaluated) == len(runs)))
            terminal.say(f"{run.variant.name}, seed {run.plan.seed}: {evaluated[-1]['status']}")
    log = record(runs, evaluated, complete=True)
    draw(log, out.with_suffix(".png"))
    terminal.print(show(log))
    terminal.say(f"written: {out} and {out.with_suffix('.png')}")
