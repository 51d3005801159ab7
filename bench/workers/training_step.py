"""The training step as a measured task: what every worker computes, and MLX's and PyTorch's worker for it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.workers.machine import threads, torch_device
from bench.workers.process import ALLOCATOR, UNTOUCHED, Worker, WorkerProcess, environment
from mlx_transformer.data.stream import Batches
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.model import Model
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path

WARM_UP = 3  # steps: the first compiles, the second starts from warm caches, the third is timed
BATCHES = 64  # different ones, repeated in a cycle
MOST_TOKENS = 1 << 22  # of a step: a larger graph takes too long to build


@dataclass(frozen=True, kw_only=True)
class Task:
    """The step that every worker computes. recipe: that of recipe_name, with its batch and learning rate replaced."""

    phase: int | None
    size: str
    config: Config
    recipe: Recipe
    device: str
    file: Path | None = None  # somebody's own, with the model
    branch: str | None = None
    recipe_name: str | None = None

    @property
    def batch_size(self) -> int:
        """Sequences of a step."""
        return self.recipe.batch_size(self.config.seq_len)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.config.seq_len


def check_tokens(batch_size: int, seq_len: int) -> None:
    """Raise BadInput for a step of too many tokens."""
    if batch_size * seq_len > MOST_TOKENS:
        raise BadInput(f"a batch of {batch_size} x {seq_len} tokens is too large: expected {MOST_TOKENS:,} at most")


def text_like(count: int, vocab_size: int) -> np.ndarray:
    """Draw tokens (count,) by Zipf's law, so that some are as frequent and some as rare as in a text."""
    shares = 1 / np.arange(1, vocab_size + 1)
    return np.random.default_rng(0).choice(vocab_size, count, p=shares / shares.sum()).astype(np.uint32)


def save_weights(path: Path, model: Model) -> None:
    """Write a model's weights as .npz, by parameter path, for the reference to load."""
    weights: dict[str, Any] = {name: np.array(value) for name, value in by_path(model.parameters()).items()}
    np.savez(path, **weights)


def lay_out(task: Task, model: Model, tokens: np.ndarray, batches: int, folder: Path) -> None:
    """Write what the workers of a task share: the tokens, the first batches of them, the initial weights."""
    folder.mkdir(exist_ok=True)
    stream = Batches(tokens, task.batch_size, task.config.seq_len)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "batches.npy", np.stack([next(stream) for _ in range(batches)]))
    save_weights(folder / "weights.npz", model)


def mlx_training(name: str, task: Task, folder: Path, **changes: str) -> Worker:
    """Return the worker that trains with fit(). changes: of its environment."""
    private = folder / f"{len(list(folder.iterdir()))}"  # the name may have characters that a path must not have
    private.mkdir()
    settings = {
        "experiment": str(task.phase if task.file is None else task.file),
        "branch": task.branch,
        "config": task.config.to_dict(),
        "size": task.size,
        "batch_size": task.batch_size,
        "recipe": task.recipe_name,
        "learning_rate": task.recipe.learning_rate,
        "tokens": str(folder / "tokens.npy"),
        "folder": str(private),
        "device": task.device,
    }
    target = "bench.workers.mlx_worker:TrainingRounds"
    return Worker(name=name, target=target, settings=settings, environment=environment(**changes))


def torch_training(name: str, task: Task, folder: Path, *, compiled: bool = False, tuned: bool = True) -> Worker:
    """Return the worker that trains the PyTorch reference. tuned: with the allocator settings of MLX's worker."""
    settings = {
        "phase": task.phase,
        "branch": task.branch,
        "config": task.config.to_dict(),
        "recipe": task.recipe.to_dict(),
        "weights": str(folder / "weights.npz"),
        "batches": str(folder / "batches.npy"),
        "device": torch_device(),
        "threads": threads(),
        "compiled": compiled,
    }
    variables = environment(**UNTOUCHED, **(ALLOCATOR if tuned else {}))
    return Worker(name=name, target="bench.reference:TrainingRounds", settings=settings, environment=variables)


def warm_up(workers: Mapping[str, WorkerProcess], say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Take WARM_UP steps with each worker; two answers of each, the second of a single step."""
    answers = {}
    for name, worker in workers.items():
        say(f"warming up {name}")
        answers[name] = [worker.ask(steps=WARM_UP - 1), worker.ask(steps=1)]
    return answers


def steps_per_round(seconds: Mapping[str, float], tokens: Mapping[str, int], least: float) -> dict[str, int]:
    """Choose each worker's steps so that all rounds have equally many tokens and none takes less than `least` seconds.

    seconds, tokens: of one step, by name.
    """
    most = max(least * tokens[name] / seconds[name] for name in seconds)
    return {name: max(1, math.ceil(most / tokens[name])) for name in seconds}
