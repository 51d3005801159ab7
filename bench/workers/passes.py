"""Seconds and memory of the passes of a training step, for one setting in a process of its own.

A token of a training step takes

    6 N + 12 n_layers d_model L    FLOPs

(Chowdhery et al., "PaLM", appendix B). N: the weights that a token is multiplied with, the head's included; embedding
tables, biases and gains do not count. L: the sequence length. A multiply-add is 2 FLOPs and the backward pass takes
twice the forward pass. Masked scores count, since they are computed; recomputation does not.
tests/bench/tools/test_sweep.py checks it against the matmuls of real graphs.
"""

import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx
from mlx.utils import tree_map

from bench.tools.graph import on_metal, trace, training_step
from bench.tools.kernels import peak_bytes
from bench.workers.mlx_worker import make_recipe
from bench.workers.training_step import text_like
from mlx_transformer.backend import device_info, divided_blas, split, use_device
from mlx_transformer.nn.model import Model
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.train.optim.groups import UpdateRule
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.trees import by_path

FULL = "out of memory"
LEAST_ROUNDS = 2
_LEARNING_RATE = 1e-5  # small: the weights hardly move
_TABLES = re.compile(r"(.*\.)?(value_)?embedding\.|position\.")


def flops_per_token(model: Model) -> int:
    """Return the FLOPs per token of a training step, forward and backward, by the formula above."""
    config, weights = model.config, by_path(model.parameters())
    looked_up = sum(w.size for path, w in weights.items() if w.ndim < 2 or _TABLES.match(path))
    if model.head.matrix(model.embedding) is model.embedding.weight:  # tied: the embedding multiplies too
        looked_up -= model.embedding.weight.size
    multiplied = model.count_parameters()["active"] - looked_up
    return 6 * multiplied + 12 * config.n_layers * config.d_model * config.seq_len


def predict_bytes(kind: type[Model], config: Any, recipe: Recipe, batch_size: int, most: int) -> int:
    """Predict the peak memory of a step from its graph, in bytes.

    Where a lower bound exceeds `most` already, return that and build no graph: three float32 per weight and the inputs
    of the blocks. On a CPU, whose kernels do not run in the order of the graph, a step takes up to twice that.
    """
    weights = kind(config).count_parameters()["total"]  # lazily: nothing is computed
    bound = 4 * (3 * weights + batch_size * config.seq_len * config.d_model * config.n_layers)
    if bound > most:
        return bound
    with on_metal():
        return peak_bytes(
            trace(training_step(kind(config), recipe), mx.zeros((batch_size, config.seq_len + 1), mx.int32))
        )


def is_about_memory(message: str) -> bool:
    """Whether an error message of MLX, Python or the BLAS is about missing memory."""
    return re.search("alloc|memory", message, re.IGNORECASE) is not None


class _NoUpdate(UpdateRule):
    """Leaves every weight unchanged, so that a step ends with the gradients and their norm."""

    def apply(self, gradient: mx.array, parameter: mx.array, state: Any, learning_rate: mx.array) -> mx.array:
        return parameter


class Passes:
    """A model, a batch, and the passes to time: forward, gradients, step; each is evaluated before it returns."""

    def __init__(self, model: Model, recipe: Recipe, batch_size: int) -> None:
        config, random = model.config, [mx.random.state]
        tokens = text_like(batch_size * (config.seq_len + 1), config.vocab_size)
        self.model, self.dtype = model, getattr(mx, recipe.dtype)
        self.batch = mx.array(tokens.reshape(batch_size, -1).astype("int32"))
        frozen: Any = tuple(replace(group, optimizer=_NoUpdate()) for group in recipe.groups)
        self._gradients, self._step = TrainingStep(model, replace(recipe, groups=frozen)), TrainingStep(model, recipe)
        self._loss = mx.compile(self._mean_loss, inputs=[model.state, *random], outputs=random)
        model.train()
        mx.eval(self._step.state)

    def forward(self) -> None:
        """Compute the loss alone."""
        losses = []
        for stream, part, _ in split(self.batch):
            with mx.stream(stream):
                losses.append(self._loss(part))
        mx.eval(losses, mx.random.state)

    def gradients(self) -> None:
        """Compute the loss, its gradients and their norm."""
        self._run(self._gradients)

    def step(self) -> None:
        """Compute the loss, its clipped gradients and the update."""
        self._run(self._step)

    def _run(self, step: TrainingStep) -> None:
        mx.eval(*step(self.batch, _LEARNING_RATE), step.state)

    def _mean_loss(self, batch: mx.array) -> mx.array:
        """Compute the loss as evaluation does, without gradients, but in training mode and the recipe's dtype."""
        weights = self.model.trainable_parameters()
        self.model.update(tree_map(lambda w: w.astype(self.dtype), weights))
        ctx, targets = self.model.inputs(batch)
        loss = self.model.token_loss(self.model.hidden(ctx), targets).mean()
        self.model.update(weights)
        return loss


class Setting:
    """One setting to measure. most_bytes: the memory that the process may use."""

    def __init__(
        self,
        *,
        phase: int,
        branch: str | None,
        size: str,
        config: dict[str, Any],
        batch_size: int,
        device: str,
        most_bytes: int,
        seconds: float,
    ) -> None:
        use_device(device)
        self.kind = find_branch(find_phase(phase), branch)
        self.config = self.kind.Config(**config)
        self.recipe = make_recipe(phase, size, batch_size, self.config.seq_len)
        self.batch_size, self.most, self.time = batch_size, most_bytes, seconds
        if sys.platform == "linux" and device_info().backend == "cpu":  # before the system kills other programs
            resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))

    def facts(self) -> dict[str, Any]:
        """Describe nothing: the log has the machine."""
        return {}

    def round(self) -> dict[str, Any]:
        """Measure the setting; `status` says whether the memory sufficed."""
        predicted = predict_bytes(self.kind, self.config, self.recipe, self.batch_size, self.most)
        answer: dict[str, Any] = {"predicted_bytes": predicted}
        if predicted > self.most:
            return answer | {"status": FULL, "why": "by prediction"}
        try:
            return answer | {"status": "done", **self._measure()}
        except (MemoryError, RuntimeError) as error:
            if not is_about_memory(repr(error)):
                raise
            return answer | {"status": FULL, "why": str(error)}

    def _measure(self) -> dict[str, Any]:
        model = self.kind(self.config)
        passes = Passes(model, self.recipe, self.batch_size)
        timed = {name: getattr(passes, name) for name in ("forward", "gradients", "step")}
        with divided_blas():
            peaks = {name: self._peak(run) for name, run in timed.items()}
            seconds = interleaved_seconds(timed, self.time)
        return {"flops_per_token": flops_per_token(model), "pass_seconds": seconds, "peak_bytes": peaks}

    def _peak(self, run: Callable[[], None]) -> int:
        """Return the peak bytes of the first two calls. Raises MemoryError if they exceed the limit."""
        mx.clear_cache()
        mx.reset_peak_memory()
        run()  # compiles
        run()
        peak = mx.get_peak_memory()
        if peak > self.most:
            raise MemoryError(f"{peak / 1e9:.2f} GB at its peak")
        return peak


def interleaved_seconds(timed: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Call each function in turn until so many seconds are over; the seconds of every call."""
    spent: dict[str, list[float]] = {name: [] for name in timed}
    end = time.perf_counter() + seconds
    while len(spent[name := next(iter(timed))]) < LEAST_ROUNDS or time.perf_counter() < end:
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            spent[name].append(time.perf_counter() - start)
    return spent
