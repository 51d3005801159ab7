"""Predicted throughput on a Mac: FLOPs, bytes and launches of the graph against a chip's public peak figures.

`python -m bench roofline --chip m1-max --phase 1 --size base` predicts the tokens per second of a training step, as a
range: nobody has measured them. A kernel takes the longer of its arithmetic and its memory traffic, a launch a fixed
time:

    seconds = sum over kernels of max(FLOPs / peak, bytes / bandwidth) / efficiency + launches * LAUNCH
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.table import Table

from bench.tools.graph import Graph, on_metal, trace, training_step
from bench.tools.kernels import Kernel, kernels, peak_bytes
from bench.workers.training_step import check_tokens
from mlx_transformer.nn.config import SIZES
from mlx_transformer.run.flags import Dtype, Extent, Size, Text, WholeNumber, parse
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.terminal import Terminal

# The shares of peak and bandwidth at the ends of the range. Half is an assumption: small matmuls, short kernels. Large
# float32 matmuls reached 13.3 of 16.2 TFLOP/s on an M4 Max (chsasank/device-benchmarks, pull request 13), memory
# traffic 122 of 153.6 GB/s on an M5 (michaelstinkerings.org, "Apple M5 GPU roofline analysis"): 82 and 79 %.
EFFICIENCIES = (0.50, 0.82)
LAUNCH = 5.2e-6  # s, for one more RMSNorm in a queue: antonellof/ferrox, issue 149
FOR_THE_GPU = 0.75  # of the memory: macOS's recommended maximum working set of Metal

ASSUMPTIONS = f"""\
Assumed: kernels reach {EFFICIENCIES[0]:.0%} to {EFFICIENCIES[1]:.0%} of the peak and of the bandwidth, with no cache
between kernels; a launch costs {LAUNCH * 1e6:.1f} us; only matmuls count as arithmetic. ~ marks an estimated clock.
Sources: chips.json and roofline.py in bench/tools."""


@dataclass(frozen=True)
class Chip:
    """The peak figures of a chip with all its GPU cores."""

    name: str
    gpu_cores: int
    clock_ghz: float
    float16_ratio: float  # speed of float16 matmuls over float32
    bfloat16_ratio: float
    bandwidth_gb_s: float
    memory_gb: tuple[int, int]  # smallest and largest configuration
    estimate: bool  # whether the clock is estimated

    def flops(self, dtype: mx.Dtype) -> float:
        """Return the peak FLOP/s: 128 multiply-adds per core and cycle, in float32."""
        ratio = {mx.float16: self.float16_ratio, mx.bfloat16: self.bfloat16_ratio}.get(dtype, 1)
        return self.gpu_cores * 128 * 2 * self.clock_ghz * 1e9 * ratio

    def describe(self) -> str:
        """Describe the chip, such as "m1-max, 32 GPU cores, 10.4 TFLOP/s, 400 GB/s"."""
        about = "~" if self.estimate else ""
        peak = self.flops(mx.float32) / 1e12
        return f"{self.name}, {self.gpu_cores} GPU cores, {about}{peak:.1f} TFLOP/s, {self.bandwidth_gb_s:g} GB/s"


def _data() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("chips.json").read_text(encoding="utf-8"))


def chips() -> dict[str, Chip]:
    """Return every chip of chips.json by name."""
    data, found = _data(), {}
    for name, own in data["chips"].items():
        numbers = {**data["families"][name.split("-")[0]], **own, "memory_gb": tuple(own["memory_gb"])}
        found[name] = Chip(name, **{key: value for key, value in numbers.items() if key not in ("source", "bins")})
    return found


def find_chip(name: str) -> Chip | None:
    """Return a chip of chips.json, or one of its bins with fewer GPU cores, such as "m1-max-24"; None for neither."""
    if name in (known := chips()):
        return known[name]
    base, _, cores = name.rpartition("-")
    if base not in known or not cores.isdigit() or not 0 < int(cores) < known[base].gpu_cores:
        return None
    changes = {"name": name, "gpu_cores": int(cores), **_data()["chips"][base].get("bins", {}).get(cores, {})}
    return replace(known[base], **{**changes, "memory_gb": tuple(changes.get("memory_gb", known[base].memory_gb))})


@dataclass(frozen=True)
class Work:
    """The kernels and the peak memory of a training step."""

    tokens: int
    kernels: list[Kernel]
    peak_bytes: int

    @classmethod
    def of(cls, graph: Graph, tokens: int) -> "Work":
        """Return the work of a step's graph."""
        return cls(tokens, kernels(graph), peak_bytes(graph))

    def seconds(self, chip: Chip, efficiency: float = 1.0) -> dict[str, float]:
        """Return the seconds spent on arithmetic, on memory traffic and on launches."""
        spent = {"arithmetic": 0.0, "memory traffic": 0.0, "launches": 0.0}
        for kernel in self.kernels:
            arithmetic = kernel.flops / chip.flops(kernel.dtype)
            traffic = kernel.nbytes / (chip.bandwidth_gb_s * 1e9)
            spent["arithmetic" if arithmetic > traffic else "memory traffic"] += max(arithmetic, traffic) / efficiency
            spent["launches"] += kernel.launches * LAUNCH
        return spent

    def tokens_per_second(self, chip: Chip, efficiency: float) -> float:
        return self.tokens / sum(self.seconds(chip, efficiency).values())

    def predict(self, chip: Chip) -> tuple[float, float]:
        """Return the least and the most tokens per second: at the two EFFICIENCIES."""
        least, most = (self.tokens_per_second(chip, efficiency) for efficiency in EFFICIENCIES)
        return least, most

    def total(self, name: str) -> int:
        """Return the sum of a number over the kernels: launches, flops or nbytes."""
        return sum(getattr(kernel, name) for kernel in self.kernels)


@dataclass
class Flags:
    """Predict the throughput of a training step on Apple silicon; nothing is measured."""

    chip: Text = None
    """m1, m1-pro, m1-max, ..., with fewer GPU cores m1-max-24, or all (default: all)"""
    phase: WholeNumber = None
    """phase of the ladder (default: 1)"""
    branch: Text = None
    """branch of the phase"""
    size: Size = None
    """nano, small or base (default: base)"""
    batch_size: WholeNumber = None
    """sequences of a step (default: the recipe's)"""
    seq_len: Extent = None
    """tokens of a sequence (default: by size)"""
    dtype: Dtype = None
    """precision of forward and backward (default: the recipe's)"""


def read_work(flags: Flags) -> tuple[str, Work]:
    """Return a description of the step that the flags ask for, and its work. Raises BadInput."""
    phase = flags.phase or 1
    module = find_phase(phase)
    kind = find_branch(module, flags.branch)
    size = "base" if flags.size in (None, "auto") else flags.size
    config = kind.Config(**{**SIZES[size], **({"seq_len": flags.seq_len} if flags.seq_len else {})})
    recipe = module.RECIPE.at(size)
    recipe = replace(recipe, dtype=flags.dtype or recipe.dtype).check()
    batch_size = flags.batch_size or max(1, recipe.batch_tokens // config.seq_len)
    check_tokens(batch_size, config.seq_len)
    with on_metal():
        graph = trace(training_step(kind(config), recipe), mx.zeros((batch_size, config.seq_len + 1), mx.int32))
    name = f"phase {phase}{f' {flags.branch}' if flags.branch else ''}, {size}, {recipe.dtype}"
    return f"{name}, batch {batch_size} x {config.seq_len}", Work.of(graph, batch_size * config.seq_len)


def memory(work: Work, chip: Chip) -> str:
    """Compare the step's peak memory with the chip's."""
    need, (least, most) = work.peak_bytes / 1e9, chip.memory_gb
    room = [size for size in (least, most) if need < size * FOR_THE_GPU]
    return f"{need:.1f} GB of {least}-{most} GB: {('does not fit', 'fits the larger ones', 'fits')[len(room)]}"


def spread(least: float, most: float) -> str:
    """Format a range with three digits, such as "88,100-140,000"."""
    return "-".join(f"{float(f'{end:.3g}'):,.0f}" for end in (least, most))


def one(what: str, work: Work, chip: Chip) -> str:
    """Return the prediction for a chip and its arithmetic, in lines."""
    spent, shares = work.seconds(chip), spread(*(100 * e for e in EFFICIENCIES))
    slowest, fastest = (1e3 * sum(work.seconds(chip, e).values()) for e in EFFICIENCIES)
    kernels_ms = 1e3 * (spent["arithmetic"] + spent["memory traffic"])
    bound = max(("arithmetic", "memory traffic"), key=lambda name: spent[name])
    return "\n".join(
        [
            f"{chip.describe()}: a training step of {what}",
            f"  predicted {spread(*work.predict(chip))} tokens/s ({spread(fastest, slowest)} ms per step)",
            f"  {work.total('flops') / 1e12:.3f} TFLOP, {work.total('nbytes') / 1e9:.2f} GB, "
            f"{work.total('launches'):,} launches per step",
            f"  at peak: {1e3 * spent['arithmetic']:.1f} ms in kernels limited by arithmetic, "
            f"{1e3 * spent['memory traffic']:.1f} ms by memory traffic (predicted: most by {bound})",
            f"  predicted: {kernels_ms:.1f} ms / {shares} % + {work.total('launches'):,} launches x "
            f"{LAUNCH * 1e6:.1f} us = {spread(fastest, slowest)} ms",
            f"  memory, predicted: {memory(work, chip)}",
        ]
    )


def table(what: str, work: Work) -> Table:
    """Return a table with a row per chip."""
    shares = spread(*(100 * e for e in EFFICIENCIES))
    heads = ("chip", "TFLOP/s", "GB/s", f"predicted tokens/s, at {shares} %", "limited by", "memory")
    rows = Table(*heads, title=f"predicted: {what}")
    for chip in chips().values():
        spent = work.seconds(chip)
        about = "~" if chip.estimate else ""
        rows.add_row(
            chip.name,
            f"{about}{chip.flops(mx.float32) / 1e12:.1f}",
            f"{chip.bandwidth_gb_s:g}",
            spread(*work.predict(chip)),
            max(spent, key=lambda name: spent[name]),
            memory(work, chip),
        )
    return rows


def main(prog: str = "python -m bench roofline", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    chip = find_chip(flags.chip or "")
    if flags.chip not in (None, "all") and chip is None:
        raise BadInput(
            f"chip '{flags.chip}' is unknown: expected all or one of {', '.join(chips())}, "
            "or its name with fewer GPU cores, such as m1-max-24"
        )
    what, work = read_work(flags)
    if chip is None:
        Terminal(width=120).print(table(what, work))
    else:
        print(one(what, work, chip))
    print(ASSUMPTIONS)
