"""Peak memory of a training step: by recipe, and with the plain loss, whose full logits are in memory.

`python -m bench memory --size base --batch-size 256 --out FILE.json` measures recipes of the phase (`default` is its
own) and `plain`: the default with the plain form of every operation, on the same BLAS and streams. Each makes two steps
in a process of its own, without dropout; the peak is MLX's count, beside it the largest resident set of the process.
"""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench import logfile
from bench.compare.variants import DEFAULT
from bench.tools.throughput import StepFlags, describe, pass_worker
from bench.workers.machine import describe_machine, shown_bytes
from bench.workers.process import measure_once
from mlx_transformer.run.flags import File, Text, parse
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.terminal import Terminal

PLAIN = "plain"


@dataclass
class Flags(StepFlags):
    """Measure the peak memory of a training step."""

    recipes: Text = None
    """names with commas: default, plain, or recipes of the phase (default: default,plain)"""
    out: File = None
    """write everything that was measured to this JSON file"""


def measure(flags: Flags) -> dict[str, Any]:
    """Measure; the log. Raises BadInput for a recipe that is not there."""
    names, known = (flags.recipes or f"{DEFAULT},{PLAIN}").split(","), find_phase(flags.phase or 1).RECIPES
    for name in names:
        if name not in (DEFAULT, PLAIN, *known):
            raise BadInput(f"--recipes {name!r}: expected default, plain, or one of {', '.join(known) or 'none'}")
    task = flags.task(dropout=0.0)
    workers = {}
    for name in names:
        own = task if name in (DEFAULT, PLAIN) else flags.task(recipe=name, dropout=0.0)
        answer = measure_once(pass_worker(name, own, plain_ops=name == PLAIN), passes=["step"], peaks=True)
        workers[name] = {
            "peak_bytes": answer["peak_bytes"]["step"],
            **{key: answer[key] for key in ("max_rss_bytes", "loss", "facts")},
        }
    return {
        "schema_version": 2,
        "measures": "memory",
        "machine": describe_machine(),
        **describe(task),
        "workers": workers,
    }


def show(log: dict[str, Any]) -> Table:
    """Return a table for people."""
    shape = f"batch {log['batch_size']} x {log['config']['seq_len']}"
    title = f"phase {log['phase']}, {log['size']}, {shape}: peak memory of a step"
    table = Table("recipe", "MLX's peak", "resident", "loss", title=title, caption=log["machine"]["device"])
    for name, one in log["workers"].items():
        sizes = (shown_bytes(one[key]) for key in ("peak_bytes", "max_rss_bytes"))
        table.add_row(name, *sizes, f"{one['loss']:.4f}")
    return table


def main(prog: str = "python -m bench memory", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    logfile.check_out(flags.out)
    log = measure(flags)
    logfile.write_log(flags.out, log)
    Terminal(width=120).print(show(log))
