"""Limits, options, progress and events of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_transformer.nn.model import Model
from mlx_transformer.train.parallel import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits that end a run early; None: no limit. The schedule does not depend on them."""

    max_steps: int | None = None
    max_tokens: int | None = None
    max_epochs: float | None = None
    max_seconds: float | None = None  # of training, as Progress.train_seconds counts them
    target_loss: float | None = None  # validation loss, nats per token

    def reached(self, **now: float) -> str:
        """Return "max_steps" or another limit that is reached, "" if none is; now: steps, tokens, epochs, seconds."""
        limits = {name: getattr(self, f"max_{name}") for name in now}
        return next((f"max_{name}" for name, limit in limits.items() if limit is not None and now[name] >= limit), "")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Evaluation, checkpoints and execution of a run, which are not part of the recipe."""

    checkpoints: Path | None = None  # the folder, in which rank 0 writes; None: no checkpoints
    eval_every: int | None = None  # steps; None: from the recipe's eval_tokens
    save_every: int | None = None  # steps; None: at each evaluation and at least every save_seconds
    save_seconds: float = 60.0
    compile: bool = True
    deterministic: bool = False  # on a GPU too: the same seed gives the same weights, bit for bit; slower there
    score: Callable[[Model], dict[str, float]] | None = None  # called at each evaluation; its figures go into Eval
    should_stop: Callable[[], bool] = lambda: False  # called after each step; True saves and stops
    ranks: Ranks = ALONE  # the processes that train together
    shard: str = "none"  # what is divided among them: "optimizer" beside each batch, "tensor" or "pipeline" instead
    clock: Callable[[], float] = time.monotonic  # does not count the time that the machine sleeps


@dataclass(kw_only=True)
class Progress:
    """The state of a run besides its arrays and settings; a part of each checkpoint."""

    step: int = 0
    tokens: int = 0  # predicted so far
    epochs: float = 0.0
    train_seconds: float = 0.0  # everything but compilation, evaluation and saving
    preparation_seconds: float = 0.0  # of Model.prepare; a part of train_seconds
    compile_seconds: float = 0.0
    eval_seconds: float = 0.0
    timed_tokens: int = 0  # for tokens_per_second: neither the first steps nor those that compile count
    timed_seconds: float = 0.0
    data_seconds: float = 0.0  # spent waiting for a batch
    best_valid_loss: float | None = None
    final_valid_loss: float | None = None
    evaluated_step: int = 0
    valid_losses: list[float] = field(default_factory=list)  # of every eval_every-th step: the input of the stop rule
    seconds_to_target: float | None = None
    tokens_to_target: int | None = None
    peak_memory_bytes: int = 0
    peak_memory_of_ranks: list[int] = field(default_factory=list)
    weights_of_ranks: list[int] = field(default_factory=list)  # bytes
    optimizer_of_ranks: list[int] = field(default_factory=list)  # bytes of the optimizers' state and of the average
    communication_seconds: float = 0.0  # of the steps of several ranks that were probed
    probed_seconds: float = 0.0  # of all that those steps did

    @property
    def communication_share(self) -> float | None:
        """Share of a step spent in exchanging gradients, waiting for other ranks included; None before it is known."""
        return self.communication_seconds / self.probed_seconds if self.probed_seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Training throughput from the sixth step on; None under ten steps."""
        return self.timed_tokens / self.timed_seconds if self.step >= 10 and self.timed_seconds else None


@dataclass(frozen=True)
class Begun:
    """A step whose results may not be computed yet."""

    shape: tuple[int, ...]  # of the batch
    step_tokens: int
    tokens: int  # predicted up to its end
    learning_rate: float
    metrics: dict[str, mx.array]
    norm: mx.array
    heard: mx.array  # the signals of all ranks
    communication_seconds: float  # 0 where they were not timed


@dataclass(frozen=True, kw_only=True)
class Step:
    """A finished step. metrics: the loss and what the model recorded; seconds: of training so far (train_seconds)."""

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
    """An evaluation over the whole validation split: nats per token."""

    step: int
    tokens: int
    seconds: float
    valid_loss: float
    improved: bool
    scores: dict[str, float] = field(default_factory=dict)  # what RunOptions.score returned


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The last event; the model has the best weights. why: plateau, max_steps, ..., target, interrupted, diverged."""

    why: str
    progress: Progress
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """The run resumes from a checkpoint; notes: one sentence for each damaged one that was skipped."""

    step: int
    evaluated_step: int = 0  # of the last evaluation in the checkpoint; a limit may have asked for a later one
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The model took from the training text what it needs (Model.prepare); seconds: how long, as part of training."""

    seconds: float


Event = Step | Eval | Saved | Stopped | Resumed | Prepared
