"""Seconds and memory of the passes of a training step, for one setting in a process of its own.

A token of a training step takes

    6 N + 12 n_layers d_model L    FLOPs

(Chowdhery et al., "PaLM", appendix B). N: the weights that a token is multiplied with, the head's included; embedding
tables, biases and gains do not count. L: the sequence length. A multiply-add is 2 FLOPs and the backward pass takes
twice the forward pass. Masked scores count, since they are computed; recomputation does not.
tests/bench/tools/test_sweep.py checks it against the matmuls of real graphs.
"""

import functools
import math
import re
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx
from mlx.utils import tree_map

from bench.tools.graph import on_metal, trace, training_step
from bench.tools.kernels import peak_bytes
from bench.workers.gemm import Products
from bench.workers.machine import shown_bytes
from bench.workers.mlx_worker import describe_runtime, find_experiment, make_recipe
from bench.workers.training_step import text_like
from mlx_transformer.backend import device_info, divided_blas, split, use_device
from mlx_transformer.generate.decoding import Decoder
from mlx_transformer.nn.model import Model
from mlx_transformer.ops import fastmath
from mlx_transformer.ops import loss as ops_loss
from mlx_transformer.train.optim.groups import UpdateRule
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import is_out_of_memory
from mlx_transformer.utils.trees import by_path

FULL = "out of memory"
PASSES = ("forward", "gradients", "step", "decode", "products")
DECODED = 16  # tokens that are timed
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


class _NoUpdate(UpdateRule):
    """Leaves every weight unchanged, so that a step ends with the gradients and their norm."""

    def apply(self, gradient: mx.array, parameter: mx.array, state: Any, learning_rate: mx.array) -> mx.array:
        return parameter


class Passes:
    """A model, a batch, and its passes; each is evaluated before it returns."""

    def __init__(self, model: Model, recipe: Recipe, batch_size: int) -> None:
        config, random = model.config, [mx.random.state]
        tokens = text_like(batch_size * (config.seq_len + 1), config.vocab_size)
        self.model, self.recipe, self.dtype = model, recipe, getattr(mx, recipe.dtype)
        self.loss: Any = math.nan
        self.batch = mx.array(tokens.reshape(batch_size, -1).astype("int32"))
        frozen: Any = tuple(replace(group, optimizer=_NoUpdate()) for group in recipe.groups)
        self._gradients, self._step = TrainingStep(model, replace(recipe, groups=frozen)), TrainingStep(model, recipe)
        self._forward = mx.compile(self._mean_loss, inputs=[model.state, *random], outputs=random)
        model.train()
        mx.eval(self._step.state)

    def seconds(self, name: str) -> float:
        """Run a pass, one of PASSES; its seconds."""
        if name == "decode":
            return self.decode()
        start = time.perf_counter()
        getattr(self, name)()
        return time.perf_counter() - start

    def forward(self) -> None:
        """Compute the loss alone."""
        losses = []
        for stream, part, _ in split(self.batch):
            with mx.stream(stream):
                losses.append(self._forward(part))
        mx.eval(losses, mx.random.state)

    def gradients(self) -> None:
        """Compute the loss, its gradients and their norm."""
        self._run(self._gradients)

    def step(self) -> None:
        """Compute the loss, the gradients, their clipping and the update."""
        self._run(self._step)

    def products(self) -> None:
        """Compute the matrix products of a step alone."""
        self._products()

    def decode(self) -> float:
        """Decode at the end of the context; seconds per token, without prefill and compilation."""
        tokens = self._prefilled(Decoder(self.model))
        start = time.perf_counter()
        for _ in range(DECODED):
            next(tokens)
        seconds = (time.perf_counter() - start) / DECODED
        self.model.train()
        return seconds

    def decoding_bytes(self) -> int:
        """Decode at the end of the context; the peak memory beside the weights, without the prefill: caches."""
        decoder = Decoder(self.model)
        mx.eval(decoder.model.parameters(), self._step.state)
        mx.clear_cache()
        before = mx.get_active_memory()
        tokens = self._prefilled(decoder)
        mx.clear_cache()
        mx.reset_peak_memory()
        for _ in range(DECODED):
            next(tokens)
        self.model.train()
        return mx.get_peak_memory() - before

    def _prefilled(self, decoder: Decoder) -> Iterator[list[int]]:
        """Return the tokens that follow most of the batch; the prefill and the compilation are done."""
        self.model.eval()
        prompts: Any = self.batch[:, : max(1, self.batch.shape[1] - DECODED - 3)].tolist()
        tokens = decoder(prompts, DECODED + 2)
        next(tokens), next(tokens)
        return tokens

    def peak_bytes(self, name: str) -> int:
        """Run a pass twice, the first time compiling; the peak memory."""
        mx.clear_cache()
        mx.reset_peak_memory()
        for _ in range(2):
            self.seconds(name)
        return mx.get_peak_memory()

    @functools.cached_property
    def _products(self) -> Products:
        return Products(type(self.model), self.model.config, self.recipe, len(self.batch))

    def _run(self, step: TrainingStep) -> None:
        metrics, norm = step(self.batch, _LEARNING_RATE)
        mx.eval(metrics, norm, step.state)
        self.loss = metrics["loss"].item()

    def _mean_loss(self, part: mx.array) -> mx.array:
        """Compute the loss as in evaluation, without gradients, but in training mode and the recipe's dtype."""
        weights = self.model.trainable_parameters()
        self.model.update(tree_map(lambda w: w.astype(self.dtype), weights))
        ctx, targets = self.model.inputs(part)
        loss = self.model.token_loss(self.model.hidden(ctx), targets).mean()
        self.model.update(weights)
        return loss


class _Setting:
    """A worker of one model and one batch.

    file: somebody's own, with the model. max_bytes: limit of this process's memory. plain_ops: with the plain form of
    every operation, on the same BLAS and streams.
    """

    def __init__(
        self,
        *,
        phase: int | None,
        file: str | None = None,
        branch: str | None,
        recipe: str | None,
        size: str,
        config: dict[str, Any],
        batch_size: int,
        device: str,
        max_bytes: int | None = None,
        plain_ops: bool = False,
    ) -> None:
        use_device(device)
        trained = find_experiment(str(phase) if file is None else file)
        self.kind = trained.find_branch(branch)
        self.config = self.kind.Config(**config)
        self.recipe = make_recipe(trained, size, batch_size, self.config.seq_len, recipe)
        self.batch_size, self.max_bytes = batch_size, max_bytes
        for module in (ops_loss, fastmath) if plain_ops else ():
            patch.object(module, "is_plain", lambda: True).start()
        if max_bytes and sys.platform == "linux" and device_info().backend == "cpu":
            resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))  # before the system kills other programs

    def facts(self) -> dict[str, Any]:
        """Describe what the speed depends on."""
        return describe_runtime()


class GemmRounds(_Setting):
    """The worker `gemm` of `bench step`."""

    def round(self, steps: int) -> dict[str, Any]:
        """Compute the matrix products of so many steps."""
        with divided_blas():
            for _ in range(steps):
                self.products()
        return {"losses": []}

    @functools.cached_property
    def products(self) -> Products:
        return Products(self.kind, self.config, self.recipe, self.batch_size)


class PassRounds(_Setting):
    """The worker of `bench sweep` and `bench memory`: the passes of a step."""

    def round(self, passes: Sequence[str], peaks: bool = False) -> dict[str, Any]:
        """Run each pass once; `status` is "done" or FULL. peaks: before that, measure each one's peak memory."""
        found: dict[str, Any] = {}
        if peaks and self.max_bytes:
            predicted = predict_bytes(self.kind, self.config, self.recipe, self.batch_size, self.max_bytes)
            found["predicted_bytes"] = predicted
            if predicted > self.max_bytes:
                return found | {"status": FULL, "why": "by prediction"}
        try:
            with divided_blas():
                found |= self._peaks(passes) if peaks else {}
                seconds = {name: self.passes.seconds(name) for name in passes}
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return found | {"status": FULL, "why": str(error)}
        return found | {"status": "done", "pass_seconds": seconds, "loss": self.passes.loss}

    @functools.cached_property
    def passes(self) -> Passes:
        return Passes(self.kind(self.config), self.recipe, self.batch_size)

    def _peaks(self, passes: Sequence[str]) -> dict[str, Any]:
        peaks = {name: self.passes.peak_bytes(name) for name in passes}
        if self.max_bytes and (peak := max(peaks.values())) > self.max_bytes:
            raise MemoryError(f"{shown_bytes(peak)} at its peak")
        decoding = {"decoding_bytes": self.passes.decoding_bytes()} if "decode" in passes else {}
        return {"flops_per_token": flops_per_token(self.passes.model), "peak_bytes": peaks, **decoding}
