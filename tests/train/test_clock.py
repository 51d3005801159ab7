"""The clock of fit(): training without compilation, evaluation and saving."""

from dataclasses import dataclass, replace

import pytest

from mlx_transformer.train import restoring, trainer
from mlx_transformer.train.evaluate import Evaluator
from mlx_transformer.train.optim.schedules import BatchWarmup
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.train.trainer import Limits, RunOptions, Saved, Step, fit
from tests.train.test_trainer import DATA, RECIPE, STEP_TOKENS, make_model, of, train


@dataclass
class Clock:
    """Time passes only where the tests let it."""

    now: float = 0.0

    def __call__(self):
        return self.now

    def slow(self, monkeypatch, owner, name, *seconds):
        """Each call of a function takes so long; the last number repeats."""
        function, left = getattr(owner, name), list(seconds)

        def slowed(*args, **kwargs):
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, slowed)


@pytest.fixture
def clock(monkeypatch):
    """A step takes 1 s, the first one 9 s more; an evaluation 100 s, a checkpoint 1000 s."""
    clock = Clock()
    clock.slow(monkeypatch, TrainingStep, "__call__", 10, 1)
    clock.slow(monkeypatch, Evaluator, "__call__", 100)
    clock.slow(monkeypatch, restoring, "save_checkpoint", 1000)
    return clock


def test_the_clock_leaves_out_evaluations_and_checkpoints(clock, tmp_path):
    options = {"clock": clock, "eval_every": 5, "checkpoints": tmp_path, "save_every": 2}
    events, _ = train(max_steps=12, options=options)
    now = events[-1].progress
    assert now.train_seconds == 12
    assert now.eval_seconds == 300
    assert now.compile_seconds == 9
    assert [event.seconds for event in of(Step, events)] == [0, *range(2, 13)], "step 2 tells what compiling took"
    assert now.tokens_per_second == STEP_TOKENS


def test_seconds_are_a_limit_of_the_clock(clock):
    events, _ = train(max_seconds=14, options={"clock": clock, "eval_every": 2})
    assert (events[-1].why, events[-1].progress.step) == ("max_seconds", 14)


def test_the_clock_leaves_out_the_compilation_of_every_process(clock, tmp_path, monkeypatch):
    options = {"clock": clock, "checkpoints": tmp_path, "eval_every": 4}
    for limit in (7, 14):
        clock.slow(monkeypatch, TrainingStep, "__call__", 30, 0)
        now = train(max_steps=limit, options=options)[0][-1].progress
    assert (now.train_seconds, now.compile_seconds) == (14, 9 + 30 + 30)
    assert now.tokens_per_second == STEP_TOKENS


def test_the_clock_leaves_out_the_compilation_of_another_batch_size(clock, monkeypatch):
    warmup = BatchWarmup(tokens=4 * STEP_TOKENS, doublings=1)
    recipe = replace(RECIPE, batch_tokens=2 * STEP_TOKENS, batch_warmup=warmup)
    monkeypatch.undo()
    clock.slow(monkeypatch, TrainingStep, "__call__", 10, 1, 1, 1, 20, 2)
    events, _ = train(recipe=recipe, max_steps=6, options={"clock": clock})
    assert [event.tokens // STEP_TOKENS for event in of(Step, events)] == [1, 2, 3, 4, 6, 8]
    assert [event.seconds for event in of(Step, events)] == [0, 2, 3, 4, 4, 8]
    assert events[-1].progress.compile_seconds == 9 + 18


def test_a_first_step_that_does_not_compile_counts(clock, monkeypatch):
    monkeypatch.undo()
    clock.slow(monkeypatch, TrainingStep, "__call__", 1, 3)
    now = train(max_steps=2, options={"clock": clock})[0][-1].progress
    assert (now.train_seconds, now.compile_seconds) == (4, 0)


def test_what_the_reader_of_the_events_does_is_on_the_clock(clock):
    for event in fit(make_model(), RECIPE, DATA, limits=Limits(max_steps=3), options=RunOptions(clock=clock)):
        clock.now += 7 if isinstance(event, Step) and event.step < 3 else 0
    assert event.progress.train_seconds == 8 + 8 + 8
    assert event.progress.compile_seconds == 2


def test_checkpoints_come_by_the_clock(clock, tmp_path, monkeypatch):
    options = {"clock": clock, "checkpoints": tmp_path, "eval_every": 9, "save_seconds": 3}
    events, _ = train(max_steps=11, options=options)
    assert [event.step for event in of(Saved, events)] == [1, 4, 7, 9, 11]


def test_tokens_per_second_wait_for_ten_steps(clock):
    events, _ = train(max_steps=9, options={"clock": clock})
    assert events[-1].progress.tokens_per_second is None
    assert train(max_steps=10, options={"clock": clock})[0][-1].progress.tokens_per_second == STEP_TOKENS


def test_a_resumed_run_counts_its_tokens_per_second_from_step_six_too(clock, tmp_path):
    options = {"clock": clock, "checkpoints": tmp_path}
    train(max_steps=9, options=options)
    assert train(max_steps=10, options=options)[0][-1].progress.tokens_per_second == STEP_TOKENS


def test_the_wait_for_data_is_a_share_of_the_clock(clock, monkeypatch):
    clock.slow(monkeypatch, trainer.Prefetch, "__next__", 1)
    last = of(Step, train(max_steps=6, options={"clock": clock})[0])[-1]
    assert last.seconds == 12
    assert last.data_wait_share == pytest.approx(6 / 12)
