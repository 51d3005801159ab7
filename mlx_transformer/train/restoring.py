"""What a run needs besides its steps: dropout, the restoring of a checkpoint, and the reason why it diverged."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

from mlx_transformer.nn.dropout import Dropout
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.weights import save_parts
from mlx_transformer.train.checkpoint import load_newest, save_checkpoint
from mlx_transformer.train.events import Progress, Step
from mlx_transformer.train.parallel import Ranks
from mlx_transformer.train.sharding import nbytes
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import RankLost, is_out_of_memory
from mlx_transformer.utils.trees import by_path

Arrays = dict[str, mx.array]
Checkpoint = tuple[Arrays, dict[str, Any], list[str]]


def load_checkpoint(folder: Path | None, step: TrainingStep) -> Checkpoint | None:
    """Return what this rank keeps of the newest checkpoint, as `load_newest`; rank 0 reads and sends it."""
    if folder is None:
        return None
    ranks, split = step.ranks, step.split
    found = ranks.in_turn(lambda: load_newest(folder, lazily=ranks.size > 1) if ranks.rank == 0 else None)
    if ranks.size == 1 or (rest := ranks.gather(found and found[1:])[0]) is None:
        return found
    arrays = ranks.send_arrays(found and found[0], step.shards.keep if split is None else split.keep)
    return arrays, rest[0], rest[1]


def save(
    folder: Path, number: int, step: TrainingStep, best: Arrays, progress: Progress, position: dict[str, Any]
) -> Path:
    """Let rank 0 write the checkpoint after step `number`, with what all ranks keep; return where.

    best: what this rank keeps of the best weights. position: of the data.
    """
    shards, split, ranks = step.shards, step.split, step.ranks
    tree = {"model": step.model.trainable_parameters(), "best": best, "optimizers": step.optimizers.state}
    tree |= {"memory": step.memory, "snapshots": step.snapshots}
    mx.eval(tree)  # before the ranks exchange their random state, which fails where one was lost in a step
    state = {"progress": asdict(progress), "data": data_state(position, ranks), **random_state(ranks)}
    arrays = by_path(tree)
    described = split.describe(arrays) if split else shards.describe(arrays)
    parts = split.stream(arrays, described) if split else shards.stream(arrays) if shards.layout else None

    def write(path: Path) -> None:
        assert parts is not None, "else the arrays themselves are written"
        try:
            save_parts(path, described, parts)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise RankLost from error

    if ranks.rank == 0:
        return save_checkpoint(folder, number, write if parts else arrays, state)
    for _ in parts or ():
        pass
    return folder


def finish_ranks(now: Progress, step: TrainingStep) -> None:
    """Note the memory of all ranks, and put a model together again of which each has a part, on rank 0.

    The memory: at the peak, of the weights, and of what is kept for the optimizers and the average.
    """
    kept = nbytes([step.optimizers.state, step.memory, step.snapshots])
    own = [now.peak_memory_bytes, nbytes(step.model.parameters()), kept]
    everyone = zip(*step.ranks.gather(own), strict=True)
    now.peak_memory_of_ranks, now.weights_of_ranks, now.optimizer_of_ranks = map(list, everyone)
    if step.split is not None:
        step.split.join()


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
