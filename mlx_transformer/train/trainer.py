"""fit(): one training loop, a generator of typed events, the one stream that console, log, bench and notebooks read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

from mlx_transformer.backend import divided_blas
from mlx_transformer.data.stream import Batches, Prefetch
from mlx_transformer.data.tokens import Tokens
from mlx_transformer.nn.model import Model
from mlx_transformer.train.checkpoint import load_newest, save_checkpoint
from mlx_transformer.train.evaluate import Evaluator
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path

_UNTIMED_STEPS = 5  # tokens per second counts from the step after these: the first ones compile and warm up


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What cuts a run short. None: no limit. They never move a schedule's horizon."""

    max_steps: int | None = None
    max_tokens: int | None = None
    max_epochs: float | None = None
    max_seconds: float | None = None  # of the training clock
    target_loss: float | None = None  # validation loss, nats per piece


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: all that is neither an array nor a setting, and what a checkpoint holds of it."""

    step: int = 0
    tokens: int = 0  # predicted so far
    epochs: float = 0.0
    train_seconds: float = 0.0  # the clock: all that a person waits for but evaluation and saving
    compile_seconds: float = 0.0  # a part of train_seconds
    eval_seconds: float = 0.0
    timed_tokens: int = 0  # what tokens per second is computed from
    timed_seconds: float = 0.0
    data_seconds: float = 0.0  # spent waiting for a batch
    best_valid_loss: float | None = None
    final_valid_loss: float | None = None
    evaluated_step: int = 0
    valid_losses: list[float] = field(default_factory=list)  # of every evaluation, which the rule to stop judges
    seconds_to_target: float | None = None
    tokens_to_target: int | None = None
    peak_memory_bytes: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens over the clock from the sixth step on; None under ten steps."""
        return self.timed_tokens / self.timed_seconds if self.step >= 10 and self.timed_seconds else None


@dataclass(frozen=True, kw_only=True)
class Step:
    """A finished step. metrics: the loss and whatever the model recorded; seconds: the clock."""

    step: int
    tokens: int
    epochs: float
    seconds: float
    metrics: dict[str, float]
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float | None
    data_wait_share: float


@dataclass(frozen=True, kw_only=True)
class Eval:
    """An evaluation over the whole validation split: nats per piece."""

    step: int
    tokens: int
    seconds: float
    valid_loss: float
    improved: bool


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint is complete on disk."""

    step: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The end; the model holds the best weights. why: plateau, max_steps, ..., target, interrupted, diverged."""

    why: str
    progress: Progress
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A run goes on from a checkpoint; notes: one sentence for each damaged one passed over."""

    step: int
    notes: list[str] = field(default_factory=list)


Event = Step | Eval | Saved | Stopped | Resumed


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is kept, as against how the model is trained. `eval_every` decides what is judged, and when."""

    checkpoints: Path | None = None  # the folder; None: nothing is saved
    eval_every: int | None = None  # steps; None: from the recipe's eval_tokens
    save_every: int | None = None  # steps; None: at each evaluation and at least every save_seconds
    save_seconds: float = 60.0
    compile: bool = True
    should_stop: Callable[[], bool] = lambda: False  # asked after each step; True saves and stops
    clock: Callable[[], float] = time.monotonic  # stands still while the machine sleeps


def fit(
    model: Model,
    recipe: Recipe,
    data: Tokens,
    *,
    seed: int = 0,
    limits: Limits = Limits(),
    options: RunOptions = RunOptions(),
) -> Iterator[Event]:
    """Train model in place and yield what happens; goes on from habits.checkpoints if it holds a checkpoint.

    The recipe is sized (`Recipe.at`). Raises BadInput if the training text is shorter than one sequence, the recipe
    cannot train the model (gradient checkpointing with dropout), or the checkpoint is another model's or damaged;
    RunFailed if the disk refuses a checkpoint.
    """
    with divided_blas(), _Run(model, recipe, data, seed, limits, options) as run:
        yield from run.events()


def default_eval_every(recipe: Recipe, data: Tokens, seq_len: int) -> int:
    """Steps between evaluations: the recipe's tokens, no fewer than the validation text has, which costs a third."""
    return -(-max(recipe.eval_tokens, len(data.valid)) // (recipe.batch_size(seq_len) * seq_len))


class _Run:
    """One run of fit(): the state that its parts share."""

    def __init__(
        self, model: Model, recipe: Recipe, data: Tokens, seed: int, limits: Limits, options: RunOptions
    ) -> None:
        self.model, self.recipe, self.limits, self.options = model, recipe, limits, options
        seq_len = model.config.seq_len
        self.pieces = len(data.train) - 1  # the opening boundary is never predicted
        self.eval_every = options.eval_every or default_eval_every(recipe, data, seq_len)
        mx.random.seed(seed)
        self.batches = Batches(data.train, partial(recipe.batch_size, seq_len), seq_len, seed)
        self.evaluate = Evaluator(model, data.valid, seq_len, compiled=options.compile)
        self.take_step = TrainingStep(model, recipe, compiled=options.compile)
        self.progress = Progress()
        self.best: dict[str, Any] = model.trainable_parameters()
        self.saved_at = options.clock()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "prefetch"):
            self.prefetch.close()

    def events(self) -> Iterator[Event]:
        if self.options.checkpoints is not None and (found := load_newest(self.options.checkpoints)):
            yield self._restore(*found)
        self.prefetch = Prefetch(self.batches)
        mx.reset_peak_memory()
        self.model.train()
        self.mark, self.started = self.options.clock(), self.progress.step
        why, message = self._verdict() or self._limit_reached(), ""
        if self.progress.evaluated_step != self.progress.step and (why or self._evaluation_is_due()):
            yield from self._evaluated()  # an interrupted run stopped without
            why = self._verdict() or why
        while not why:
            event = self._step()
            yield event
            if not (math.isfinite(event.gradient_norm) and all(map(math.isfinite, event.metrics.values()))):
                why, message = "diverged", _divergence(event.step, _figures(event))
                break
            why = self._limit_reached() or ("interrupted" if self.options.should_stop() else "")
            if why != "interrupted" and (why or self._evaluation_is_due()):
                yield from self._evaluated()
                why = self._verdict() or why
            elif why or self._save_is_due():
                yield from self._save()
        if why == "diverged" and not message:
            message = _divergence(self.progress.step, f"validation loss {self.progress.final_valid_loss}")
        if self.progress.evaluated_step or why == "diverged":
            self.model.update(self.best)
        mx.eval(self.model.parameters())
        yield Stopped(why=why, progress=self.progress, message=message)

    def _step(self) -> Step:
        now, clock = self.progress, self.options.clock
        asked = clock()
        batch = next(self.prefetch)
        now.data_seconds += clock() - asked
        step_tokens = batch[:, 1:].size
        tokens = now.tokens + step_tokens
        learning_rate = self.recipe.learning_rate_at(tokens)
        share = self.recipe.average.share(step_tokens, tokens) if self.recipe.average else 1.0
        metrics, norm = self.take_step(mx.array(batch), learning_rate, share)
        mx.eval(metrics, norm, self.take_step.state)
        before, self.mark = self.mark, clock()
        spent = self.mark - before
        now.step, now.tokens, now.epochs = now.step + 1, tokens, tokens / self.pieces
        now.train_seconds += spent
        self._time(spent, step_tokens)
        return Step(
            step=now.step,
            tokens=tokens,
            epochs=now.epochs,
            seconds=now.train_seconds,
            metrics={name: float(value) for name, value in metrics.items()},
            learning_rate=learning_rate,
            gradient_norm=float(norm),
            tokens_per_second=now.timed_tokens / now.timed_seconds if now.timed_seconds else None,
            data_wait_share=now.data_seconds / now.train_seconds if now.train_seconds else 0.0,
        )

    def _time(self, spent: float, step_tokens: int) -> None:
        """Sort one step's seconds: the first of a process is compilation but for what the second one takes."""
        now, nth = self.progress, self.progress.step - self.started
        if nth == 1:
            now.compile_seconds += spent
        elif nth == 2:
            now.compile_seconds -= min(spent, now.compile_seconds)
        if now.step > _UNTIMED_STEPS:
            now.timed_tokens += step_tokens
            now.timed_seconds += spent
        now.peak_memory_bytes = max(now.peak_memory_bytes, mx.get_peak_memory())

    def _evaluation_is_due(self) -> bool:
        return self.progress.step % self.eval_every == 0

    def _evaluated(self) -> Iterator[Eval | Saved]:
        """An evaluation and a checkpoint; none of weights whose validation loss is no number."""
        event = self._evaluation()
        yield event
        if math.isfinite(event.valid_loss):
            yield from self._save()

    def _evaluation(self) -> Eval:
        now, begun = self.progress, self.options.clock()
        training, kept = self.model.trainable_parameters(), self.take_step.weights_to_keep()
        self.model.update(kept)
        loss = self.evaluate()
        self.model.update(training)
        improved = math.isfinite(loss) and (now.best_valid_loss is None or loss < now.best_valid_loss)
        if improved:
            now.best_valid_loss, self.best = loss, kept
        now.valid_losses.append(loss)
        now.final_valid_loss, now.evaluated_step = loss, now.step
        self._note_target()
        self.mark = self.options.clock()
        now.eval_seconds += self.mark - begun
        return Eval(step=now.step, tokens=now.tokens, seconds=now.train_seconds, valid_loss=loss, improved=improved)

    def _target_is_met(self) -> bool:
        """Whether the last step had an evaluation that met the target."""
        now, target = self.progress, self.limits.target_loss
        if target is None or now.final_valid_loss is None or now.evaluated_step != now.step:
            return False
        return now.final_valid_loss <= target

    def _note_target(self) -> None:
        """When the target was met, which ends a run; a resumed one may have another target than before."""
        now = self.progress
        if not self._target_is_met():
            now.seconds_to_target = now.tokens_to_target = None
        elif now.tokens_to_target is None:
            now.seconds_to_target, now.tokens_to_target = now.train_seconds, now.tokens

    def _verdict(self) -> str:
        """What the last evaluation, if the last step had one, decides."""
        now = self.progress
        if now.final_valid_loss is None or now.evaluated_step != now.step:
            return ""
        if not math.isfinite(now.final_valid_loss):
            return "diverged"
        if self._target_is_met():
            return "target"
        finished = self.recipe.is_finished(now.tokens) or self.recipe.stop(now.valid_losses)
        return "plateau" if finished else ""

    def _limit_reached(self) -> str:
        now = {"steps": self.progress.step, "tokens": self.progress.tokens, "epochs": self.progress.epochs}
        now["seconds"] = self.progress.train_seconds
        for name, value in now.items():
            limit = getattr(self.limits, f"max_{name}")
            if limit is not None and value >= limit:
                return f"max_{name}"
        return ""

    def _save_is_due(self) -> bool:
        if self.options.save_every is not None:
            return self.progress.step % self.options.save_every == 0
        return self.options.clock() - self.saved_at >= self.options.save_seconds

    def _save(self) -> Iterator[Saved]:
        if self.options.checkpoints is None:
            return
        arrays = {
            "model": self.model.trainable_parameters(),
            "best": self.best,
            "optimizers": self.take_step.optimizers.state,
            "memory": self.take_step.memory,
        }
        random = [int(word) for word in np.array(mx.random.state[0])]  # type: ignore[index]
        state = {"progress": asdict(self.progress), "data": self.prefetch.state(), "random": random}
        path = save_checkpoint(self.options.checkpoints, self.progress.step, by_path(arrays), state)
        self.mark = self.saved_at = self.options.clock()
        yield Saved(step=self.progress.step, path=path)

    def _restore(self, arrays: dict[str, mx.array], state: dict[str, Any], notes: list[str]) -> Resumed:
        optimizers = self.take_step.optimizers
        try:
            weights = _filled("model", self.model.trainable_parameters(), arrays)
            self.best = _filled("best", self.model.trainable_parameters(), arrays)
            optimizers.state = _filled("optimizers", optimizers.state, arrays)
            self.take_step.memory = _filled("memory", self.take_step.memory, arrays)
            self.progress = Progress(**state["progress"])
        except (KeyError, TypeError) as error:
            raise BadInput(
                f"the checkpoint under '{self.options.checkpoints}' is of another model or version: "
                f"{error} does not fit"
            ) from error
        self.model.update(weights)
        high, low = state["random"]
        mx.random.seed(high << 32 | low)  # mx.random.state cannot be assigned
        self.batches.restore(state["data"])
        self._note_target()
        return Resumed(step=self.progress.step, notes=notes)


def _filled(name: str, tree: Any, arrays: dict[str, mx.array]) -> Any:
    """A tree like the given one, of the stored arrays. Raises KeyError for one that is missing or of another shape.

    Not tree_unflatten, which would make branches of the dots in the optimizers' keys: they are whole paths.
    """

    def stored(path: str, value: mx.array) -> mx.array:
        if arrays[f"{name}.{path}"].shape != value.shape:
            raise KeyError(f"{name}.{path}")
        return arrays[f"{name}.{path}"]

    return tree_map_with_path(stored, tree)


def _figures(event: Step) -> str:
    values = (f"{name} {value:.4g}" for name, value in event.metrics.items())
    return ", ".join([*values, f"gradient norm {event.gradient_norm:.4g}"])


def _divergence(step: int, figures: str) -> str:
    return (
        f"diverged at step {step}: {figures}; the weights kept are those of the best evaluation before it, "
        "the checkpoints those of before: try a lower --learning-rate"
    )
