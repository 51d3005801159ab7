"""Length extrapolation: models trained on rows of one length, evaluated on rows twice and four times as long.

`python -m bench length --size nano` trains phase 3's trunk and its branches about positions (bench/plan.py keeps the
runs, so the same command goes on where it was cut off), cuts the validation text into longer and longer rows, and
writes a JSON log and a picture: nats per piece at each length, and what each position in the longest rows costs or
gains. All lengths predict the same pieces.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from bench import logfile
from bench.compare.plan import RUNS, Run, Variant, execute
from bench.options import BUDGETS
from bench.workers.machine import describe_machine
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.backend import use_device
from mlx_transformer.data.stream import validation_sequences
from mlx_transformer.nn.config import choose_size
from mlx_transformer.nn.model import Model
from mlx_transformer.run.flags import Device, Extent, File, Place, Size, WholeNumber, parse
from mlx_transformer.run.plots import write_png
from mlx_transformer.run.saved import load
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed, exit_cleanly

PHASE, TRUNK = 3, "trunk"
BRANCHES = (TRUNK, "no_position", "rope", "alibi", "t5", "shaw", "transformer_xl", "longformer")
TIMES = (1, 2, 4)  # the trained length
SEEDS, SHARE = 3, 0.5  # of a comparison's budget
_POINTS = 8  # of the curve, for each trained length
_BATCH_TOKENS = 8192
_ASKED = ("measures", "size", "seq_len", "corpus", "budget_tokens", "branches", "seeds")  # of a log that goes on
_COLOURS = ("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe & Ito 2008

Say = Callable[[str], None]


@dataclass
class Flags:
    """Train at one length, evaluate at one, two and four times as much."""

    branches: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ()
    """trunk, or branches of phase 3 (default: the trunk and those about positions)"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    seq_len: Extent = None
    """tokens of a row in training (default: the size's)"""
    data: Place = None
    """auto, fables, tinystories or a text (default: auto)"""
    valid: Place = None
    """validation text"""
    seeds: WholeNumber = None
    """of each branch (default: 3)"""
    max_tokens: WholeNumber = None
    """of each run (default: half of the size's bench budget)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: File = None
    """the JSON log; the picture stands beside it (default: results/bench/length_<size>.json)"""


def losses(model: Model, valid: np.ndarray, length: int) -> np.ndarray:
    """Nats of every piece of the text behind its first, in order, when it is cut into rows of this length."""
    rows, mask = validation_sequences(valid, length)
    size, found = max(1, _BATCH_TOKENS // length), []
    for start in range(0, len(rows), size):
        ctx, targets = model.inputs(mx.array(rows[start : start + size]))
        found.append(np.array(model.token_loss(model.hidden(ctx), targets)))
    return np.concatenate(found)[mask]


def measure(model: Model, valid: np.ndarray, seq_len: int) -> dict[str, Any]:
    """The mean loss at each length; and for each position in the longest rows, what it costs to stand there.

    That is the loss of the same pieces less what it is in rows of the trained length: 0 up to there, by construction.
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
    """Every branch with every seed. Raises BadInput for what cannot be trained."""
    use_device(flags.device or "auto")
    size = choose_size(flags.size)
    budget = flags.max_tokens or int(SHARE * BUDGETS[size])
    given = {name: getattr(flags, name) for name in ("data", "valid", "device", "seq_len")}
    train = Settings(size=size, max_tokens=budget, **given)
    runs: list[Run] = []
    for name in dict.fromkeys(flags.branches or BRANCHES):
        variant = Variant(phase=PHASE, branch=None if name == TRUNK else name)
        runs.append(Run.of(variant, train, (lambda text: None) if runs else say))
    return [run.with_settings(seed=seed) for seed in range(flags.seeds or SEEDS) for run in runs]


def row_of(run: Run, cache: Path = RUNS) -> dict[str, Any]:
    """A run, trained or found, and what its weights make of longer rows. Raises RunFailed if it comes to nothing."""
    finished = execute(run, cache)
    row = {"branch": run.variant.branch or TRUNK, "seed": run.plan.seed, "fingerprint": run.fingerprint}
    if finished.status == "diverged":
        return row | {"status": "diverged"}
    if finished.folder is None:
        raise RunFailed(f"{run.variant.name}, seed {run.plan.seed}: {finished.error}")
    model, _ = load(finished.folder)
    return row | {"status": "done"} | measure(model, run.plan.tokens.valid, run.plan.config.seq_len)


def record(runs: Sequence[Run], rows: Sequence[dict[str, Any]], complete: bool) -> dict[str, Any]:
    """The log."""
    plan = runs[0].plan
    return {
        "schema_version": 1,
        "measures": "length",
        "complete": complete,
        "machine": describe_machine(),
        "phase": PHASE,
        "size": plan.size,
        "seq_len": plan.config.seq_len,
        "corpus": {"name": plan.corpus.name, "sha256": plan.corpus.sha256},
        "budget_tokens": plan.limits.max_tokens,
        "branches": list(dict.fromkeys(run.variant.branch or TRUNK for run in runs)),
        "seeds": sorted({run.plan.seed for run in runs}),
        "rows": list(rows),
    }


def check_log(path: Path, runs: Sequence[Run]) -> None:
    """Raises BadInput if something else is there, or no log can be put there."""
    logfile.check_json(path)
    if not logfile.exists(path):
        return logfile.check_out(path)
    ours = record(runs, [], complete=False)
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        same = all(theirs[name] == ours[name] for name in _ASKED)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise BadInput(f"{path} is there already and no log of this command: give another name with --out")
    return None


def median(rows: Sequence[dict[str, Any]], branch: str, read: Callable[[dict[str, Any]], Any]) -> np.ndarray | None:
    """Over the seeds of a branch, one that diverged worse than any other; None where that is what the median is."""
    own = [row for row in rows if row["branch"] == branch]
    found = [np.asarray(read(row)) for row in own if row["status"] == "done"]
    if 2 * len(found) <= len(own):
        return None
    return np.median([*found, *(np.full_like(found[0], np.inf) for _ in own[len(found) :])], axis=0)


def branches(log: dict[str, Any]) -> list[str]:
    """Those of a log, in its order."""
    return list(dict.fromkeys(row["branch"] for row in log["rows"]))


def show(log: dict[str, Any]) -> Table:
    """Branch by branch, for people."""
    lengths = [str(times * log["seq_len"]) for times in TIMES]
    title = f"trained on rows of {log['seq_len']}: nats per piece on rows of"
    table = Table("branch", *lengths, "seeds", title=title, caption="medians over the seeds", min_width=70)
    for branch in branches(log):
        found = median(log["rows"], branch, lambda row: [row["losses"][length] for length in lengths])
        cells = ["diverged"] * len(lengths) if found is None else [f"{loss:.4f}" for loss in found]
        table.add_row(branch, *cells, str(sum(row["branch"] == branch for row in log["rows"])))
    return table


def draw(log: dict[str, Any], path: Path) -> None:
    """Write the picture as a PNG: the cost over the position in the longest rows, a line each. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, branch in enumerate(branches(log)):
        cost = median(log["rows"], branch, lambda row: [point["cost"] for point in row["curve"]])
        if cost is not None:
            positions = next(row for row in log["rows"] if "curve" in row)["curve"]
            (line,) = axes.plot([p["position"] for p in positions], cost, label=branch, markersize=4, linewidth=1.3)
            line.set(color=_COLOURS[i % 7], marker="osD^vPX*"[i % 8], linestyle=("-", "--", ":")[i % 3])
    axes.axvline(log["seq_len"], color="#6a6a6a", linewidth=0.8)
    axes.annotate(" trained length", (log["seq_len"], 1), xycoords=("data", "axes fraction"), va="top", color="#6a6a6a")
    axes.set_xlabel("position in the row (pieces)")
    axes.set_ylabel("nats per piece more than at the trained length")
    figure.legend(loc="outside upper center", frameon=False, ncols=4, fontsize=8)
    write_png(figure, path)


def main() -> None:
    """The command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, "python -m bench length")
    terminal = Console(width=100)

    def say(text: str) -> None:
        terminal.print(text, soft_wrap=True, highlight=False)

    runs = runs_of(flags, say)
    out = flags.out or RUNS.parent / f"length_{runs[0].plan.size}.json"
    check_log(out, runs)
    rows: list[dict[str, Any]] = []
    try:
        for run in runs:
            rows.append(row_of(run))
            logfile.write_log(out, record(runs, rows, complete=len(rows) == len(runs)))
            say(f"{rows[-1]['branch']}, seed {rows[-1]['seed']}: {rows[-1]['status']}")
    except KeyboardInterrupt:
        raise Interrupted("stopped, and the run that was begun is saved; the same command goes on") from None
    log = record(runs, rows, complete=True)
    draw(log, out.with_suffix(".png"))
    terminal.print(show(log))
    say(f"all of it: {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    exit_cleanly(main)
