"""Tokens per second and memory of a training step over batch size, sequence length and width.

`python -m bench sweep --phase 1 --size small` measures every setting in a process of its own: the forward pass alone,
forward and backward, and the whole step, in turn. A setting that needs more than --max-memory (predicted from its
graph, said by the allocator, or ended by the system) counts as out of memory, and none that is larger is tried. It
writes sweep.json and a heat map, sweep.png. One setting is measured minutes after another, so that small differences
are the machine's: bench step compares. MFU is the share of the machine's own matmul rate (float32, 2048 x 2048) by the
formula of bench/passes.py.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import logfile
from bench.options import read_numbers
from bench.tools import heatmap
from bench.tools.machine import matmul_gflops
from bench.tools.roofline import FOR_THE_GPU
from bench.workers.machine import describe_machine
from bench.workers.mlx_worker import make_recipe
from bench.workers.passes import FULL, is_about_memory
from bench.workers.process import Worker, WorkerFailed, end_as_by_ctrl_c, measure_once
from bench.workers.training_step import check_tokens
from mlx_transformer.backend import device_info, use_device
from mlx_transformer.nn.config import SIZES, choose_size
from mlx_transformer.run.flags import Device, Folder, Positive, Size, Text, WholeNumber, parse
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.utils.errors import BadInput, Interrupted, exit_cleanly
from mlx_transformer.utils.files import check_place, usable

AXES = ("d_model", "seq_len", "batch_size")
LOG = "sweep.json"
SECONDS = 3.0  # of timing, for each setting
_SAME = ("phase", "branch", "size", "device", "seconds", "max_memory_bytes")  # where a sweep goes on

Setting = dict[str, Any]


@dataclass
class Flags:
    """Measure tokens per second and memory of a training step over batch size, sequence length and width."""

    phase: WholeNumber = None
    """of the ladder (default: 1)"""
    branch: Text = None
    """one idea on top of the phase's trunk"""
    size: Size = None
    """nano, small or base: what is varied (default: small on a CPU, base on a GPU)"""
    batch_sizes: Text = None
    """rows of a step, with commas (default: 1/16, 1/4, 1 and 4 times the recipe's)"""
    seq_lens: Text = None
    """tokens of a row, with commas (default: half, once and twice the size's)"""
    d_models: Text = None
    """widths, with commas, multiples of the size's head (default: half, once and twice the size's)"""
    seconds: Positive = None
    """of timing for each setting (default: 3)"""
    max_memory: Positive = None
    """GB that a setting may use (default: three quarters of the device's)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: Folder = None
    """where sweep.json and sweep.png go; goes on with the sweep that is there (default: results/bench/sweep_<time>)"""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is swept, and how."""

    phase: int
    branch: str | None
    size: str
    device: str
    seconds: float
    max_memory_bytes: int
    axes: tuple[list[int], ...]  # values of AXES, ascending

    @classmethod
    def read(cls, flags: Flags) -> "Grid":
        """Raises BadInput for a phase, a branch or numbers that cannot be."""
        device, phase = flags.device or "auto", flags.phase or 1
        use_device(device)
        size = choose_size(flags.size)
        own = SIZES[size]
        rows = make_recipe(phase, size, None, own["seq_len"]).batch_size(own["seq_len"])
        memory = flags.max_memory * 1e9 if flags.max_memory else FOR_THE_GPU * device_info().memory_bytes
        grid = cls(
            phase=phase,
            branch=flags.branch,
            size=size,
            device=device,
            seconds=flags.seconds or SECONDS,
            max_memory_bytes=int(memory),
            axes=(
                read_numbers("--d-models", flags.d_models) or _around(own["d_model"], 0.5, 1, 2),
                read_numbers("--seq-lens", flags.seq_lens) or _around(own["seq_len"], 0.5, 1, 2),
                read_numbers("--batch-sizes", flags.batch_sizes) or _around(rows, 1 / 16, 1 / 4, 1, 4),
            ),
        )
        for setting in grid.settings():
            grid.config(setting)
        return grid

    def settings(self) -> list[Setting]:
        """Every setting, none behind one that is larger in everything."""
        return [dict(zip(AXES, values, strict=True)) for values in itertools.product(*self.axes)]

    def config(self, setting: Setting) -> dict[str, Any]:
        """The numbers of a setting's model: heads of the size's width, d_ff in the size's proportion."""
        own, width = SIZES[self.size], setting["d_model"]
        head = own["d_model"] // own["n_heads"]
        if width % head:
            raise BadInput(f"--d-models {width}: expected multiples of {head}, the width of a head at {self.size}")
        check_tokens(setting["batch_size"], setting["seq_len"])
        numbers = {"d_model": width, "n_heads": width // head, "d_ff": own["d_ff"] * width // own["d_model"]}
        kind = find_branch(find_phase(self.phase), self.branch)
        recipe = make_recipe(self.phase, self.size, setting["batch_size"], setting["seq_len"])
        dropout = {} if recipe.dropout is None else {"dropout": recipe.dropout}
        return kind.Config(**{**own, **numbers, **dropout, "seq_len": setting["seq_len"]}).to_dict()


def _around(value: int, *factors: float) -> list[int]:
    return sorted({max(1, int(value * factor)) for factor in factors})


def measure(grid: Grid, setting: Setting) -> Setting:
    """What a process of its own finds of a setting. Raises RunFailed if it ends for another reason than memory."""
    numbers = {name: getattr(grid, name) for name in ("phase", "branch", "size", "device", "seconds")}
    task = numbers | {
        "config": grid.config(setting),
        "batch_size": setting["batch_size"],
        "most_bytes": grid.max_memory_bytes,
    }
    try:
        answer = measure_once(Worker(name=_name(setting), target="bench.workers.passes:Setting", settings=task))
    except WorkerFailed as error:
        if error.code < 0 or is_about_memory(error.reason):  # a signal: the system's, or an allocation that failed
            return setting | {"status": FULL, "why": error.reason}
        raise
    del answer["facts"]
    return setting | answer


def sweep(grid: Grid, log: dict[str, Any], save: Callable[[], None], say: Callable[[str], None]) -> None:
    """Put every setting that log["settings"] lacks there, in order."""
    known = {_place(one): one for one in log["settings"]}
    for setting in grid.settings():
        place = _place(setting)
        if place in known:
            continue
        full = next((one for at, one in known.items() if one["status"] == FULL and _is_within(at, place)), None)
        if full is None:
            found = measure(grid, setting)
        else:
            found = setting | {"status": FULL, "why": f"larger than {_name(full)}"}
        known[place] = judge(found, log["matmul_gflops"])
        log["settings"] = sorted(known.values(), key=_place)
        save()
        say(f"{_name(setting)}: {_told(known[place])}")


def judge(found: Setting, gflops: float) -> Setting:
    """With the rate and the share of the matmul rate that follow from the seconds."""
    if found["status"] == FULL:
        return found
    tokens = found["batch_size"] * found["seq_len"]
    rates = {name: tokens / float(np.median(seconds)) for name, seconds in found["pass_seconds"].items()}
    share = rates["step"] * found["flops_per_token"] / (gflops * 1e9)
    return found | {"tokens_per_second": rates["step"], "matmul_share": share}


def _place(setting: Setting) -> tuple[int, ...]:
    return tuple(setting[name] for name in AXES)


def _is_within(small: Sequence[int], large: Sequence[int]) -> bool:
    return all(a <= b for a, b in zip(small, large, strict=True))


def _name(setting: Setting) -> str:
    return f"d_model {setting['d_model']}, batch {setting['batch_size']} x {setting['seq_len']}"


def _told(found: Setting) -> str:
    if found["status"] == FULL:
        return f"{FULL} ({found['why']})"
    return f"{found['tokens_per_second']:,.0f} tokens/s, {found['peak_bytes']['step'] / 1e9:.2f} GB"


def best(settings: Sequence[Setting]) -> list[Setting]:
    """Of each width, the setting with the most tokens per second."""
    done = [one for one in settings if one["status"] != FULL]
    widths = sorted({one["d_model"] for one in done})
    return [max((o for o in done if o["d_model"] == d), key=lambda o: o["tokens_per_second"]) for d in widths]


def show(log: dict[str, Any]) -> Table:
    """What was found, for people; the best of each width in bold."""
    title = f"phase {log['phase']}{'/' + log['branch'] if log['branch'] else ''}, {log['size']}"
    caption = f"{log['machine']['device']}; matmul: {log['matmul_gflops']:,.0f} GFLOP/s"
    heads = ("d_model", "seq_len", "batch", "tokens/s", "forward", "backward", "update", "peak memory", "MFU")
    table = Table(*heads, title=title, caption=caption)
    for column in table.columns:
        column.justify = "right"
    top = best(log["settings"])
    for one in log["settings"]:
        place = map(str, _place(one))
        if one["status"] == FULL:
            table.add_row(*place, FULL, style="dim")
            continue
        forward, gradients, step = (1000 * float(np.median(seconds)) for seconds in one["pass_seconds"].values())
        table.add_row(
            *place,
            f"{one['tokens_per_second']:,.0f}",
            *(f"{ms:,.1f} ms" for ms in (forward, gradients - forward, step - gradients)),
            f"{one['peak_bytes']['step'] / 1e9:.2f} GB",
            f"{one['matmul_share']:.0%}",
            style="bold" if one in top else "",
        )
    return table


def open_log(path: Path, grid: Grid) -> dict[str, Any]:
    """The log of a sweep that goes on, or a new one. Raises BadInput if what is there is another sweep's."""
    mine = {name: getattr(grid, name) for name in _SAME}
    if logfile.exists(path):
        try:
            log = json.loads(path.read_text(encoding="utf-8"))
            theirs = {name: log[name] for name in _SAME}
            machine, now = log["machine"], describe_machine()
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"'{path}' is no log of a sweep ({error}): give another --out") from error
        for name in ("device", "versions", "commit"):
            mine[name], theirs[name] = now[name], machine[name]
        for name, value in mine.items():
            if theirs[name] != value:
                raise BadInput(f"'{path}' was begun with {name} {theirs[name]}, now it is {value}: give another --out")
        return log
    with usable(path.parent):
        check_place(path.parent)
        if path.parent.is_dir() and any(path.parent.iterdir()):
            raise BadInput(f"--out '{path.parent}' holds something else than a sweep: give another")
    logfile.check_out(path)
    log = {"schema_version": 1, "measures": "sweep", "complete": False, "machine": describe_machine(), **mine}
    return log | {"matmul_gflops": matmul_gflops(), "settings": [], "best": []}


def main() -> None:
    """The command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, "python -m bench sweep")
    grid = Grid.read(flags)
    folder = flags.out or Path("results/bench") / f"sweep_{time.strftime('%Y%m%d_%H%M%S')}"
    path, terminal = folder / LOG, Console(width=120)
    log = open_log(path, grid)

    def save() -> None:
        log["best"] = [dict(zip(AXES, _place(one), strict=True)) for one in best(log["settings"])]
        log["complete"] = set(map(_place, grid.settings())) <= set(map(_place, log["settings"]))
        logfile.write_log(path, log)

    save()
    try:
        sweep(grid, log, save, lambda text: terminal.print(text, soft_wrap=True))
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; the same command with --out {folder} goes on") from None
    save()
    terminal.print(show(log))
    for one in best(log["settings"]):
        terminal.print(f"best at {_name(one)}: {_told(one)}", soft_wrap=True)
    terminal.print(f"all of it: {path}, {heatmap.draw(log).write(folder)}", soft_wrap=True)


if __name__ == "__main__":
    exit_cleanly(main)
