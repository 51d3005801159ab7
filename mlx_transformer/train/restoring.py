"""What a run needs besides its steps: dropout, the restoring of a checkpoint, and the reason why it diverged."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

from mlx_transformer.nn.dropout import Dropout
from mlx_transformer.nn.model import Model
from mlx_transformer.train.checkpoint import load_newest
from mlx_transformer.train.events import Progress, Step
from mlx_transformer.train.parallel import Ranks
from mlx_transformer.train.split import Split

Checkpoint = tuple[dict[str, mx.array], dict[str, Any], list[str]]


def whole(arrays: dict[str, mx.array], split: Split | None) -> dict[str, mx.array]:
    """Return the arrays of a checkpoint on rank 0, whole where each rank has a part; all ranks must call it."""
    return arrays if split is None else split.whole(arrays)


def finish_ranks(now: Progress, ranks: Ranks, split: Split | None) -> None:
    """Note the memory of all ranks, and put a model together again of which each has a part, on rank 0."""
    now.peak_memory_of_ranks = ranks.gather(now.peak_memory_bytes)
    if split is not None:
        split.join()


def load_checkpoint(folder: Path | None, ranks: Ranks, split: Split | None = None) -> Checkpoint | None:
    """Return this rank's part of the newest checkpoint, as `load_newest`; rank 0 reads and sends it to the others."""
    if folder is None:
        return None
    found = ranks.in_turn(lambda: load_newest(folder) if ranks.rank == 0 else None)
    if ranks.size == 1 or (rest := ranks.gather(found and found[1:])[0]) is None:
        return found
    arrays = ranks.send_arrays(found and found[0])
    return arrays if split is None else split.own(arrays), rest[0], rest[1]


def data_state(state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Return the position of the batches as a checkpoint stores it, with the lanes of every rank (ShardBatches)."""
    if "lanes" not in state:
        return state
    lanes = [lane for own in ranks.gather(state["lanes"])[: ranks.shares] for lane in own]
    return {name: value for name, value in state.items() if name != "rank"} | {"lanes": lanes}


def random_state(ranks: Ranks) -> dict[str, Any]:
    """Return the state of the random numbers of every rank, as a checkpoint stores it."""
    words = ranks.gather([int(word) for word in np.array(mx.random.state[0])])  # type: ignore[index]
    return {"random": words[0], **({"random_of_ranks": words} if len(words) > 1 else {})}


def restore_random(state: dict[str, Any], ranks: Ranks) -> None:
    """Restore the random numbers of this rank; one that the checkpoint does not know gets numbers of its own."""
    known = state.get("random_of_ranks", [state["random"]])
    high, low = known[ranks.rank] if ranks.rank < len(known) else state["random"]
    seed = high << 32 | low
    mx.random.seed(seed if ranks.rank < len(known) else ranks.own_seed(seed))  # mx.random.state cannot be assigned


def filled(name: str, tree: Any, arrays: dict[str, mx.array]) -> Any:
    """Return a tree like the given one with the stored arrays. Raises KeyError if one is missing or its shape differs.

    tree_unflatten would split the optimizers' keys, which are dotted paths, at their dots.
    """

    def stored(path: str, value: mx.array) -> mx.array:
        if arrays[f"{name}.{path}"].shape != value.shape:
            raise KeyError(f"{name}.{path}")
        return arrays[f"{name}.{path}"]

    return tree_map_with_path(stored, tree)


def describe(event: Step) -> str:
    values = (f"{name} {value:.4g}" for name, value in event.metrics.items())
    return ", ".join([*values, f"gradient norm {event.gradient_norm:.4g}"])


def divergence(now: Progress, figures: str) -> str:
    kept = "no evaluation came before it, so its weights are the initial ones"
    if now.best_valid_loss is not None:
        kept = "the weights of the best evaluation before it are kept"
    return f"diverged at step {now.step}: {figures}; {kept}: try a lower --learning-rate"


@contextmanager
def dropout_set(model: Model, p: float | None) -> Iterator[None]:
    """Set the probability of every Dropout of a model, and restore it at the end; None: unchanged."""
    before = [(part, part.p) for part in model.modules() if isinstance(part, Dropout)]
    for part, own in before:
        part.p = own if p is None else p
    try:
        yield
    finally:
        for part, own in before:
            part.p = own
