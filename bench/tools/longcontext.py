"""What a long context costs: full attention against a branch that is to grow linearly, over the length of a row.

`python -m bench longcontext` takes one row of 256 to 4,096 tokens, and measures for phase 3's trunk and its branch
`longformer`, interleaved and each in a process of its own: forward and backward pass, their peak memory, and a step of
decoding behind such a row. It writes a JSON log and a picture. A length that memory has no room for (predicted from the
step's graph) is left out, and said.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from bench import logfile
from bench.compare.plan import RUNS
from bench.tools.roofline import FOR_THE_GPU
from bench.workers import mlx_worker
from bench.workers.interleave import interleave
from bench.workers.machine import describe_machine
from bench.workers.passes import Passes, predict_bytes
from bench.workers.process import Worker, started
from mlx_transformer.backend import device_info, use_device
from mlx_transformer.generate.decoding import Decoder
from mlx_transformer.nn.config import SIZES, choose_size
from mlx_transformer.run.flags import Device, Extent, File, Size, Text, WholeNumber, parse
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.utils.errors import BadInput, RunFailed, exit_cleanly
from mlx_transformer.utils.files import atomic_write

PHASE, TRUNK, BRANCH = 3, "trunk", "longformer"
LENGTHS = (256, 512, 1024, 2048, 4096)
ROUNDS, DECODED = 5, 16
_MEASURES = {  # of a log's rows: what it is, in the picture and in the table
    "pass_seconds": "forward and backward (s)",
    "peak_bytes": "peak memory (MB)",
    "decode_seconds": "a step of decoding (ms)",
}
_SCALE = {"pass_seconds": 1.0, "peak_bytes": 1e-6, "decode_seconds": 1e3}

Say = Callable[[str], None]


@dataclass
class Flags:
    """Time and memory of full and of sparse attention over the length of a row."""

    branch: Text = None
    """of phase 3, against its trunk (default: longformer)"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    longest: Extent = None
    """tokens (default: 4096)"""
    rounds: WholeNumber = None
    """of each length (default: 5)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: File = None
    """the JSON log; the picture stands beside it (default: results/bench/longcontext_<size>.json)"""


class Row:
    """The contestant that bench.child drives: one model and one row."""

    def __init__(self, *, branch: str | None, size: str, length: int, device: str, most_bytes: int) -> None:
        use_device(device)
        kind = find_branch(find_phase(PHASE), branch)
        config = kind.Config(**{**SIZES[size], "seq_len": length})
        recipe = mlx_worker.make_recipe(PHASE, size, 1, length)
        self.predicted = predict_bytes(kind, config, recipe, 1, most_bytes)
        self.fits = self.predicted <= most_bytes
        if self.fits:
            self.model = kind(config)
            self.passes = Passes(self.model, recipe, 1)

    def facts(self) -> dict[str, Any]:
        """What the speed depends on, and whether it is measured at all."""
        return {**mlx_worker.describe_runtime(), "predicted_bytes": self.predicted, "fits": self.fits}

    def round(self) -> dict[str, Any]:
        """Seconds of one forward and backward pass, its peak memory, and seconds of one decoded piece."""
        self.model.train()
        mx.clear_cache()
        mx.reset_peak_memory()
        start = time.perf_counter()
        self.passes.gradients()
        seconds, peak = time.perf_counter() - start, mx.get_peak_memory()
        return {"pass_seconds": seconds, "peak_bytes": peak, "decode_seconds": self._decode()}

    def _decode(self) -> float:
        """Seconds of a step behind the row, without reading it."""
        self.model.eval()
        prompts: Any = self.passes.batch[:, :-1].tolist()
        pieces = Decoder(self.model)(prompts, DECODED + 2)
        next(pieces), next(pieces)  # reads the row; compiles
        start = time.perf_counter()
        for _ in range(DECODED):
            next(pieces)
        return (time.perf_counter() - start) / DECODED


def measure(names: Sequence[str], length: int, count: int, settings: dict[str, Any], say: Say) -> list[dict[str, Any]]:
    """The rows of the log for one length; the first round of each is not counted."""
    workers = [
        Worker(
            name=name,
            target="bench.tools.longcontext:Row",
            settings={**settings, "branch": None if name == TRUNK else name, "length": length},
        )
        for name in names
    ]
    with started(workers) as children:
        fitting = {name: child for name, child in children.items() if child.facts["fits"]}
        answers = interleave(fitting, count + 1, {key: {} for key in fitting}, say)
    rows = [{"name": name, "length": length, "status": "out of memory"} for name in names if name not in fitting]
    for name, own in answers.items():
        found = {key: [answer[key] for answer in own[1:]] for key in _MEASURES}
        rows.append({"name": name, "length": length, "status": "done", **found})
    return rows


def show(log: dict[str, Any]) -> Table:
    """Length by length, for people: medians."""
    table = Table("length", "", *_MEASURES.values(), title=f"{log['size']}, one row, {log['machine']['device']}")
    for row in log["rows"]:
        cells = [f"{_median(row, key):.3g}" for key in _MEASURES] if row["status"] == "done" else [row["status"]] * 3
        table.add_row(f"{row['length']:,}", row["name"], *cells)
    return table


def _median(row: dict[str, Any], key: str) -> float:
    return float(np.median(row[key])) * _SCALE[key]


def draw(log: dict[str, Any], path: Path) -> None:
    """Write the picture as a PNG: time and memory over the length, both logarithmic. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({row["length"] for row in log["rows"] if row["status"] == "done"})
    figure = Figure(figsize=(9, 3.2), dpi=150, layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(_MEASURES)), _MEASURES.items(), strict=True):
        for name, style in ((TRUNK, "o-"), (log["branch"], "s--")):
            rows = [row for row in log["rows"] if row["name"] == name and row["status"] == "done"]
            colour = "#1b1b1b" if name == TRUNK else "#0072b2"
            xs, ys = [row["length"] for row in rows], [_median(row, key) for row in rows]
            axes.plot(xs, ys, style, label=name, color=colour)
        axes.set_xscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_yscale("log")
        axes.set_xlabel("length of the row (pieces)")
        axes.set_title(label, loc="left", fontsize=10)
        axes.legend(frameon=False)
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    atomic_write(path, buffer.getvalue())


def main() -> None:
    """The command line."""
    flags = parse(Flags, "python -m bench longcontext")
    device = flags.device or "auto"
    use_device(device)
    branch = flags.branch or BRANCH
    find_branch(find_phase(PHASE), branch)
    size = choose_size(flags.size)
    terminal = Console(width=110)
    out = flags.out or RUNS.parent / f"longcontext_{size}.json"
    logfile.check_json(out)
    logfile.check_out(out)
    longest = flags.longest or LENGTHS[-1]
    if longest < LENGTHS[0]:
        raise BadInput(f"--longest {longest}: expected at least {LENGTHS[0]}, the shortest row that is measured")
    settings = {"size": size, "device": device, "most_bytes": int(FOR_THE_GPU * device_info().memory_bytes)}
    log: dict[str, Any] = {
        "schema_version": 1,
        "measures": "longcontext",
        "machine": describe_machine(),
        "phase": PHASE,
        "branch": branch,
        "size": size,
        "rows": [],
    }
    for length in (n for n in LENGTHS if n <= longest):
        say = lambda text, length=length: terminal.print(f"{length:,}: {text}", highlight=False)  # noqa: E731
        log["rows"] += measure((TRUNK, branch), length, flags.rounds or ROUNDS, settings, say)
        logfile.write_log(out, log)
    if all(row["status"] != "done" for row in log["rows"]):
        raise RunFailed(f"memory has no room for any length; {out} says what was tried")
    draw(log, out.with_suffix(".png"))
    terminal.print(show(log))
    terminal.print(f"all of it: {out} and {out.with_suffix('.png')}", highlight=False)


if __name__ == "__main__":
    exit_cleanly(main)
