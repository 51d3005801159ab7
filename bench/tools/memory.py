"""Peak memory of a training step: as it is, and with the plain loss, whose logits are whole in memory.

`python -m bench memory --size base --batch-size 256 --out FILE.json`. A contestant is a recipe of the phase (`default`
is its own), or `plain`: the phase's own with every plain form of `ops`, under the same BLAS and streams. Each makes two
steps in a process of its own; the peak is what MLX counts, and the process's largest resident set stands beside it.
"""

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from bench import logfile
from bench.compare.plan import DEFAULT
from bench.workers import mlx_worker
from bench.workers.machine import describe_machine
from bench.workers.process import Worker, measure_once
from bench.workers.training_step import check_tokens, text_like
from mlx_transformer.backend import divided_blas, use_device
from mlx_transformer.nn.config import SIZES, choose_size
from mlx_transformer.ops import fastmath, loss
from mlx_transformer.run.flags import Device, Extent, File, Size, Text, WholeNumber, parse
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput, exit_cleanly

PLAIN = "plain"
_STEPS = 2


@dataclass
class Flags:
    """Measure the peak memory of a training step."""

    phase: WholeNumber = None
    """of the ladder (default: 1)"""
    branch: Text = None
    """one idea on top of the phase's trunk"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    batch_size: Extent = None
    """rows of a step (default: the recipe's)"""
    seq_len: Extent = None
    """tokens of a row (default: by size)"""
    recipes: Text = None
    """names with commas: default, plain, or recipes of the phase (default: default,plain)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: File = None
    """write what was found to this JSON file"""


class Steps:
    """The contestant: steps of one recipe, dropout 0."""

    def __init__(
        self, *, phase: int, branch: str | None, size: str, rows: int, config: dict[str, Any], recipe: str, device: str
    ) -> None:
        use_device(device)
        kind = find_branch(find_phase(phase), branch)
        name = None if recipe in (DEFAULT, PLAIN) else recipe
        rules = mlx_worker.make_recipe(phase, size, rows, config["seq_len"], name)
        self.plain, self.rows, self.config = recipe == PLAIN, rules.batch_size(config["seq_len"]), kind.Config(**config)
        model = kind(self.config)
        model.train()
        self.step = TrainingStep(model, rules)

    def facts(self) -> dict[str, Any]:
        return mlx_worker.describe_runtime()

    def round(self, steps: int) -> dict[str, Any]:
        """The peak of so many steps, bytes."""
        length = self.config.seq_len + 1
        batch = mx.array(text_like(self.rows * length, self.config.vocab_size).astype(np.int32).reshape(-1, length))
        plain = patch.multiple(loss, is_plain=lambda: self.plain), patch.multiple(fastmath, is_plain=lambda: self.plain)
        with plain[0], plain[1], divided_blas():
            mx.eval(self.step.state, batch)
            mx.reset_peak_memory()
            for _ in range(steps):
                metrics, norm = self.step(batch, 1e-4)
                mx.eval(metrics, norm, self.step.state)
        return {"peak_bytes": mx.get_peak_memory(), "loss": metrics["loss"].item()}


def measure(flags: Flags) -> dict[str, Any]:
    """Everything that was found, as the log holds it. Raises BadInput for what is not there."""
    device, phase = flags.device or "auto", flags.phase or 1
    use_device(device)
    size = choose_size(flags.size)
    module, names = find_phase(phase), (flags.recipes or f"{DEFAULT},{PLAIN}").split(",")
    for name in names:
        if name not in (DEFAULT, PLAIN, *module.RECIPES):
            raise BadInput(
                f"--recipes {name!r}: expected default, plain, or one of {', '.join(module.RECIPES) or 'none'}"
            )
    numbers: dict[str, Any] = {**SIZES[size], "dropout": 0.0} | ({"seq_len": flags.seq_len} if flags.seq_len else {})
    config = find_branch(module, flags.branch).Config(**numbers)
    rows = flags.batch_size or module.RECIPE.at(size).batch_size(config.seq_len)
    check_tokens(rows, config.seq_len)
    shared = {"phase": phase, "branch": flags.branch, "size": size, "rows": rows, "config": config.to_dict()}
    workers = {}
    for name in names:
        one = Worker(
            name=name,
            target="bench.tools.memory:Steps",
            settings={**shared, "recipe": name, "device": device},
        )
        workers[name] = measure_once(one, steps=_STEPS)
    return {
        "schema_version": 2,
        "measures": "memory",
        "machine": describe_machine(),
        **shared,
        "workers": workers,
    }


def show(log: dict[str, Any]) -> Table:
    """What was found, for people."""
    title = f"phase {log['phase']}, {log['size']}, batch {log['rows']} x {log['config']['seq_len']}: peak of a step"
    table = Table("recipe", "MLX's peak", "resident", "loss", title=title, caption=log["machine"]["device"])
    for name, one in log["workers"].items():
        sizes = (f"{one[key] / 1e9:.2f} GB" for key in ("peak_bytes", "max_rss_bytes"))
        table.add_row(name, *sizes, f"{one['loss']:.4f}")
    return table


def main() -> None:
    """The command line."""
    flags = parse(Flags, "python -m bench memory")
    logfile.check_out(flags.out)
    log = measure(flags)
    logfile.write_log(flags.out, log)
    Console(width=120).print(show(log))


if __name__ == "__main__":
    exit_cleanly(main)
