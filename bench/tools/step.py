"""Tokens per second of a training step, ours against PyTorch's, measured interleaved in one run.

`python -m bench step --size base --batch-size 32 --seq-len 64 --rounds 8 --out FILE.json`. Contestants:

    mlx              the real fit() with its curve and console; a round is the next so many of its Step events
    torch            the reference of the phase, with the allocator settings that ours makes for itself
    torch-compile    the same with torch.compile
    torch-installed  torch without the allocator settings
    gemm             the matrix products of ours alone: its ratio is the share that they have in a step's time
    plain            MLX as installed: ours with MLX_TRANSFORMER_PLAIN=1, one round only, since it is some 40x slower

All start from the same weights, see the same batches and have the same threads; while nothing is dropped out, their
losses must agree over the warm-up.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console as Terminal
from rich.table import Table

from bench import logfile
from bench.options import read_names
from bench.workers import training_step
from bench.workers.interleave import Ratio, interleave, speed_ratio
from bench.workers.machine import check_torch, describe_machine
from bench.workers.mlx_worker import make_recipe
from bench.workers.process import Worker, WorkerProcess, started
from bench.workers.training_step import BATCHES, WARM_UP, Task
from mlx_transformer.backend import use_device
from mlx_transformer.nn.config import SIZES, choose_size
from mlx_transformer.run.flags import Device, Extent, File, Number, Size, Text, WholeNumber, parse
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.utils.errors import RunFailed, exit_cleanly

AGAINST = ("torch", "torch-compile", "torch-installed", "gemm", "plain")
ROUND_SECONDS = 2.0  # of the fastest contestant, at least
MOST_APART = 1e-3  # nats between the losses of two contestants during the warm-up


@dataclass
class Flags:
    """Measure tokens per second of a training step, interleaved with PyTorch's."""

    phase: WholeNumber = None
    """of the ladder (default: 1)"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    batch_size: Extent = None
    """rows of a step (default: the recipe's)"""
    seq_len: Extent = None
    """tokens of a row (default: by size)"""
    dropout: Number = None
    """share of activations dropped on all sides (default: 0)"""
    rounds: WholeNumber = None
    """of every contestant (default: 8)"""
    steps: WholeNumber = None
    """of a round (default: as many as the fastest contestant makes in 2 seconds)"""
    against: Text = None
    """torch, torch-compile, torch-installed, gemm, plain, with commas (default: the first three)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: File = None
    """write every measured number to this JSON file"""


def read_task(flags: Flags) -> Task:
    """Raises BadInput for a phase or numbers that cannot be."""
    device = flags.device or "auto"
    use_device(device)
    phase, size = flags.phase or 1, choose_size(flags.size)
    numbers = {**SIZES[size], "dropout": flags.dropout or 0.0}
    numbers |= {"seq_len": flags.seq_len} if flags.seq_len else {}
    config = find_phase(phase).Config(**numbers)
    recipe = make_recipe(phase, size, flags.batch_size, config.seq_len)
    training_step.check_tokens(recipe.batch_size(config.seq_len), config.seq_len)
    return Task(phase=phase, size=size, config=config, recipe=recipe, device=device)


def make_workers(task: Task, against: list[str], folder: Path) -> list[Worker]:
    """mlx, then the others; what they share lies in the folder."""
    pieces = training_step.text_like(BATCHES * task.step_tokens + 1, task.config.vocab_size)
    training_step.lay_out(task, find_phase(task.phase).Model(task.config), pieces, BATCHES, folder)

    def other(name: str) -> Worker:
        if name == "gemm":
            return replace(training_step.mlx_training(name, task, folder), target="bench.workers.gemm:GemmRounds")
        if name == "plain":
            return training_step.mlx_training(name, task, folder, MLX_TRANSFORMER_PLAIN="1")
        compiled, tuned = name == "torch-compile", name != "torch-installed"
        return training_step.torch_training(name, task, folder, compiled=compiled, tuned=tuned)

    return [training_step.mlx_training("mlx", task, folder), *map(other, against)]


def measure(
    task: Task, children: dict[str, WorkerProcess], count: int, steps: int | None, say: Callable[[str], None]
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Answers by contestant, the warm-up's first; and the steps of a round."""
    fast = {name: child for name, child in children.items() if name != "plain"}
    answers = training_step.warm_up(fast, say)
    if "plain" in children:
        answers["plain"] = [children["plain"].ask(steps=1) for _ in range(2)]
    if steps is None:
        seconds = {name: answers[name][-1]["seconds"] for name in fast}
        tokens = dict.fromkeys(fast, task.step_tokens)
        steps = min(training_step.steps_per_round(seconds, tokens, ROUND_SECONDS).values())
    for name, own in interleave(fast, count, {key: {"steps": steps} for key in fast}, say).items():
        answers[name] += own
    return answers, steps


def check_losses(losses: dict[str, list[float]]) -> None:
    """Raises RunFailed if a contestant computes something else."""
    for name, own in losses.items():
        for i, (theirs, expected) in enumerate(zip(own[:WARM_UP], losses["mlx"], strict=False)):
            if not abs(theirs - expected) <= MOST_APART:  # nor if one is no number
                raise RunFailed(f"step {i + 1}: {name} has loss {theirs:.4f}, mlx {expected:.4f}: no comparison")


def compare(
    task: Task, against: list[str], count: int, steps: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure; everything that was found, as the log holds it."""
    machine = describe_machine()
    with (
        tempfile.TemporaryDirectory() as folder,
        started(make_workers(task, against, Path(folder))) as children,
    ):
        answers, steps = measure(task, children, count, steps, say)
        facts = {name: child.describe() for name, child in children.items()}
    losses = {name: [loss for answer in own for loss in answer["losses"]] for name, own in answers.items()}
    if not task.config.dropout:
        check_losses(losses)
    # The plain one has no rounds of its own: its second warm-up step is its figure.
    per_step = {
        name: [own[1]["seconds"]] if name == "plain" else [answer["seconds"] / steps for answer in own[2:]]
        for name, own in answers.items()
    }
    found = {
        name: {
            "tokens_per_second": task.step_tokens / float(np.median(per_step[name])),
            "seconds_per_step": per_step[name],
            "answers": answers[name],
            "facts": facts[name],
        }
        for name in answers
    }
    described = {"phase": task.phase, "size": task.size, "batch_size": task.batch_size}
    described["config"] = task.config.to_dict()
    described |= {"recipe": task.recipe.to_dict(), "rounds": count, "steps_per_round": steps, "warm_up": WARM_UP}
    ratios = [asdict(speed_ratio("mlx", name, per_step)) for name in against]
    return {
        "schema_version": 2,
        "measures": "step",
        "machine": machine,
        **described,
        "workers": found,
        "ratios": ratios,
    }


def show(log: dict[str, Any]) -> Table:
    """What was found, for people."""
    config, rows = log["config"], log["batch_size"]
    title = f"phase {log['phase']}, {log['size']}, batch {rows} x {config['seq_len']}, dropout {config['dropout']:g}"
    table = Table(
        "contestant", "tokens/s", "ms a step", "mlx is faster by (95 %)", title=title, caption=log["machine"]["device"]
    )
    ratios = {one["b"]: str(Ratio(**one)) for one in log["ratios"]}
    for name, one in log["workers"].items():
        milliseconds = 1000 * float(np.median(one["seconds_per_step"]))
        table.add_row(name, f"{one['tokens_per_second']:,.0f}", f"{milliseconds:.1f}", ratios.get(name, ""))
    return table


def main() -> None:
    """The command line."""
    flags = parse(Flags, "python -m bench step")
    against = read_names(flags.against, AGAINST, AGAINST[:3])
    task = read_task(flags)
    if any(name.startswith("torch") for name in against):
        check_torch(task.phase)
    logfile.check_out(flags.out)
    terminal = Terminal(width=120)
    log = compare(task, against, flags.rounds or 8, flags.steps, terminal.print)
    logfile.write_log(flags.out, log)
    terminal.print(show(log))


if __name__ == "__main__":
    exit_cleanly(main)
