"""Throughput and memory of a training step over batch size, sequence length and width.

`python -m bench sweep --size small` measures every setting in a process of its own: the forward pass, forward and
backward, and the whole step, interleaved; several --phases are interleaved too. A setting that needs more than
--max-memory (predicted from its graph, refused by the allocator, or killed by the system) is out of memory, and no
larger one is tried. It writes sweep.json and plots. Settings are measured minutes apart, so small differences between
them are the machine's: `bench step` compares. MFU is the share of the machine's matmul throughput (float32,
2048 x 2048) by the formula in bench/workers/passes.py.

The cost of a long context: `python -m bench sweep --phases 3 3/longformer --batch-sizes 1
--seq-lens 256,512,1024,2048,4096 --passes gradients,decode`. `bench length cost` is such a pair of sweeps, with slopes.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import logfile
from bench.compare.command import Phases
from bench.compare.variants import DEFAULT, Variant
from bench.options import read_names, read_numbers
from bench.tools import sweep_plots
from bench.tools.roofline import FOR_THE_GPU
from bench.tools.throughput import best_matmul_gflops, make_task, measure_passes, median_seconds
from bench.workers.machine import describe_machine, shown_bytes
from bench.workers.passes import FULL, PASSES
from bench.workers.process import end_as_by_ctrl_c
from bench.workers.training_step import Task
from mlx_transformer.backend import device_info, use_device
from mlx_transformer.nn.config import SIZES, choose_size
from mlx_transformer.run.flags import Device, Folder, Positive, Size, Text, parse
from mlx_transformer.utils.errors import BadInput, Interrupted
from mlx_transformer.utils.files import as_bad_input, check_place
from mlx_transformer.utils.terminal import Terminal

AXES = ("d_model", "seq_len", "batch_size")
LOG = "sweep.json"
SECONDS = 3.0  # of timing, for each setting
_SAME = ("names", "files", "size", "device", "passes", "seconds", "max_memory_bytes")  # of a log that resumes

Setting = dict[str, Any]


@dataclass
class Flags:
    """Measure throughput and memory of a training step over batch size, sequence length and width."""

    phases: Phases = ()
    """such as 2, 3/BRANCH, 2:RECIPE, my_idea.py, measured interleaved (default: 1)"""
    size: Size = None
    """nano, small or base: what is varied (default: small on a CPU, base on a GPU)"""
    batch_sizes: Text = None
    """sequences of a step, with commas (default: 1/16, 1/4, 1 and 4 times the recipe's)"""
    seq_lens: Text = None
    """tokens of a sequence, with commas (default: half, once and twice the size's)"""
    d_models: Text = None
    """widths, with commas, multiples of the size's head (default: the size's; of one phase half and twice too)"""
    passes: Text = None
    """of forward, gradients, step, decode, products (matrix products alone), with commas (default: the first three)"""
    seconds: Positive = None
    """of timing for each setting (default: 3)"""
    max_memory: Positive = None
    """GB that a setting may use (default: three quarters of the device's)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: Folder = None
    """folder of sweep.json and the plots; a sweep in it resumes (default: results/bench/sweep_<time>)"""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The settings to measure, and how."""

    variants: tuple[Variant, ...]
    size: str
    device: str
    passes: list[str]
    seconds: float
    max_memory_bytes: int
    axes: tuple[list[int], ...]  # values of AXES, ascending

    @classmethod
    def read(cls, flags: Flags) -> "Grid":
        """Read the flags. Raises BadInput for a phase, a branch or a number that cannot be."""
        device = flags.device or "auto"
        use_device(device)
        size = choose_size(flags.size)
        variants = tuple(dict.fromkeys(Variant.read(text) for text in flags.phases or ("1",)))
        if len({variant.name for variant in variants}) < len(variants):
            raise BadInput("--phases: two files have one name; rename one, since the tables name them so")
        widths = (0.5, 1, 2) if len(variants) == 1 else (1,)
        d_model, seq_len = SIZES[size]["d_model"], SIZES[size]["seq_len"]
        batch_size = make_task(variants[0].experiment, size, device).batch_size
        memory = flags.max_memory * 1e9 if flags.max_memory else FOR_THE_GPU * device_info().memory_bytes
        grid = cls(
            variants=variants,
            size=size,
            device=device,
            passes=read_names("--passes", flags.passes, PASSES, PASSES[:3]),
            seconds=flags.seconds or SECONDS,
            max_memory_bytes=int(memory),
            axes=(
                read_numbers("--d-models", flags.d_models) or _around(d_model, *widths),
                read_numbers("--seq-lens", flags.seq_lens) or _around(seq_len, 0.5, 1, 2),
                read_numbers("--batch-sizes", flags.batch_sizes) or _around(batch_size, 1 / 16, 1 / 4, 1, 4),
            ),
        )
        for setting in grid.settings():
            grid.tasks(setting)
        return grid

    @property
    def files(self) -> dict[str, str]:
        """The hashes of somebody's own code by variant."""
        codes = {
            one.name: one.experiment.code or one.experiment.find_recipe(one.recipe_name)[1] for one in self.variants
        }
        return {name: code.sha256 for name, code in codes.items() if code is not None}

    @property
    def names(self) -> list[str]:
        """The names of the variants."""
        return [variant.name for variant in self.variants]

    def settings(self) -> list[Setting]:
        """Return all settings; none comes after one that is larger on every axis."""
        return [dict(zip(AXES, values, strict=True)) for values in itertools.product(*self.axes)]

    def tasks(self, setting: Setting) -> dict[str, Task]:
        """Return the step of every variant in a setting: heads of the size's width, d_ff in the size's proportion."""
        sizes, width = SIZES[self.size], setting["d_model"]
        head = sizes["d_model"] // sizes["n_heads"]
        if width % head:
            raise BadInput(f"--d-models {width}: expected multiples of {head}, the width of a head at {self.size}")
        shape = {"d_model": width, "n_heads": width // head, "d_ff": sizes["d_ff"] * width // sizes["d_model"]}
        return {variant.name: self._task(variant, setting, shape) for variant in self.variants}

    def _task(self, variant: Variant, setting: Setting, shape: dict[str, Any]) -> Task:
        recipe = None if variant.recipe == DEFAULT else variant.recipe
        shared: dict[str, Any] = {"branch": variant.branch, "recipe": recipe, "batch_size": setting["batch_size"]}
        return make_task(variant.experiment, self.size, self.device, **shared, **shape, seq_len=setting["seq_len"])

    def is_complete(self, log: Mapping[str, Any]) -> bool:
        """Whether a log has every setting of every variant."""
        return len(log["settings"]) >= len(self.settings()) * len(self.variants)

    def measure(self, setting: Setting, names: Sequence[str]) -> dict[str, Setting]:
        """Measure these variants in a setting, interleaved; what was found by name."""
        tasks = {name: task for name, task in self.tasks(setting).items() if name in names}
        return measure_passes(tasks, self.passes, self.seconds, self.max_memory_bytes // len(self.variants))


def _around(value: int, *factors: float) -> list[int]:
    return sorted({max(1, int(value * factor)) for factor in factors})


def sweep(grid: Grid, log: dict[str, Any], save: Callable[[], None], say: Callable[[str], None]) -> None:
    """Measure every setting that log["settings"] lacks, in order."""
    known = {_place(one): one for one in log["settings"]}
    for setting in grid.settings():
        found: dict[str, Setting] = {}
        missing = [name for name in grid.names if _place({"name": name, **setting}) not in known]
        for name in missing:
            own = (one for one in known.values() if one["status"] == FULL and one["name"] == name)
            if full := next((one for one in own if all(one[axis] <= setting[axis] for axis in AXES)), None):
                found[name] = {"status": FULL, "why": f"larger than {_describe(full)}"}
        if rest := [name for name in missing if name not in found]:
            found |= grid.measure(setting, rest)
        for name in missing:
            one = judge({"name": name, **setting, **found[name]}, log["matmul_gflops"])
            known[_place(one)] = one
            log["settings"].append(one)
            say(f"{_describe(one)}: {_summary(one)}")
        save()


def judge(setting: Setting, gflops: float) -> Setting:
    """Add throughput and share of the matmul throughput, if the whole step was measured."""
    if setting["status"] == FULL or "step" not in setting["pass_seconds"]:
        return setting
    throughput = setting["batch_size"] * setting["seq_len"] / median_seconds(setting, "step")
    share = throughput * setting["flops_per_token"] / (gflops * 1e9)
    return setting | {"tokens_per_second": throughput, "matmul_share": share}


def _place(setting: Setting) -> tuple[Any, ...]:
    return tuple(setting[name] for name in ("name", *AXES))


def _describe(setting: Setting) -> str:
    shape = f"d_model {setting['d_model']}, batch {setting['batch_size']} x {setting['seq_len']}"
    return f"{setting['name']}, {shape}"


def _summary(setting: Setting) -> str:
    if setting["status"] == FULL:
        return f"{FULL} ({setting['why']})"
    throughput = f"{setting['tokens_per_second']:,.0f} tokens/s, " if "tokens_per_second" in setting else ""
    return f"{throughput}{shown_bytes(max(setting['peak_bytes'].values()))}"


def best(settings: Sequence[Setting]) -> list[Setting]:
    """Return the setting with the highest throughput of every variant and width."""
    done = [one for one in settings if "tokens_per_second" in one]
    groups = dict.fromkeys((one["name"], one["d_model"]) for one in done)
    return [
        max((o for o in done if (o["name"], o["d_model"]) == key), key=lambda o: o["tokens_per_second"])
        for key in groups
    ]


def show(log: dict[str, Any]) -> Table:
    """Return a table for people: medians; the best of every variant and width in bold."""
    caption = f"{log['machine']['device']}; matmul: {log['matmul_gflops']:,.0f} GFLOP/s"
    heads = ("", *AXES, "tokens/s", *log["passes"], "peak memory", "MFU")
    table = Table(*heads, title=f"passes of a training step, {log['size']}", caption=caption)
    for column in table.columns:
        column.justify = "right"
    top = best(log["settings"])
    for one in log["settings"]:
        place = map(str, _place(one))
        if one["status"] == FULL:
            table.add_row(*place, FULL, style="dim")
            continue
        measured = "tokens_per_second" in one
        table.add_row(
            *place,
            f"{one['tokens_per_second']:,.0f}" if measured else "",
            *(f"{1000 * median_seconds(one, name):,.1f} ms" for name in log["passes"]),
            shown_bytes(max(one["peak_bytes"].values())),
            f"{one['matmul_share']:.0%}" if measured else "",
            style="bold" if one in top else "",
        )
    return table


def open_log(path: Path, grid: Grid) -> dict[str, Any]:
    """Read the log of a sweep to resume, or begin one. Raises BadInput if anything else is there."""
    if not logfile.exists(path):
        check_folder(path)
        return begin(grid, best_matmul_gflops())
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"'{path}' is not the log of a sweep ({error}): give another --out") from error
    check_same(path, log, grid)
    return log


def check_folder(path: Path) -> None:
    """Raise BadInput if a new log cannot be written there, or its folder holds anything."""
    with as_bad_input(path.parent):
        check_place(path.parent)
        if path.parent.is_dir() and any(path.parent.iterdir()):
            raise BadInput(f"--out '{path.parent}' holds something else than a sweep: give another")
    logfile.check_out(path)


def begin(grid: Grid, gflops: float) -> dict[str, Any]:
    """Return the log of a sweep before the first setting. gflops: the machine's matmul throughput."""
    log = {"schema_version": 2, "measures": "sweep", "complete": False, "machine": describe_machine()}
    log |= {name: getattr(grid, name) for name in _SAME}
    return log | {"matmul_gflops": gflops, "settings": [], "best": []}


def check_same(path: Path, log: dict[str, Any], grid: Grid) -> None:
    """Raise BadInput unless a log, read from `path`, is of the same sweep, on the same machine and commit."""
    mine, now = {name: getattr(grid, name) for name in _SAME}, describe_machine()
    try:
        theirs = {name: log[name] for name in _SAME if name != "files"} | {"files": log.get("files", {})}
        machine = log["machine"]
    except (KeyError, TypeError) as error:
        raise BadInput(f"'{path}' is not the log of a sweep ({error}): give another --out") from error
    for name in ("device", "versions", "commit"):
        mine[name], theirs[name] = now[name], machine[name]
    for name, value in mine.items():
        if theirs[name] != value:
            raise BadInput(f"'{path}' was begun with {name} {theirs[name]}, now it is {value}: give another --out")


def main(prog: str = "python -m bench sweep", args: list[str] | None = None) -> None:
    """Run the command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, prog, args=args)
    grid = Grid.read(flags)
    folder = flags.out or Path("results/bench") / f"sweep_{time.strftime('%Y%m%d_%H%M%S')}"
    path, terminal = folder / LOG, Terminal(width=120)
    log = open_log(path, grid)

    def save() -> None:
        log["best"] = [{name: one[name] for name in ("name", *AXES)} for one in best(log["settings"])]
        log["complete"] = grid.is_complete(log)
        logfile.write_log(path, log)

    save()
    try:
        sweep(grid, log, save, lambda text: terminal.print(text, soft_wrap=True))
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; the same command with --out {folder} resumes") from None
    terminal.print(show(log))
    for one in best(log["settings"]):
        terminal.print(f"best at {_describe(one)}: {_summary(one)}", soft_wrap=True)
    plots = [str(picture.write(folder)) for picture in sweep_plots.draw(log)]
    terminal.print(f"written: {', '.join([str(path), *plots])}", soft_wrap=True)
