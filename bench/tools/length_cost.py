"""Cost of a long context: time and memory of a training step and of a decoded token over the sequence length.

`python -m bench length cost --phases 4 4/window 4/linear 6/mamba2 --size nano` measures 256 to 8,192 tokens, one
sequence at a time. Each point is a process of its own, with the variants of one length interleaved: two sweeps of
`bench.tools.sweep`, one of training steps, one of decoding. It writes cost.json and cost.png into --out; the same
command resumes. The slope of a line is that of its logarithm over the logarithm of the length: 1 is linear, 2
quadratic. It is fitted to all lengths and to the last three.

The memory of a step is the peak of its process, weights and optimizer included; that of decoding is the peak beside
the weights, without the prefill: the caches and what a step allocates.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench import logfile
from bench.compare.command import Phases
from bench.compare.plots import STYLE, WIDTH, Plot
from bench.options import read_numbers
from bench.tools import sweep, sweep_plots
from bench.tools.sweep import Grid
from bench.tools.throughput import best_matmul_gflops, median_seconds
from bench.workers.machine import describe_machine, shown_bytes
from bench.workers.passes import DECODED, FULL
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.backend import device_info, use_device
from mlx_transformer.nn.config import SIZES, choose_size
from mlx_transformer.run.flags import Device, Folder, Positive, Size, Text, WholeNumber, parse
from mlx_transformer.run.plots import drawing
from mlx_transformer.utils.errors import BadInput, Interrupted
from mlx_transformer.utils.terminal import Terminal

LOG = "cost.json"
PHASES = ("4", "4/window", "4/linear")
LENGTHS = "256,512,1024,2048,4096,8192"
PASSES = ("step", "decode")
SHARE = 0.25  # of the device's memory, that a process may use: the variants of one length are alive together
END = 3  # lengths of the second slope
MEASURES: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {  # name -> pass, value of a point
    "step seconds": ("step", lambda one: median_seconds(one, "step")),
    "step bytes": ("step", lambda one: one["peak_bytes"]["step"]),
    "decode seconds": ("decode", lambda one: median_seconds(one, "decode")),
    "decode bytes": ("decode", lambda one: one["decoding_bytes"]),
}
SHOWN: dict[str, Callable[[float], str]] = {
    "step seconds": lambda x: f"{1000 * x:,.0f} ms",
    "step bytes": lambda x: shown_bytes(int(x)),
    "decode seconds": lambda x: f"{1000 * x:,.2f} ms",
    "decode bytes": lambda x: f"{x / 1e3:,.0f} kB",
}


@dataclass
class Flags:
    """Measure time and memory of a training step and of a decoded token over the sequence length."""

    phases: Phases = ()
    """such as 4, 4/linear, 6/mamba2, my_idea.py, measured interleaved (default: 4 4/window 4/linear)"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    seq_lens: Text = None
    """tokens of a sequence, with commas (default: 256 to 8192, by doubling)"""
    batch_size: WholeNumber = None
    """sequences of a step, and of decoding (default: 1)"""
    seconds: Positive = None
    """of timing for each point (default: 3)"""
    max_memory: Positive = None
    """GB that the process of one point may use (default: a quarter of the device's)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: Folder = None
    """folder of cost.json and cost.png; a measurement in it resumes (default: results/bench/length_cost_<time>)"""


def read_grids(flags: Flags) -> dict[str, Grid]:
    """Return the sweep of each pass. Raises BadInput for a phase, a branch or a number that cannot be."""
    use_device(flags.device or "auto")
    size = choose_size(flags.size)
    lengths = flags.seq_lens or LENGTHS
    if len(read_numbers("--seq-lens", lengths)) < 2:
        raise BadInput(f"--seq-lens {lengths!r}: a slope needs two lengths at least")
    if (shortest := read_numbers("--seq-lens", lengths)[0]) <= DECODED + 3:
        raise BadInput(f"--seq-lens {shortest}: expected more than the {DECODED + 3} tokens that are decoded")
    grid = Grid.read(
        sweep.Flags(
            phases=flags.phases or PHASES,
            size=size,
            batch_sizes=str(flags.batch_size or 1),
            seq_lens=lengths,
            d_models=str(SIZES[size]["d_model"]),
            passes=PASSES[0],
            seconds=flags.seconds,
            device=flags.device,
        )
    )
    memory = flags.max_memory * 1e9 if flags.max_memory else SHARE * device_info().memory_bytes
    limit = int(memory) * len(grid.variants)  # a sweep divides it among its variants
    return {name: replace(grid, passes=[name], max_memory_bytes=limit) for name in PASSES}


def open_log(path: Path, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """Read the log to resume, or begin one. Raises BadInput if anything else is there."""
    batch = grids[PASSES[0]].settings()[0]["batch_size"]
    if not logfile.exists(path):
        sweep.check_folder(path)
        gflops = best_matmul_gflops()
        begun = {name: sweep.begin(grid, gflops) for name, grid in grids.items()}
        log = {"schema_version": 1, "measures": "length_cost", "machine": describe_machine(), "batch_size": batch}
        return log | {"sweeps": begun}
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
        sweeps, theirs = {name: log["sweeps"][name] for name in grids}, log["batch_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"'{path}' is not the log of `bench length cost` ({error}): give another --out") from error
    if theirs != batch:
        raise BadInput(f"'{path}' was begun with --batch-size {theirs}, now it is {batch}: give another --out")
    for name, grid in grids.items():
        sweep.check_same(path, sweeps[name], grid)
    return log


def line(log: Mapping[str, Any], name: str, measure: str) -> tuple[list[int], list[float]]:
    """Return the lengths of a variant, ascending, and what was measured there, without those out of memory."""
    which, value = MEASURES[measure]
    points = [one for one in log["sweeps"][which]["settings"] if one["name"] == name and one["status"] != FULL]
    points.sort(key=lambda one: one["seq_len"])
    return [one["seq_len"] for one in points], [float(value(one)) for one in points]


def slope(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """Return the slope of log value over log length by least squares, None for a single point."""
    if len(lengths) < 2:
        return None
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def slopes(log: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the slopes by variant and measure: over `all` lengths, and over the `last` three."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in log["sweeps"][PASSES[0]]["names"]:
        found[name] = {}
        for measure in MEASURES:
            lengths, values = line(log, name, measure)
            found[name][measure] = {"all": slope(lengths, values), "last": slope(lengths[-END:], values[-END:])}
    return found


def show(log: Mapping[str, Any]) -> Table:
    """Return a table for people: the values at the longest length of each variant, and the slopes."""
    heads = ("tokens", "step", "slope", "memory", "slope", "a decoded token", "slope", "memory", "slope")
    table = Table("", *heads, title="one step, one decoded token", caption="slope over all lengths / the last three")
    for name, own in log["slopes"].items():
        cells = []
        for measure in MEASURES:
            _, values = line(log, name, measure)
            cells += [SHOWN[measure](values[-1]) if values else FULL]
            cells += [" / ".join("" if one is None else f"{one:.2f}" for one in own[measure].values())]
        reached = {lengths[-1] for measure in MEASURES if (lengths := line(log, name, measure)[0])}
        table.add_row(name, ", ".join(f"{length:,}" for length in sorted(reached, reverse=True)), *cells)
    return table


@drawing(STYLE)
def draw(log: Mapping[str, Any]) -> Plot:
    """Draw a panel for each measure over the sequence length, a line per variant with its last slope at the end."""
    from matplotlib.figure import Figure

    names = log["sweeps"][PASSES[0]]["names"]
    labels = ("training step (s)", "step, memory (MB)", "decoded token (ms)", "decoding, memory (MB)")
    units = (1.0, 1e-6, 1e3, 1e-6)
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    for axes, measure, label, unit in zip(figure.subplots(2, 2).flat, MEASURES, labels, units, strict=True):
        lines = {name: line(log, name, measure) for name in names}
        scaled = {name: (xs, [unit * y for y in ys]) for name, (xs, ys) in lines.items()}
        ends = {name: log["slopes"][name][measure]["last"] for name in names}
        sweep_plots.draw_panel(axes, label, scaled, ends)
    handles, entries = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, entries, loc="outside lower left", ncols=min(3, len(names)), frameon=False)
    return Plot(
        name="cost", description="Time and memory over the sequence length, with log-log slopes.", figure=figure
    )


def main(prog: str = "python -m bench length cost", args: list[str] | None = None) -> None:
    """Run the command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, prog, args=args)
    grids = read_grids(flags)
    folder = flags.out or Path("results/bench") / f"length_cost_{time.strftime('%Y%m%d_%H%M%S')}"
    path, terminal = folder / LOG, Terminal(width=140)
    log = open_log(path, grids)

    def save() -> None:
        for name, grid in grids.items():
            log["sweeps"][name]["complete"] = grid.is_complete(log["sweeps"][name])
        log["complete"] = all(one["complete"] for one in log["sweeps"].values())
        log["slopes"] = slopes(log)
        logfile.write_log(path, log)

    save()
    try:
        for name, grid in grids.items():
            sweep.sweep(grid, log["sweeps"][name], save, lambda text: terminal.print(text, soft_wrap=True))
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; the same command with --out {folder} resumes") from None
    terminal.print(show(log))
    terminal.print(f"written: {path}, {draw(log).write(folder)}", soft_wrap=True)
