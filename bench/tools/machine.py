"""Throughput of phase 1 on this machine: a minute at each size, one JSON file named by chip for the published table.

`python -m bench machine` runs `python -m phases.phase1` at nano, small and base on the built-in fables, each in a
process of its own, and writes results/bench/machines/CHIP.json as bench/machine.schema.json describes it. A person who
wants to share it copies it to results/published/machines/ and opens a pull request.
"""

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import logfile
from bench.compare.runs import Run, execute
from bench.compare.variants import Variant
from bench.tools.roofline import Flags as RooflineFlags
from bench.tools.roofline import chips, read_work
from bench.tools.throughput import best_matmul_gflops
from bench.workers.machine import describe_machine
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.backend import device_info, use_device
from mlx_transformer.nn.config import SIZES
from mlx_transformer.run.flags import Device, File, Positive, Text, parse
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import BadInput, RunFailed, exit_cleanly

MACHINES = Path("results/bench/machines")
SECONDS = 60.0  # of training at each size
PHASE, CORPUS = 1, "fables"  # need nothing but this checkout
_MEASURED = ("tokens_per_second", "best_valid_loss", "best_valid_bpb", "peak_memory_bytes", "tokens", "train_seconds")


@dataclass
class Flags:
    """Measure this machine: phase 1 on the built-in fables, for a minute at each size."""

    sizes: Text = None
    """of nano, small, base, with commas (default: all three)"""
    seconds: Positive = None
    """of training at each size (default: 60, as the published table requires)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: File = None
    """the JSON file (default: results/bench/machines/CHIP.json)"""


def slug(chip: str) -> str:
    """Turn a chip's name into a file name: "Apple M1 Max" -> "apple-m1-max"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", chip.lower())).strip("-") or "unknown"


def predicted(chip: str, size: str) -> float | None:
    """Predict tokens per second by `bench roofline`; None for a chip that it does not know."""
    known = chips().get(slug(chip).removeprefix("apple-"))
    return None if known is None else read_work(RooflineFlags(phase=PHASE, size=size))[1].tokens_per_second(known)


def train(size: str, seconds: float, device: str, folder: Path) -> dict[str, Any]:
    """Train in the folder; the run's result.json. Raises RunFailed with the run's last words."""
    flags = Settings(size=size, data=CORPUS, max_seconds=seconds, device=device)
    finished = execute(Run.of(Variant(phase=PHASE), flags), folder)
    if finished.status != "done" or finished.result is None:
        raise RunFailed(f"phase {PHASE} at {size}: {finished.error or finished.status}")
    return finished.result


def describe(
    results: dict[str, dict[str, Any]], machine: dict[str, Any], gflops: float, seconds: float
) -> dict[str, Any]:
    """Return the JSON of this machine, from the result.json of each size."""
    corpus, chip = next(iter(results.values()))["corpus"], device_info().name
    return {
        "schema_version": 1,
        "chip": chip,
        **machine,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "corpus": {"name": corpus["name"], "sha256": corpus["sha256"]},
        "matmul_gflops": gflops,
        "sizes": {
            size: {
                **{name: result[name] for name in (*_MEASURED, "stopped")},
                "predicted_tokens_per_second": predicted(chip, size),
                "parameters": result["parameters"]["total"],
                "batch_tokens": result["recipe"]["batch_tokens"],
                "seq_len": result["config"]["seq_len"],
            }
            for size, result in results.items()
        },
    }


def show(log: dict[str, Any]) -> Table:
    """Return a table for people."""
    caption = f"{log['device']}; a float32 matmul of 2048 x 2048: {log['matmul_gflops']:,.0f} GFLOP/s"
    heads = ("size", "tokens/s", "predicted", "parameters", "memory", "best validation loss")
    table = Table(*heads, title=f"phase {PHASE} on {CORPUS}, {log['seconds']:g} s each", caption=caption)
    for size, one in log["sizes"].items():
        measured, guess, loss = (
            one[name] for name in ("tokens_per_second", "predicted_tokens_per_second", "best_valid_loss")
        )
        table.add_row(
            size,
            "fewer than 10 steps" if measured is None else f"{measured:,.0f}",
            "" if guess is None else f"{guess:,.0f}",
            f"{one['parameters']:,}",
            f"{one['peak_memory_bytes'] / 1e9:.2f} GB",
            "" if loss is None else f"{loss:.3f}",
        )
    return table


def read_sizes(text: str | None) -> list[str]:
    """Read --sizes. Raises BadInput for an unknown one."""
    sizes = list(SIZES) if text is None else [name.strip() for name in text.split(",")]
    for size in sizes:
        if size not in SIZES:
            raise BadInput(f"--sizes {size!r}: expected some of {', '.join(SIZES)}, with commas")
    return list(dict.fromkeys(sizes))


def main() -> None:
    """Run the command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, "python -m bench machine")
    sizes, seconds, device = read_sizes(flags.sizes), flags.seconds or SECONDS, flags.device or "auto"
    chip = use_device(device).name
    out = flags.out or MACHINES / f"{slug(chip)}.json"
    logfile.check_out(out)
    terminal, machine = Console(width=120), describe_machine()
    terminal.print(f"{machine['device']}: {len(sizes)} runs of {seconds:g} s each; leave the machine idle otherwise")
    gflops = best_matmul_gflops()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            terminal.print(f"training at {size}")
            results[size] = train(size, seconds, device, Path(folder))
    log = describe(results, machine, gflops, seconds)
    logfile.write_log(out, log)
    terminal.print(show(log))
    whole = seconds == SECONDS and set(results) == set(SIZES)
    share = "to share it, copy it to results/published/machines/ and open a pull request"
    rest = share if whole else "not for the published table, which requires a minute at each size"
    terminal.print(f"{out}: {rest}", soft_wrap=True)


if __name__ == "__main__":
    exit_cleanly(main)
