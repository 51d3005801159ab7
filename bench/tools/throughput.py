"""The core of the throughput tools: which training step to measure, and its passes measured interleaved.

`step` compares whole steps of fit() with PyTorch's; `sweep` and `memory` measure the passes of a step, each setting in
a process of its own.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.workers.mlx_worker import make_recipe
from bench.workers.passes import FULL
from bench.workers.process import Worker, WorkerFailed, WorkerProcess, started
from bench.workers.training_step import Task, check_tokens
from mlx_transformer.backend import matmul_gflops, use_device
from mlx_transformer.nn.config import SIZES, choose_size
from mlx_transformer.run.flags import Device, Extent, Size, Text, WholeNumber
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.utils.errors import is_out_of_memory

LEAST_ROUNDS = 3
_RECORDED = ("status", "why", "predicted_bytes", "flops_per_token", "peak_bytes", "decoding_bytes", "pass_seconds")


@dataclass
class StepFlags:
    """The training step to measure."""

    phase: WholeNumber = None
    """phase of the ladder (default: 1)"""
    branch: Text = None
    """branch of the phase"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    batch_size: Extent = None
    """sequences of a step (default: the recipe's)"""
    seq_len: Extent = None
    """tokens of a sequence (default: by size)"""
    device: Device = None
    """where to compute (default: auto)"""

    def task(self, recipe: str | None = None, **hyperparameters: Any) -> Task:
        """Return the step that the flags ask for. Raises BadInput for a phase, branch or number that cannot be."""
        device = self.device or "auto"
        use_device(device)
        hyperparameters |= {"seq_len": self.seq_len} if self.seq_len else {}
        return make_task(
            self.phase or 1,
            choose_size(self.size),
            device,
            branch=self.branch,
            recipe=recipe,
            batch_size=self.batch_size,
            **hyperparameters,
        )


def make_task(
    trained: Experiment | int,
    size: str,
    device: str,
    *,
    branch: str | None = None,
    recipe: str | None = None,
    batch_size: int | None = None,
    **hyperparameters: Any,
) -> Task:
    """Return a training step of an experiment or a phase.

    hyperparameters: fields of the Config other than the size's and the recipe's dropout.

    Raises BadInput for a phase, branch, recipe or number that cannot be.
    """
    shape = {**SIZES[size], **hyperparameters}
    experiment = Experiment.of_phase(trained) if isinstance(trained, int) else trained
    rules = make_recipe(experiment, size, batch_size, shape["seq_len"], recipe)
    dropout = {} if rules.dropout is None else {"dropout": rules.dropout}
    config = experiment.find_branch(branch).Config(**dropout | shape)
    check_tokens(rules.batch_size(config.seq_len), config.seq_len)
    return Task(
        phase=experiment.phase,
        file=None if experiment.code is None else experiment.code.path,
        branch=branch,
        size=size,
        config=config,
        recipe=rules,
        recipe_name=recipe,
        device=device,
    )


def describe(task: Task) -> dict[str, Any]:
    """Return a task as a log records it."""
    return {
        "phase": task.phase,
        "branch": task.branch,
        "size": task.size,
        "batch_size": task.batch_size,
        "config": task.config.to_dict(),
    }


def pass_worker(name: str, task: Task, **options: Any) -> Worker:
    """Return the worker that measures the passes of a step. options: of PassRounds."""
    own = {"recipe": task.recipe_name, "device": task.device, "file": task.file and str(task.file)}
    settings = {**describe(task), **own, **options}
    return Worker(name=name, target="bench.workers.passes:PassRounds", settings=settings)


def measure_passes(
    tasks: Mapping[str, Task], passes: Sequence[str], seconds: float, max_bytes: int
) -> dict[str, dict[str, Any]]:
    """Measure the passes of tasks interleaved, for `seconds` seconds each and LEAST_ROUNDS rounds at least.

    Answers by name: `status`, and unless that is FULL the seconds of every round and the peak memory by pass. A task
    that needs more than max_bytes (predicted, refused by the allocator, or killed by the system) is FULL. Raises
    WorkerFailed if a process ends for another reason.
    """
    with started([pass_worker(name, task, max_bytes=max_bytes) for name, task in tasks.items()]) as workers:
        found = {name: _ask(worker, passes=passes, peaks=True) for name, worker in workers.items()}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name, one in found.items() if one["status"] != FULL}
        end = time.perf_counter() + seconds * len(rounds)
        done = 0
        while rounds and (done < LEAST_ROUNDS or time.perf_counter() < end):
            for name in list(rounds):
                answer = _ask(workers[name], passes=passes)
                if answer["status"] == FULL:
                    found[name] = answer
                    del rounds[name]
                else:
                    rounds[name].append(answer["pass_seconds"])
            done += 1
    for name, own in rounds.items():
        found[name]["pass_seconds"] = {one: [seconds[one] for seconds in own] for one in passes}
    return {name: {key: one[key] for key in _RECORDED if key in one} for name, one in found.items()}


def _ask(worker: WorkerProcess, **request: Any) -> dict[str, Any]:
    try:
        return worker.ask(**request)
    except WorkerFailed as error:
        if error.code < 0 or is_out_of_memory(error.reason):  # a signal of the system, or an allocation that failed
            return {"status": FULL, "why": error.reason}
        raise


def median_seconds(setting: Mapping[str, Any], name: str) -> float:
    """Return the median seconds of a pass."""
    return float(np.median(setting["pass_seconds"][name]))


def best_matmul_gflops() -> float:
    """Return this machine's matmul throughput in GFLOP/s: the best of four half seconds, to exclude disturbances."""
    return max(matmul_gflops(0.5) for _ in range(4))
