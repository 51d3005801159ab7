"""fit(): one training loop, a generator of typed events; the console, the log, the bench and the notebooks read one stream."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_transformer.checkpoint import load_newest, save_checkpoint
from mlx_transformer.data.stream import Batches, Prefetch, validation_rows
from mlx_transformer.data.tokens import Tokens
from mlx_transformer.errors import BadInput
from mlx_transformer.model import Model
from mlx_transformer.optim.groups import Optimizers
from mlx_transformer.recipe import Recipe

_UNTIMED_STEPS = 5  # tokens per second counts from the step after these: the first ones compile and warm up
_EVAL_TOKENS = 8192  # of one evaluation batch


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
    evaluations_without_gain: int = 0
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
class Habits:
    """How a run is kept, as against how the model is trained: nothing here changes a number of the result."""

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
    limits: Limits = Limits(),  # noqa: B008 - frozen
    habits: Habits = Habits(),  # noqa: B008 - frozen
) -> Iterator[Event]:
    """Train model in place and yield what happens; goes on from habits.checkpoints if it holds a checkpoint.

    The recipe is sized (`Recipe.at`). Raises BadInput if the training text is shorter than one row, RunFailed if the
    disk refuses a checkpoint.
    """
    with _Run(model, recipe, data, seed, limits, habits) as run:
        yield from run.events()


def default_eval_every(recipe: Recipe, data: Tokens, seq_len: int) -> int:
    """Steps between evaluations: the recipe's tokens, but never fewer than the validation text has, which costs a third."""
    step_tokens = max(1, recipe.batch_tokens // seq_len) * seq_len
    return -(-max(recipe.eval_tokens, len(data.valid)) // step_tokens)


class TrainingStep:
    """Forward, backward, clip, update: one function of a batch and a learning rate, compiled over captured state."""

    def __init__(self, model: Model, recipe: Recipe, *, compiled: bool = True) -> None:
        self.model, self.recipe = model, recipe
        self.dtype = getattr(mx, recipe.dtype)
        self.optimizers = Optimizers(recipe.groups, model.trainable_parameters())
        self.compiled = compiled
        self._function: Callable[..., tuple[dict[str, mx.array], mx.array]] | None = None

    @property
    def state(self) -> list[Any]:
        """Everything a step reads and changes."""
        return [self.model.state, self.optimizers.state, mx.random.state]

    def __call__(self, batch: mx.array, rate: float) -> tuple[dict[str, mx.array], mx.array]:
        """batch (rows, L + 1) int32, the learning rate -> metrics and the gradients' norm before clipping."""
        if self._function is None:  # built late, so that a restored state is the one captured
            state = self.state
            self._function = mx.compile(self._step, inputs=state, outputs=state) if self.compiled else self._step
        return self._function(batch, mx.array(rate))

    def _step(self, batch: mx.array, rate: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        weights = self.model.trainable_parameters()
        (_, metrics), gradients = mx.value_and_grad(self._loss)(weights, batch)
        clipped, norm = self.recipe.clip(dict(tree_flatten(gradients)))
        self.model.update(self.optimizers.update(clipped, dict(tree_flatten(weights)), rate))
        return metrics, norm

    def _loss(self, weights: dict[str, Any], batch: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss as a function of the float32 weights, computed in the recipe's dtype."""
        self.model.update(tree_map(lambda w: w.astype(self.dtype), weights))
        return self.model.loss(batch)


class Evaluator:
    """Validation loss: nats per piece over every piece of the split, each predicted once."""

    def __init__(self, model: Model, valid: np.ndarray, seq_len: int, *, compiled: bool = True) -> None:
        rows, mask = validation_rows(valid, seq_len)
        size = min(len(rows), max(1, _EVAL_TOKENS // seq_len))
        short = -len(rows) % size  # full batches only: one shape, one compiled graph
        self.rows = np.concatenate([rows, np.repeat(rows[:1], short, 0)])
        self.mask = np.concatenate([mask, np.zeros((short, seq_len), bool)])
        self.size, self.pieces = size, int(mask.sum())
        self.model = model
        self._function = mx.compile(self._total, inputs=[model.state]) if compiled else self._total

    def _total(self, rows: mx.array, mask: mx.array) -> mx.array:
        ctx, targets = self.model.inputs(rows)
        return (self.model.token_loss(self.model.hidden(ctx), targets) * mask).sum()

    def __call__(self) -> float:
        """The loss of the model's present weights, without dropout."""
        self.model.eval()
        total = 0.0
        for i in range(0, len(self.rows), self.size):
            batch = slice(i, i + self.size)
            total += self._function(mx.array(self.rows[batch]), mx.array(self.mask[batch])).item()
        self.model.train()
        return total / self.pieces


class _Run:
    """One run of fit(): the state that its parts share."""

    def __init__(
        self, model: Model, recipe: Recipe, data: Tokens, seed: int, limits: Limits, habits: Habits
    ) -> None:
        self.model, self.recipe, self.limits, self.habits = model, recipe, limits, habits
        seq_len = model.config.seq_len
        self.rows = max(1, recipe.batch_tokens // seq_len)
        self.step_tokens = self.rows * seq_len
        self.pieces = len(data.train) - 1  # the opening boundary is never predicted
        self.eval_every = habits.eval_every or default_eval_every(recipe, data, seq_len)
        mx.random.seed(seed)
        self.batches = Batches(data.train, self.rows, seq_len, seed)
        self.evaluate = Evaluator(model, data.valid, seq_len, compiled=habits.compile)
        self.take_step = TrainingStep(model, recipe, compiled=habits.compile)
        self.progress = Progress()
        self.best: dict[str, Any] = model.trainable_parameters()
        self.saved_at = habits.clock()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "prefetch"):
            self.prefetch.close()

    def events(self) -> Iterator[Event]:
        if self.habits.checkpoints is not None and (found := load_newest(self.habits.checkpoints)):
            yield self._restore(*found)
        self.prefetch = Prefetch(self.batches)
        mx.reset_peak_memory()
        self.model.train()
        self.mark, self.started = self.habits.clock(), self.progress.step
        why, message = self._limit_reached() or self._verdict(), ""
        if why and self.progress.evaluated_step != self.progress.step:  # interrupted, then resumed with a lower limit
            yield self._evaluation()
            yield from self._save()
        while not why:
            event = self._step()
            yield event
            if not (math.isfinite(event.gradient_norm) and all(map(math.isfinite, event.metrics.values()))):
                why, message = "diverged", _divergence(event)
                break
            why = self._limit_reached() or ("interrupted" if self.habits.should_stop() else "")
            if why != "interrupted" and (why or self.progress.step % self.eval_every == 0):
                yield self._evaluation()
                why = self._verdict() or why
                if why == "diverged":
                    break
                yield from self._save()
            elif why or self._save_is_due():
                yield from self._save()
        if self.progress.evaluated_step or why == "diverged":
            self.model.update(self.best)
        mx.eval(self.model.parameters())
        yield Stopped(why=why, progress=self.progress, message=message)

    def _step(self) -> Step:
        now, clock = self.progress, self.habits.clock
        asked = clock()
        batch = next(self.prefetch)
        now.data_seconds += clock() - asked
        tokens = now.tokens + self.step_tokens
        rate = self.recipe.learning_rate * self.recipe.schedule(tokens)
        metrics, norm = self.take_step(mx.array(batch), rate)
        mx.eval(metrics, norm, self.take_step.state)
        before, self.mark = self.mark, clock()
        spent = self.mark - before
        now.step, now.tokens, now.epochs = now.step + 1, tokens, tokens / self.pieces
        now.train_seconds += spent
        self._time(spent)
        return Step(
            step=now.step,
            tokens=tokens,
            epochs=now.epochs,
            seconds=now.train_seconds,
            metrics={name: value.item() for name, value in metrics.items()},
            learning_rate=rate,
            gradient_norm=norm.item(),
            tokens_per_second=now.timed_tokens / now.timed_seconds if now.timed_seconds else None,
            data_wait_share=now.data_seconds / now.train_seconds if now.train_seconds else 0.0,
        )

    def _time(self, spent: float) -> None:
        """Sort one step's seconds: the first of a process is compilation but for what the second one takes."""
        now, nth = self.progress, self.progress.step - self.started
        if nth == 1:
            now.compile_seconds += spent
        elif nth == 2:
            now.compile_seconds -= min(spent, now.compile_seconds)
        if nth > _UNTIMED_STEPS:
            now.timed_tokens += self.step_tokens
            now.timed_seconds += spent
        now.peak_memory_bytes = max(now.peak_memory_bytes, mx.get_peak_memory())

    def _evaluation(self) -> Eval:
        now, begun = self.progress, self.habits.clock()
        loss = self.evaluate()
        best = now.best_valid_loss
        improved = math.isfinite(loss) and (best is None or loss < best)
        gained = improved and (best is None or loss < best - self.recipe.stop.min_improvement)
        if improved:
            now.best_valid_loss, self.best = loss, self.model.trainable_parameters()
        now.evaluations_without_gain = 0 if gained else now.evaluations_without_gain + 1
        now.final_valid_loss, now.evaluated_step = loss, now.step
        if now.tokens_to_target is None and self.limits.target_loss is not None and loss <= self.limits.target_loss:
            now.seconds_to_target, now.tokens_to_target = now.train_seconds, now.tokens
        self.mark = self.habits.clock()
        now.eval_seconds += self.mark - begun
        return Eval(step=now.step, tokens=now.tokens, seconds=now.train_seconds, valid_loss=loss, improved=improved)

    def _verdict(self) -> str:
        """What the last evaluation, if the last step had one, decides."""
        now = self.progress
        if now.final_valid_loss is None or now.evaluated_step != now.step:
            return ""
        if not math.isfinite(now.final_valid_loss):
            return "diverged"
        if self.limits.target_loss is not None and now.final_valid_loss <= self.limits.target_loss:
            return "target"
        return "plateau" if now.evaluations_without_gain >= self.recipe.stop.patience else ""

    def _limit_reached(self) -> str:
        now = {"steps": self.progress.step, "tokens": self.progress.tokens, "epochs": self.progress.epochs}
        now["seconds"] = self.progress.train_seconds
        for name, value in now.items():
            limit = getattr(self.limits, f"max_{name}")
            if limit is not None and value >= limit:
                return f"max_{name}"
        return ""

    def _save_is_due(self) -> bool:
        if self.habits.save_every is not None:
            return self.progress.step % self.habits.save_every == 0
        return self.habits.clock() - self.saved_at >= self.habits.save_seconds

    def _save(self) -> Iterator[Saved]:
        if self.habits.checkpoints is None:
            return
        arrays = {
            "model": self.model.trainable_parameters(),
            "best": self.best,
            "optimizers": self.take_step.optimizers.state,
        }
        random = [int(word) for word in np.array(mx.random.state[0])]
        state = {"progress": asdict(self.progress), "data": self.prefetch.state(), "random": random}
        path = save_checkpoint(self.habits.checkpoints, self.progress.step, dict(tree_flatten(arrays)), state)
        self.mark = self.saved_at = self.habits.clock()
        yield Saved(step=self.progress.step, path=path)

    def _restore(self, arrays: dict[str, mx.array], state: dict[str, Any], notes: list[str]) -> Resumed:
        tree = tree_unflatten(list(arrays.items()))
        expected = {path: value.shape for path, value in tree_flatten(self.model.trainable_parameters())}
        if {path: value.shape for path, value in tree_flatten(tree["model"])} != expected:
            raise BadInput(f"the checkpoint under '{self.habits.checkpoints}' is of another model than this one")
        self.model.update(tree["model"])
        self.best = tree["best"]
        self.take_step.optimizers.state = tree["optimizers"]
        high, low = state["random"]
        mx.random.seed(high << 32 | low)  # mx.random.state cannot be assigned
        self.batches.restore(state["data"])
        self.progress = now = Progress(**state["progress"])
        if now.best_valid_loss is None or self.limits.target_loss is None or now.best_valid_loss > self.limits.target_loss:
            now.seconds_to_target = now.tokens_to_target = None  # the target may be another than before
        return Resumed(step=self.progress.step, notes=notes)


def _divergence(event: Step) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
    return (
        f"diverged at step {event.step}: {values}, gradient norm {event.gradient_norm:.4g}; the weights kept are those "
        "of the last good checkpoint or evaluation: try a lower --learning-rate"
    )
