"""The training loop: `fit` yields typed events, which the console, the log, the bench and notebooks read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_transformer.backend import divided_blas
from mlx_transformer.data.pairs import PairTokens
from mlx_transformer.data.stream import Prefetch, predicted_tokens
from mlx_transformer.data.tasks.packing import unmarked
from mlx_transformer.data.tokens import StreamedTokens, Tokens
from mlx_transformer.nn.model import Model
from mlx_transformer.train import restoring
from mlx_transformer.train.evaluate import Evaluator, batch_tokens, on_gpu
from mlx_transformer.train.events import (
    Begun,
    Eval,
    Event,
    Limits,
    Prepared,
    Progress,
    Resumed,
    RunOptions,
    Saved,
    Step,
    Stopped,
)
from mlx_transformer.train.parallel import Signals, check_batches
from mlx_transformer.train.parts import count_shares, divide_model
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput

Data = Tokens | PairTokens
_UNTIMED_STEPS = 5  # excluded from the throughput: the first steps warm caches


def fit(
    model: Model,
    recipe: Recipe,
    data: Data,
    *,
    seed: int = 0,
    limits: Limits | None = None,
    options: RunOptions | None = None,
) -> Iterator[Event]:
    """Train a model in place and yield events; resumes if options.checkpoints holds a checkpoint.

    The last event is Stopped, and the model then has the best weights. Nothing is computed before the first event is
    asked for. recipe: of one size (`Recipe.at`). seed: of batches and dropout; on a CPU the same seed gives the same
    weights, on a GPU with options.deterministic. On a GPU the next step may have begun when a Step is yielded.

    Raises BadInput if the recipe has a value out of range, or several sizes; a parameter is not in exactly one of its
    groups; it combines gradient checkpointing with dropout; the training text is shorter than one sequence; or the
    checkpoint belongs to another model or is damaged. Raises RunFailed if a checkpoint cannot be written.
    """
    recipe.check()
    limits, options = limits or Limits(), options or RunOptions()
    if isinstance(data, Tokens):
        data = data.packed(model.config.seq_len)
    check_batches(recipe, model.config.seq_len, count_shares(options.shard, options.ranks))
    with (
        divided_blas(),
        restoring.dropout_set(model, recipe.dropout),
        _Run(model, recipe, data, seed, limits, options) as run,
    ):
        yield from run.events()


def default_eval_every(recipe: Recipe, data: Data, seq_len: int) -> int:
    """Return the steps between evaluations: those of eval_tokens, but at least one pass over the validation tokens.

    A forward pass is a third of a step, so evaluation takes at most a quarter of the time. On a GPU, whose runs last
    minutes, it is at least three passes: at most a tenth of the time.
    """
    passes = 3 if on_gpu() else 1
    return -(-max(recipe.eval_tokens, passes * data.valid_tokens) // (recipe.batch_size(seq_len) * seq_len))


class _Run:
    """The state of one call of `fit`."""

    def __init__(
        self, model: Model, recipe: Recipe, data: Data, seed: int, limits: Limits, options: RunOptions
    ) -> None:
        self.model, self.recipe, self.data, self.limits, self.options = model, recipe, data, limits, options
        seq_len = model.config.seq_len
        data = self._prepare(data)
        self.eval_every = options.eval_every or default_eval_every(recipe, data, seq_len)
        self.split, self.ranks = _, ranks = divide_model(model, options.shard, options.ranks)
        data = data.of_rank(ranks.share, ranks.shares) if isinstance(data, StreamedTokens) else data
        mx.random.seed(ranks.own_seed(seed))
        self.batches = data.batches(partial(recipe.batch_size, seq_len), seq_len, seed)
        model.masked = isinstance(data, Tokens) and data.is_masked
        size = min(batch_tokens(), -(-data.valid_tokens // ranks.shares)) if ranks.shares > 1 else batch_tokens()
        self.evaluate = Evaluator(model, data.validation(seq_len, size), compiled=options.compile, ranks=ranks)
        self.take_step = TrainingStep(
            *(model, recipe, ranks, self.split),
            compiled=options.compile,
            deterministic=options.deterministic,
            sharded=options.shard,
        )
        self.shards = self.take_step.shards
        self.progress, self.heard = Progress(), Signals()
        self.best = self.shards.kept(model.trainable_parameters())
        self.saved_at = options.clock()
        self.ahead: Begun | None = None  # the step after the one that is waited for
        self.step_seconds = 0.0  # of the last step
        self.compiled: set[tuple[int, ...]] = set()  # shapes of the batches so far
        self.compiling: tuple[tuple[int, ...], float] = (), 0.0  # shape and seconds of the last step that compiled

    def _prepare(self, data: Data) -> Data:
        """Return the data with what the model prepared as its training text."""
        self.prepared: Prepared | None = None
        if not isinstance(data, Tokens):
            return data
        started = self.options.clock()
        text = unmarked(data.train) if data.is_masked else data.train
        train = self.model.prepare(text, data.eos_id)
        if train is text:
            return data
        if isinstance(data, StreamedTokens):
            raise BadInput("this model counts the whole training text before it trains: it cannot be streamed")
        if data.is_masked:
            train[:, -1] = data.train
        self.prepared = Prepared(seconds=self.options.clock() - started)
        return replace(data, train=train)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "prefetch"):
            self.prefetch.close()

    def events(self) -> Iterator[Event]:
        if (found := restoring.load_checkpoint(self.options.checkpoints, self.take_step)) is not None:
            yield self._restore(*found)  # its clock has the time of preparing already
        elif self.prepared is not None:
            self.progress.preparation_seconds = self.prepared.seconds
            self.progress.train_seconds += self.prepared.seconds
        if self.prepared is not None:
            yield self.prepared
        self.prefetch = Prefetch(self.batches)
        mx.reset_peak_memory()
        self.model.train()
        self.mark = self.options.clock()
        why, message = self._reason_to_stop() or self._limit_reached(), ""
        if self.progress.evaluated_step != self.progress.step and (why or self._evaluation_is_due()):
            yield from self._evaluated()  # an interrupted run stops without one
            why = self._reason_to_stop() or why
        while not why:
            step = self.ahead or self._begin(self.progress.tokens)
            self.ahead = self._begin(step.tokens) if self._may_begin_next(step) else None
            event = self._end(step)
            yield event
            if not (math.isfinite(event.gradient_norm) and all(map(math.isfinite, event.metrics.values()))):
                why, message = "diverged", restoring.divergence(self.progress, restoring.describe(event))
                break
            if self.ahead is not None:
                continue
            why = self._limit_reached() or ("interrupted" if self._is_to_stop() else "")
            if why != "interrupted" and (why or self._evaluation_is_due()):
                yield from self._evaluated()
                why = self._reason_to_stop() or why
            elif why or self._save_is_due():
                yield from self._save(self.progress, self.best)
        if why == "diverged" and not message:
            message = restoring.divergence(self.progress, f"validation loss {self.progress.final_valid_loss}")
        if self.progress.evaluated_step or why == "diverged":
            self.model.update(self.shards.tree(self.best))
        mx.eval(self.model.parameters())
        if self.ranks.size > 1:
            restoring.finish_ranks(self.progress, self.take_step)
        yield Stopped(why=why, progress=self.progress, message=message)

    def _begin(self, tokens: int) -> Begun:
        """Take the step after so many tokens; on a GPU without waiting for it."""
        waiting = self.options.clock()
        self.ranks.advance("reading a batch")
        batch = next(self.prefetch)
        self.ranks.advance("computing a step")
        self.progress.data_seconds += self.options.clock() - waiting
        masked = self.model.masked  # a budget of tokens counts all that are read, not the answers alone
        step_tokens = len(batch) * (batch.shape[-1] - 1) if masked else predicted_tokens(batch)
        shares = self.ranks.shares if self.batches.divided else 1
        own, shape = self.ranks.part(batch) if shares == 1 else batch, (len(batch) * shares, *batch.shape[1:])
        step_tokens *= shares
        tokens += step_tokens
        learning_rate = self.recipe.learning_rate_at(tokens)
        share = self.recipe.average.share(step_tokens, tokens) if self.recipe.average else 1.0
        self.take_step.signals = self._signals()
        metrics, norm = self.take_step(mx.array(own), learning_rate, share)
        if on_gpu():
            mx.async_eval(metrics, norm, self.take_step.state)
        heard, spent = self.take_step.heard, self.ranks.communication_seconds
        return Begun(shape, step_tokens, tokens, learning_rate, metrics, norm, heard, spent)

    def _signals(self) -> Signals:
        """Return what this rank tells the others; the clock is that of rank 0."""
        if self.ranks.size == 1:
            return Signals()
        stop = float(self.options.should_stop())
        return Signals(stop) if self.ranks.rank else Signals(stop, self._time_to_save(), self.progress.train_seconds)

    def _is_to_stop(self) -> bool:
        return self.options.should_stop() if self.ranks.size == 1 else self.heard.stop > 0

    def _may_begin_next(self, step: Begun) -> bool:
        """Whether the next step may begin before this one has ended: a GPU would else wait for Python.

        Not if something after this step needs its state: an evaluation, a checkpoint or the end. Nor if one of the two
        compiles, which is timed apart.
        """
        if not on_gpu() or self._is_to_stop():
            return False
        n, seq_len = self.progress.step + 1, self.model.config.seq_len
        following = (self.recipe.batch_size(seq_len, step.tokens), seq_len + 1)  # pairs of another width may follow
        if step.shape != following or step.shape not in self.compiled:
            return False
        saves = self.options.checkpoints is not None and self._save_is_due(n)
        epochs, seconds = step.tokens / self.data.epoch_tokens, self._seconds(ahead=2)
        ends = self.limits.reached(steps=n, tokens=step.tokens, epochs=epochs, seconds=seconds)
        return not (self._evaluation_is_due(n) or saves or ends)

    def _end(self, step: Begun) -> Step:
        """Wait for a step and describe it."""
        now = self.progress
        mx.eval(step.metrics, step.norm, step.heard, self.take_step.state if self.ahead is None else [])
        if self.ranks.size > 1:
            self.heard = Signals(*step.heard.tolist())  # type: ignore[misc]
        before, self.mark = self.mark, self.options.clock()
        self.step_seconds = self.mark - before
        if step.communication_seconds and step.shape in self.compiled:
            now.communication_seconds += step.communication_seconds
            now.probed_seconds += self.step_seconds
        now.step, now.tokens, now.epochs = now.step + 1, step.tokens, step.tokens / self.data.epoch_tokens
        self._time(self.step_seconds, step)
        return Step(
            step=now.step,
            tokens=now.tokens,
            epochs=now.epochs,
            seconds=now.train_seconds,
            metrics={name: float(value) for name, value in step.metrics.items()},
            learning_rate=step.learning_rate,
            gradient_norm=float(step.norm),
            tokens_per_second=now.timed_tokens / now.timed_seconds if now.timed_seconds else None,
            data_wait_share=now.data_seconds / now.train_seconds if now.train_seconds else 0.0,
        )

    def _time(self, spent: float, step: Begun) -> None:
        """Count one step's seconds.

        The first step of a process, and the first of another shape, compiles. The training in it is taken to last
        as long as the next step, if that has the same shape; until that is known all of it counts as compilation.
        """
        now = self.progress
        now.peak_memory_bytes = max(now.peak_memory_bytes, mx.get_peak_memory())
        if step.shape not in self.compiled:
            self.compiled.add(step.shape)
            self.compiling = step.shape, spent
            now.compile_seconds += spent
            return
        training = min(spent, self.compiling[1]) if self.compiling[0] == step.shape else 0.0
        self.compiling = (), 0.0
        now.compile_seconds -= training
        now.train_seconds += training + spent
        if now.step > _UNTIMED_STEPS:
            now.timed_tokens += step.step_tokens
            now.timed_seconds += spent

    def _evaluation_is_due(self, step: int | None = None) -> bool:
        return (self.progress.step if step is None else step) % self.eval_every == 0

    def _evaluated(self) -> Iterator[Eval | Saved]:
        """Evaluate, then save unless the validation loss is not finite.

        The checkpoint omits an evaluation that only a limit asked for, which a run without the limit would not make.
        """
        uncut = None if self._evaluation_is_due() else (replace(self.progress), self.best)
        event = self._evaluation()
        yield event
        if math.isfinite(event.valid_loss):
            yield from self._save(*(uncut or (self.progress, self.best)))

    def _evaluation(self) -> Eval:
        now, started = self.progress, self.options.clock()
        training, kept = self.model.trainable_parameters(), self.take_step.weights_to_keep()
        self.model.update(kept)
        loss = self.evaluate()
        self.ranks.advance("saving")  # rank 0 alone may take long
        scores = self.options.score(self.model) if self.options.score else {}
        self.model.update(training)
        improved = math.isfinite(loss) and (now.best_valid_loss is None or loss < now.best_valid_loss)
        if improved:
            now.best_valid_loss, self.best = loss, self.shards.kept(kept)
        if self._evaluation_is_due():
            now.valid_losses.append(loss)
        now.final_valid_loss, now.evaluated_step = loss, now.step
        self._note_target()
        self.mark = self.options.clock()
        now.eval_seconds += self.mark - started
        return Eval(
            step=now.step,
            tokens=now.tokens,
            seconds=now.train_seconds,
            valid_loss=loss,
            improved=improved,
            scores=scores,
        )

    def _target_is_reached(self) -> bool:
        """Whether the last step was evaluated and reached the target loss."""
        now, target = self.progress, self.limits.target_loss
        if target is None or now.final_valid_loss is None or now.evaluated_step != now.step:
            return False
        return now.final_valid_loss <= target

    def _note_target(self) -> None:
        """Record when the target was reached; a resumed run may have another target than before."""
        now = self.progress
        if not self._target_is_reached():
            now.seconds_to_target = now.tokens_to_target = None
        elif now.tokens_to_target is None:
            now.seconds_to_target, now.tokens_to_target = now.train_seconds, now.tokens

    def _reason_to_stop(self) -> str:
        """Return why the last step's evaluation, if there was one, ends the run; "" if it does not."""
        now = self.progress
        if now.final_valid_loss is None or now.evaluated_step != now.step:
            return ""
        if not math.isfinite(now.final_valid_loss):
            return "diverged"
        if self._target_is_reached():
            return "target"
        plateau = self._evaluation_is_due() and self.recipe.stop(now.valid_losses)
        return "plateau" if plateau or self.recipe.is_finished(now.tokens) else ""

    def _limit_reached(self) -> str:
        now = self.progress
        return self.limits.reached(steps=now.step, tokens=now.tokens, epochs=now.epochs, seconds=self._seconds())

    def _seconds(self, ahead: int = 0) -> float:
        """Return the seconds of training, so many steps ahead; of several ranks those of rank 0 at its last signal."""
        if self.ranks.size > 1:
            return self.heard.seconds
        return self.progress.train_seconds + ahead * self.step_seconds

    def _save_is_due(self, step: int | None = None) -> bool:
        if self.options.save_every is not None:
            return (self.progress.step if step is None else step) % self.options.save_every == 0
        return self._time_to_save() if self.ranks.size == 1 else self.heard.save > 0

    def _time_to_save(self) -> bool:
        return self.options.clock() - self.saved_at >= self.options.save_seconds

    def _save(self, progress: Progress, best: dict[str, mx.array]) -> Iterator[Saved]:
        if self.options.checkpoints is None:
            return
        self.ranks.advance("saving")
        step, position = self.progress.step, self.prefetch.state()
        path = restoring.save(self.options.checkpoints, step, self.take_step, best, progress, position)
        self.mark = self.saved_at = self.options.clock()
        yield Saved(step=self.progress.step, path=path)

    def _restore(self, arrays: dict[str, mx.array], state: dict[str, Any], notes: list[str]) -> Resumed:
        optimizers = self.take_step.optimizers
        try:
            weights = restoring.filled("model", self.model.trainable_parameters(), arrays)
            self.best = restoring.filled("best", self.best, arrays)
            optimizers.state = restoring.filled("optimizers", optimizers.state, arrays)
            self.take_step.memory = restoring.filled("memory", self.take_step.memory, arrays)
            self.take_step.snapshots = restoring.filled("snapshots", self.take_step.snapshots, arrays)
            self.progress = Progress(**state["progress"])
        except (KeyError, TypeError) as error:
            raise BadInput(
                f"the checkpoint under '{self.options.checkpoints}' belongs to another model or version: "
                f"{error} does not fit"
            ) from error
        self.model.update(weights)
        restoring.restore_random(state, self.ranks)
        self.heard = Signals(seconds=self.progress.train_seconds)
        self.batches.restore(state["data"])
        self._note_target()
        return Resumed(step=self.progress.step, evaluated_step=self.progress.evaluated_step, notes=notes)
