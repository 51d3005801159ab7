"""What the passes of a training step take, in seconds and in memory: one setting, in a process of its own.

A token of a training step takes

    6 N + 12 n_layers d_model L    FLOPs

(Chowdhery et al., "PaLM", appendix B): N the weights that a token is multiplied with (the head's among them; no table
that it is looked up in, no bias, no gain), L the sequence length. A multiplication and an addition are 2 FLOPs and the
backward pass takes twice the forward pass. Scores that the causal mask hides count, since they are computed; what is
computed a second time does not. tests/bench/test_sweep.py counts the matmuls of real graphs against it.
"""

import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx
from mlx import optimizers
from mlx.utils import tree_map

from bench.tools.graph import on_metal, trace, training_step
from bench.tools.kernels import peak_bytes
from bench.workers.ours import make_recipe
from bench.workers.training import text_like
from mlx_transformer.backend import device_info, divided_blas, split, use_device
from mlx_transformer.nn.model import Model
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.train.optim.groups import UpdateRule
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.trees import by_path

FULL = "out of memory"
LEAST_ROUNDS = 2
_RATE = 1e-5  # a step's learning rate: the weights hardly move
_TABLES = re.compile(r"(.*\.)?(value_)?embedding\.|position\.")  # a token is looked up in them


def flops_per_token(model: Model) -> int:
    """FLOPs of a training step, forward and backward, for each token, by the formula above."""
    config, weights = model.config, by_path(model.parameters())
    looked_up = sum(w.size for path, w in weights.items() if w.ndim < 2 or _TABLES.match(path))
    if model.head.matrix(model.embedding) is model.embedding.weight:  # tied: the embedding multiplies too
        looked_up -= model.embedding.weight.size
    multiplied = model.count_parameters()["active"] - looked_up
    return 6 * multiplied + 12 * config.n_layers * config.d_model * config.seq_len


def predict_bytes(kind: type[Model], config: Any, recipe: Recipe, rows: int, most: int) -> int:
    """Peak memory of a step, from its graph; a lower bound without a graph where that is more than `most` already.

    The bound is three float32 of each weight and the inputs of the blocks. On a CPU, where kernels do not run in the
    order of the graph, a step takes up to twice the prediction.
    """
    weights = kind(config).count_parameters()["total"]  # lazily: nothing is computed
    bound = 4 * (3 * weights + rows * config.seq_len * config.d_model * config.n_layers)
    if bound > most:
        return bound
    with on_metal():
        return peak_bytes(trace(training_step(kind(config), recipe), mx.zeros((rows, config.seq_len + 1), mx.int32)))


def is_about_memory(message: str) -> bool:
    """Whether what MLX, Python or the BLAS said means that there is no memory left."""
    return re.search("alloc|memory", message, re.IGNORECASE) is not None


class _Frozen(optimizers.Optimizer):
    """Leaves every weight as it is, so that a step ends with the gradients and their norm."""

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Nothing is remembered."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        return parameter


@dataclass(frozen=True)
class _NoUpdate(UpdateRule):
    def make(self) -> optimizers.Optimizer:
        return _Frozen()


class Passes:
    """A model, a batch, and what is timed: `forward`, `gradients`, `step`, each computed to the end when called."""

    def __init__(self, model: Model, recipe: Recipe, rows: int) -> None:
        config, random = model.config, [mx.random.state]
        pieces = text_like(rows * (config.seq_len + 1), config.vocab_size)
        self.model, self.dtype = model, getattr(mx, recipe.dtype)
        self.batch = mx.array(pieces.reshape(rows, -1).astype("int32"))
        frozen: Any = tuple(replace(group, optimizer=_NoUpdate()) for group in recipe.groups)
        self._gradients, self._step = TrainingStep(model, replace(recipe, groups=frozen)), TrainingStep(model, recipe)
        self._loss = mx.compile(self._mean_loss, inputs=[model.state, *random], outputs=random)
        model.train()
        mx.eval(self._step.state)

    def forward(self) -> None:
        """The loss alone."""
        losses = []
        for stream, rows, _ in split(self.batch):
            with mx.stream(stream):
                losses.append(self._loss(rows))
        mx.eval(losses, mx.random.state)

    def gradients(self) -> None:
        """The loss, its gradients and their norm."""
        self._run(self._gradients)

    def step(self) -> None:
        """All of that, clipped, and the update."""
        self._run(self._step)

    def _run(self, step: TrainingStep) -> None:
        mx.eval(*step(self.batch, _RATE), step.state)

    def _mean_loss(self, rows: mx.array) -> mx.array:
        """As evaluation has it, which makes no gradients on the side; but in training mode and the recipe's dtype."""
        weights = self.model.trainable_parameters()
        self.model.update(tree_map(lambda w: w.astype(self.dtype), weights))
        ctx, targets = self.model.inputs(rows)
        loss = self.model.token_loss(self.model.hidden(ctx), targets).mean()
        self.model.update(weights)
        return loss


class Setting:
    """The contestant that bench.child drives for one setting. Of a process's memory, `most_bytes` are for use."""

    def __init__(
        self,
        *,
        phase: int,
        branch: str | None,
        size: str,
        config: dict[str, Any],
        rows: int,
        device: str,
        most_bytes: int,
        seconds: float,
    ) -> None:
        use_device(device)
        self.kind = find_branch(find_phase(phase), branch)
        self.config = self.kind.Config(**config)
        self.recipe = make_recipe(phase, size, rows, self.config.seq_len)
        self.rows, self.most, self.time = rows, most_bytes, seconds
        if sys.platform == "linux" and device_info().backend == "cpu":  # before the system ends other programs
            resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))

    def facts(self) -> dict[str, Any]:
        return {}

    def round(self) -> dict[str, Any]:
        """Everything that is found of the setting; its status says whether the memory sufficed."""
        predicted = predict_bytes(self.kind, self.config, self.recipe, self.rows, self.most)
        found: dict[str, Any] = {"predicted_bytes": predicted}
        if predicted > self.most:
            return found | {"status": FULL, "why": "by prediction"}
        try:
            return found | {"status": "done", **self._measure()}
        except (MemoryError, RuntimeError) as error:
            if not is_about_memory(repr(error)):
                raise
            return found | {"status": FULL, "why": str(error)}

    def _measure(self) -> dict[str, Any]:
        model = self.kind(self.config)
        passes = Passes(model, self.recipe, self.rows)
        timed = {name: getattr(passes, name) for name in ("forward", "gradients", "step")}
        with divided_blas():
            peaks = {name: self._peak(run) for name, run in timed.items()}
            seconds = take_turns(timed, self.time)
        return {"flops_per_token": flops_per_token(model), "pass_seconds": seconds, "peak_bytes": peaks}

    def _peak(self, run: Callable[[], None]) -> int:
        """Bytes at most while something runs for the first two times. Raises MemoryError if they are too many."""
        mx.clear_cache()
        mx.reset_peak_memory()
        run()  # compiles
        run()
        peak = mx.get_peak_memory()
        if peak > self.most:
            raise MemoryError(f"{peak / 1e9:.2f} GB at its peak")
        return peak


def take_turns(timed: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, one after the other in turn, until so many seconds are over."""
    spent: dict[str, list[float]] = {name: [] for name in timed}
    end = time.perf_counter() + seconds
    while len(spent[name := next(iter(timed))]) < LEAST_ROUNDS or time.perf_counter() < end:
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            spent[name].append(time.perf_counter() - start)
    return spent
