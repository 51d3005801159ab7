"""Throughput of a training step by the number of ranks on this machine, measured interleaved.

`python -m bench step --ranks 1,2,4 --size base --out FILE.json`. One rank is one process with all threads and streams,
as a run has them; N ranks are N processes that share the threads, each with its share of the same batch. All start from
the same weights and have the same batches, so that their losses must agree over the warm-up. At the end each number of
ranks takes some steps that wait for their gradients, to time the exchange alone.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench.tools.throughput import describe
from bench.workers import training_step
from bench.workers.interleave import Ratio, interleave, speed_ratio
from bench.workers.machine import describe_machine, shown_bytes
from bench.workers.process import Worker, WorkerProcess, started
from bench.workers.training_step import BATCHES, WARM_UP, Task
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.utils.errors import BadInput, RunFailed

PROBED_STEPS = 4
MOST_APART = 1e-3  # nats between the losses of two numbers of ranks during the warm-up
Answers = dict[str, list[dict[str, Any]]]


def name_of(ranks: int) -> str:
    """Name a number of ranks: "1 process", "2 ranks"."""
    return "1 process" if ranks == 1 else f"{ranks} ranks"


def check_counts(counts: Sequence[int], task: Task) -> None:
    """Raise BadInput for a number of ranks that does not divide the batch."""
    for ranks in counts:
        if task.batch_size % ranks:
            raise BadInput(
                f"--ranks {ranks}: a batch of {task.batch_size} sequences cannot be divided: expected a divisor"
            )


def make_workers(task: Task, counts: Sequence[int], folder: Path) -> list[Worker]:
    """Return a worker for each number of ranks, and one process with the share of the largest number."""
    tokens = training_step.text_like(BATCHES * task.step_tokens + 1, task.config.vocab_size)
    model = find_branch(find_phase(task.phase), task.branch)(task.config)
    training_step.lay_out(task, model, tokens, 1, folder)
    workers = [
        replace(training_step.mlx_training(name_of(ranks), task, folder), ranks=ranks)
        for ranks in dict.fromkeys((1, *counts))
    ]
    if (most := max(counts)) > 1:
        share = replace(task, recipe=replace(task.recipe, batch_tokens=task.step_tokens // most))
        workers.append(training_step.mlx_training(share_name(most), share, folder))
    return workers


def share_name(ranks: int) -> str:
    """Name the process by itself with one share of the batch, by which a model of scaling knows the fixed cost."""
    return f"1 process, batch / {ranks}"


def check_losses(answers: Answers, names: Sequence[str]) -> None:
    """Raise RunFailed if the ranks compute something else than one process."""
    losses = {name: [loss for answer in answers[name] for loss in answer["losses"]][:WARM_UP] for name in names}
    for name, own in losses.items():
        for step, (theirs, expected) in enumerate(zip(own, losses[names[0]], strict=True), 1):
            if not abs(theirs - expected) <= MOST_APART:
                raise RunFailed(f"step {step}: {name} has loss {theirs:.4f}, {names[0]} {expected:.4f}: no comparison")


def measure(
    workers: dict[str, WorkerProcess], rounds: int, steps: int | None, seconds: float, say: Callable[[str], None]
) -> tuple[Answers, Answers, int]:
    """Return the answers of the warm-up and of the rounds, those of the probed steps, and the steps of a round."""
    answers = training_step.warm_up(workers, say)
    if steps is None:
        longest = max(own[-1]["seconds"] for own in answers.values())
        steps = max(1, round(seconds / longest))
    for name, own in interleave(workers, rounds, {name: {"steps": steps} for name in workers}, say).items():
        answers[name] += own
    probed = {
        name: [worker.ask(steps=PROBED_STEPS, probe=True)]
        for name, worker in workers.items()
        if worker.worker.ranks > 1
    }
    return answers, probed, steps


def compare(
    task: Task, counts: Sequence[int], rounds: int, steps: int | None, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure; the log (ranks.schema.json)."""
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder, started(make_workers(task, counts, Path(folder))) as workers:
        answers, probed, steps = measure(workers, rounds, steps, seconds, say)
        facts = {name: worker.describe() for name, worker in workers.items()}
        sizes = {name: worker.worker.ranks for name, worker in workers.items()}
        batches = {name: worker.worker.settings["batch_size"] for name, worker in workers.items()}
    names = [name_of(ranks) for ranks in counts]
    whole = [name for name in sizes if batches[name] == task.batch_size]
    if not task.config.dropout:
        check_losses(answers, whole)
    per_step = {name: [answer["seconds"] / steps for answer in own[2:]] for name, own in answers.items()}
    rows = {
        name: {
            "ranks": sizes[name],
            "batch_size": batches[name],
            "tokens_per_second": batches[name] * task.config.seq_len / float(np.median(per_step[name])),
            "seconds_per_step": per_step[name],
            "memory_bytes": memory(answers[name][-1]),
            "communication": communication(probed[name][0], per_step[name]) if name in probed else None,
            "facts": {key: value for key, value in facts[name].items() if key != "ranks"},
        }
        for name in sizes
    }
    return {
        "schema_version": 1,
        "measures": "ranks",
        "machine": machine,
        **describe(task),
        "recipe": task.recipe.to_dict(),
        "parameters": find_branch(find_phase(task.phase), task.branch)(task.config).count_parameters()["total"],
        "rounds": rounds,
        "steps_per_round": steps,
        "warm_up": WARM_UP,
        "losses": {name: [loss for answer in answers[name] for loss in answer["losses"]] for name in sizes},
        "workers": rows,
        "ratios": [asdict(speed_ratio(name, "1 process", per_step)) for name in names if name != "1 process"],
    }


def memory(answer: dict[str, Any]) -> list[int]:
    """Return the peak memory of each rank: of MLX on a GPU, else resident."""
    return [one.get("memory_bytes", one["max_rss_bytes"]) for one in answer.get("ranks", [answer])]


def communication(probed: dict[str, Any], per_step: list[float]) -> dict[str, Any]:
    """Describe the exchange of gradients: its seconds by itself, relative to a step, and its bandwidth.

    An all-reduce in a ring of N ranks sends 2 (N - 1) / N of the bytes from each rank.
    """
    ranks = len(probed["ranks"])
    seconds = [min(times) for times in zip(*(one["communication_seconds"] for one in probed["ranks"]), strict=True)]
    median = float(np.median(seconds))  # of the rank that came last, and so waited least for another
    return {
        "seconds": seconds,
        "share": median / float(np.median(per_step)),
        "messages": probed["messages"],
        "bytes": probed["message_bytes"],
        "bytes_per_second": 2 * (ranks - 1) / ranks * probed["message_bytes"] / median,
    }


def show(log: dict[str, Any]) -> Table:
    """Return a table for people."""
    config, branch = log["config"], f"/{log['branch']}" if log["branch"] else ""
    title = f"phase {log['phase']}{branch}, {log['size']}, batch {log['batch_size']} x {config['seq_len']}"
    heads = ("", "tokens/s", "ms per step", "speedup over 1 process (95 %)", "communication", "memory per rank")
    table = Table(*heads, title=title, caption=log["machine"]["device"])
    ratios = {one["a"]: str(Ratio(**one)) for one in log["ratios"]}
    for name, one in log["workers"].items():
        exchanged, most = one["communication"], max(one["memory_bytes"])
        table.add_row(
            name,
            f"{one['tokens_per_second']:,.0f}",
            f"{1000 * float(np.median(one['seconds_per_step'])):.1f}",
            ratios.get(name, ""),
            "" if exchanged is None else f"{100 * exchanged['share']:.1f} % of a step",
            shown_bytes(most),
        )
    return table
