"""Memory by variant: the peak of a training step, and the caches of a decoded sequence.

`python -m bench footprint --phases 4 4/linear 4/mla --size nano --out FILE.json` takes two steps of each variant, with
its recipe's batch, in a process of its own, as `bench memory` does for the recipes of one phase. The caches are those
of one sequence at the size's length and at 8,192 tokens, each with the configuration for that length: the bytes of
their arrays, positions included, which depend on shapes alone, so that nothing is computed. A step of decoding
allocates more than it keeps; `bench length cost` measures that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from rich.table import Table

from bench import logfile
from bench.compare.command import Phases
from bench.compare.variants import Variant
from bench.tools.throughput import make_task, pass_worker
from bench.workers.machine import describe_machine, shown_bytes
from bench.workers.process import measure_once
from bench.workers.training_step import Task
from mlx_transformer.backend import use_device
from mlx_transformer.nn.config import Config, choose_size
from mlx_transformer.nn.model import Model
from mlx_transformer.run.flags import Device, File, Size, parse
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.terminal import Terminal

LONG = 8192  # tokens of the longer sequence


@dataclass
class Flags:
    """Measure the memory of a training step, and of decoding by token."""

    phases: Phases = ()
    """such as 4, 4/linear, 6:RECIPE, my_idea.py"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: File = None
    """write everything that was measured to this JSON file"""


def cache_bytes(kind: type[Model], config: Config) -> int:
    """Return the bytes of the caches of one sequence as long as the configuration's."""
    model = kind(config)
    model.eval()
    cache = model.make_cache(1)
    model(mx.zeros((1, config.seq_len), mx.int32), cache)  # lazily: shapes alone
    return sum(array.nbytes for layer in cache.layers for array in layer.arrays.values())


def measure(variant: Variant, size: str, device: str) -> dict[str, Any]:
    """Return a row of the log. Raises BadInput for a variant that cannot be."""
    kind = variant.experiment.find_branch(variant.branch)

    def task(**hyperparameters: Any) -> Task:
        names: dict[str, Any] = {"branch": variant.branch, "recipe": variant.recipe_name}
        return make_task(variant.experiment, size, device, **names, **hyperparameters)

    own, long = task(), task(seq_len=LONG, batch_size=1)
    answer = measure_once(pass_worker(variant.name, own), passes=["step"], peaks=True)
    return {
        "name": variant.name,
        "batch_size": own.batch_size,
        "seq_len": own.config.seq_len,
        "step_bytes": answer["peak_bytes"]["step"],
        "cache_bytes": {str(one.config.seq_len): cache_bytes(kind, one.config) for one in (own, long)},
        "facts": answer["facts"],
    }


def show(log: Mapping[str, Any]) -> Table:
    """Return a table for people."""
    heads = ("variant", "step", f"caches at {log['rows'][0]['seq_len']}", f"at {LONG:,} tokens", "for each of these")
    table = Table(*heads, title=f"memory, {log['size']}", caption=log["machine"]["device"])
    for row in log["rows"]:
        short, long = row["cache_bytes"].values()
        table.add_row(
            row["name"],
            shown_bytes(row["step_bytes"]),
            f"{short / 1e3:,.1f} kB",
            f"{long / 1e3:,.1f} kB",
            f"{long / LONG:,.1f} B",
        )
    return table


def main(prog: str = "python -m bench footprint", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    if not flags.phases:
        raise BadInput("--phases is missing: expected variants, such as --phases 4 4/linear")
    use_device(flags.device or "auto")
    size = choose_size(flags.size)
    variants = dict.fromkeys(Variant.read(text) for text in flags.phases)
    logfile.check_out(flags.out)
    log: dict[str, Any] = {"schema_version": 2, "measures": "footprint", "machine": describe_machine(), "size": size}
    log["rows"] = [measure(variant, size, flags.device or "auto") for variant in variants]
    logfile.write_log(flags.out, log)
    Terminal(width=120).print(show(log))
