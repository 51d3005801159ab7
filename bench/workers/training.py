"""A training step as a thing to measure: what all contestants compute, and their processes, ours and PyTorch's."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.workers import rounds
from bench.workers.rounds import ALLOCATOR, UNTOUCHED, Child, Worker, environment
from mlx_transformer.data.stream import Batches
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.model import Model
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.utils.errors import BadInput

WARM_UP = 3  # steps: the first compiles, the second starts from warm caches, the third says how long one takes
BATCHES = 64  # different ones; then they come again
MOST_TOKENS = 1 << 22  # of a step; the graph of more is too long to build


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all contestants compute. `recipe` is `recipe_name` of the phase at `size`, but for batch and peak rate."""

    phase: int
    size: str
    config: Config
    recipe: Recipe
    device: str
    branch: str | None = None
    recipe_name: str | None = None

    @property
    def rows(self) -> int:
        """Of a step."""
        return self.recipe.batch_size(self.config.seq_len)

    @property
    def step_tokens(self) -> int:
        return self.rows * self.config.seq_len


def check_tokens(rows: int, seq_len: int) -> None:
    """Raises BadInput for a step that is too long."""
    if rows * seq_len > MOST_TOKENS:
        raise BadInput(f"a batch of {rows} x {seq_len} tokens is too large: expected {MOST_TOKENS:,} at most")


def text_like(count: int, vocab_size: int) -> np.ndarray:
    """Pieces (count,) drawn by Zipf's law, as frequent and rare ones are in a text."""
    shares = 1 / np.arange(1, vocab_size + 1)
    return np.random.default_rng(0).choice(vocab_size, count, p=shares / shares.sum()).astype(np.uint32)


def lay_out(task: Task, model: Model, pieces: np.ndarray, batches: int, folder: Path) -> None:
    """Put into the folder what the contestants of a task share: pieces, so many batches of them, initial weights."""
    folder.mkdir(exist_ok=True)
    stream = Batches(pieces, task.rows, task.config.seq_len)
    np.save(folder / "tokens.npy", pieces)
    np.save(folder / "batches.npy", np.stack([next(stream) for _ in range(batches)]))
    rounds.save_weights(folder / "weights.npz", model)


def ours(name: str, task: Task, folder: Path, **changes: str) -> Worker:
    """The real fit(); changes: of its environment."""
    own = folder / f"{len(list(folder.iterdir()))}"  # a name may have characters that a path must not have
    own.mkdir()
    settings = _described(task) | {
        "size": task.size,
        "rows": task.rows,
        "recipe": task.recipe_name,
        "learning_rate": task.recipe.learning_rate,
        "tokens": str(folder / "tokens.npy"),
        "folder": str(own),
        "device": task.device,
    }
    given = environment(rounds.threads(), **changes)
    return Worker(name=name, target="bench.workers.ours:TrainingRounds", settings=settings, environment=given)


def theirs(name: str, task: Task, folder: Path, *, compiled: bool = False, tuned: bool = True) -> Worker:
    """The reference; tuned: with the allocator settings that ours makes for itself."""
    settings = _described(task) | {
        "recipe": task.recipe.to_dict(),
        "weights": str(folder / "weights.npz"),
        "batches": str(folder / "batches.npy"),
        "device": rounds.torch_device(),
        "threads": rounds.threads(),
        "compiled": compiled,
    }
    given = environment(rounds.threads(), **UNTOUCHED, **(ALLOCATOR if tuned else {}))
    return Worker(name=name, target="bench.reference:TrainingRounds", settings=settings, environment=given)


def _described(task: Task) -> dict[str, Any]:
    return {"phase": task.phase, "branch": task.branch, "config": task.config.to_dict()}


def warm_up(children: Mapping[str, Child], say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Two answers of each child, over WARM_UP steps; the second is that of a single step."""
    answers = {}
    for name, child in children.items():
        say(f"warming up {name}")
        answers[name] = [child.ask(steps=WARM_UP - 1), child.ask(steps=1)]
    return answers


def steps_per_round(seconds: Mapping[str, float], tokens: Mapping[str, int], least: float) -> dict[str, int]:
    """From each contestant's seconds and tokens of a step: rounds of equal tokens, of so many seconds at least."""
    most = max(least * tokens[name] / seconds[name] for name in seconds)
    return {name: max(1, math.ceil(most / tokens[name])) for name in seconds}
