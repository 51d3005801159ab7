"""Throughput of a training step, MLX against PyTorch, measured interleaved in one run.

`python -m bench step --size base --batch-size 32 --seq-len 64 --rounds 8 --out FILE.json`. Workers:

    mlx              fit() with its curve and console; a round is the next so many of its Step events
    torch            the PyTorch reference of the phase, with the allocator settings that MLX's worker sets for itself
    torch-compile    the same with torch.compile
    torch-installed  torch without the allocator settings
    gemm             the matrix products of MLX's step alone: its ratio is their share of the step's time
    plain            MLX as installed, MLX_TRANSFORMER_PLAIN=1: one round only, since it is some 40x slower

`--ranks 1,2,4` measures processes that train together instead (ranks.py).

All start from the same weights and have the same batches and threads; without dropout, their losses must agree over the
warm-up.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench import logfile
from bench.options import read_names, read_numbers
from bench.tools import ranks
from bench.tools.throughput import StepFlags, describe, pass_worker
from bench.workers import training_step
from bench.workers.interleave import Ratio, interleave, speed_ratio
from bench.workers.machine import check_torch, describe_machine
from bench.workers.process import Worker, WorkerProcess, started
from bench.workers.training_step import BATCHES, WARM_UP, Task
from mlx_transformer.run.flags import File, Number, Text, WholeNumber, parse
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.terminal import Terminal

AGAINST = ("torch", "torch-compile", "torch-installed", "gemm", "plain")
ROUND_SECONDS = 2.0  # of the fastest worker, at least
MOST_APART = 1e-3  # nats between the losses of two workers during the warm-up


@dataclass
class Flags(StepFlags):
    """Measure the throughput of a training step, interleaved with PyTorch's."""

    dropout: Number = None
    """dropout of all workers (default: 0)"""
    rounds: WholeNumber = None
    """rounds of every worker (default: 8)"""
    steps: WholeNumber = None
    """steps of a round (default: as many as the fastest worker makes in 2 seconds)"""
    against: Text = None
    """torch, torch-compile, torch-installed, gemm, plain, with commas (default: the first three)"""
    ranks: Text = None
    """instead of PyTorch: numbers of processes that train together on this machine, with commas, such as 1,2,4"""
    out: File = None
    """write everything that was measured to this JSON file"""


def make_workers(task: Task, against: list[str], folder: Path) -> list[Worker]:
    """Return mlx and the others; the folder holds what they share."""
    tokens = training_step.text_like(BATCHES * task.step_tokens + 1, task.config.vocab_size)
    model = find_branch(find_phase(task.phase), task.branch)(task.config)
    training_step.lay_out(task, model, tokens, BATCHES, folder)

    def other(name: str) -> Worker:
        if name == "gemm":
            return replace(pass_worker(name, task), target="bench.workers.passes:GemmRounds")
        if name == "plain":
            return training_step.mlx_training(name, task, folder, MLX_TRANSFORMER_PLAIN="1")
        compiled, tuned = name == "torch-compile", name != "torch-installed"
        return training_step.torch_training(name, task, folder, compiled=compiled, tuned=tuned)

    return [training_step.mlx_training("mlx", task, folder), *map(other, against)]


def measure(
    task: Task, workers: dict[str, WorkerProcess], count: int, steps: int | None, say: Callable[[str], None]
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Measure; the answers by worker, beginning with the warm-up, and the steps of a round."""
    fast = {name: worker for name, worker in workers.items() if name != "plain"}
    answers = training_step.warm_up(fast, say)
    if "plain" in workers:
        answers["plain"] = [workers["plain"].ask(steps=1) for _ in range(2)]
    if steps is None:
        seconds = {name: answers[name][-1]["seconds"] for name in fast}
        tokens = dict.fromkeys(fast, task.step_tokens)
        steps = min(training_step.steps_per_round(seconds, tokens, ROUND_SECONDS).values())
    for name, own in interleave(fast, count, {key: {"steps": steps} for key in fast}, say).items():
        answers[name] += own
    return answers, steps


def check_losses(losses: dict[str, list[float]]) -> None:
    """Raise RunFailed if a worker computes something else than mlx."""
    for name, own in losses.items():
        for i, (theirs, expected) in enumerate(zip(own[:WARM_UP], losses["mlx"], strict=False)):
            if not abs(theirs - expected) <= MOST_APART:  # also where one is NaN
                raise RunFailed(f"step {i + 1}: {name} has loss {theirs:.4f}, mlx {expected:.4f}: no comparison")


def compare(
    task: Task, against: list[str], count: int, steps: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure; the log."""
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder, started(make_workers(task, against, Path(folder))) as workers:
        answers, steps = measure(task, workers, count, steps, say)
        facts = {name: worker.describe() for name, worker in workers.items()}
    losses = {name: [loss for answer in own for loss in answer["losses"]] for name, own in answers.items()}
    if not task.config.dropout:
        check_losses(losses)
    # plain has no rounds: its second warm-up step is its figure
    per_step = {
        name: [own[1]["seconds"]] if name == "plain" else [answer["seconds"] / steps for answer in own[2:]]
        for name, own in answers.items()
    }
    return {
        "schema_version": 2,
        "measures": "step",
        "machine": machine,
        **describe(task),
        "recipe": task.recipe.to_dict(),
        "rounds": count,
        "steps_per_round": steps,
        "warm_up": WARM_UP,
        "workers": {
            name: {
                "tokens_per_second": task.step_tokens / float(np.median(per_step[name])),
                "seconds_per_step": per_step[name],
                "answers": answers[name],
                "facts": facts[name],
            }
            for name in answers
        },
        "ratios": [asdict(speed_ratio("mlx", name, per_step)) for name in against],
    }


def show(log: dict[str, Any]) -> Table:
    """Return a table for people."""
    config, branch = log["config"], f"/{log['branch']}" if log["branch"] else ""
    shape = f"batch {log['batch_size']} x {config['seq_len']}, dropout {config['dropout']:g}"
    title = f"phase {log['phase']}{branch}, {log['size']}, {shape}"
    heads = ("worker", "tokens/s", "ms per step", "speedup of mlx (95 %)")
    table = Table(*heads, title=title, caption=log["machine"]["device"])
    ratios = {one["b"]: str(Ratio(**one)) for one in log["ratios"]}
    for name, one in log["workers"].items():
        milliseconds = 1000 * float(np.median(one["seconds_per_step"]))
        table.add_row(name, f"{one['tokens_per_second']:,.0f}", f"{milliseconds:.1f}", ratios.get(name, ""))
    return table


def main(prog: str = "python -m bench step", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    if flags.ranks is not None:
        measure_ranks(flags, read_numbers("--ranks", flags.ranks))
        return
    against = read_names("--against", flags.against, AGAINST, AGAINST[:3])
    task = flags.task(dropout=flags.dropout or 0.0)
    if any(name.startswith("torch") for name in against):
        check_torch(task.phase)
    logfile.check_out(flags.out)
    terminal = Terminal(width=120)
    log = compare(task, against, flags.rounds or 8, flags.steps, terminal.print)
    logfile.write_log(flags.out, log)
    terminal.print(show(log))


def measure_ranks(flags: Flags, counts: list[int]) -> None:
    """Measure several numbers of ranks. Raises BadInput for flags that do not go with them."""
    if flags.against is not None:
        raise BadInput(f"--against {flags.against} and --ranks {flags.ranks} exclude each other")
    task = flags.task(dropout=flags.dropout or 0.0)
    ranks.check_counts(counts, task)
    logfile.check_out(flags.out)
    terminal = Terminal(width=120)
    log = ranks.compare(task, counts, flags.rounds or 8, flags.steps, ROUND_SECONDS, terminal.print)
    logfile.write_log(flags.out, log)
    terminal.print(ranks.show(log))
