"""On a GPU a step begins before the one before it was waited for: nothing but the waiting differs."""

from dataclasses import replace

import pytest

from mlx_transformer.train import trainer
from mlx_transformer.train.optim import EMA, BatchWarmup
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.train.trainer import Eval, Resumed, Saved, Step
from tests.train.test_trainer import DATA, RECIPE, STEP_TOKENS, L, assert_equal_weights, make_model, of, train

WARMING = replace(
    RECIPE,
    batch_tokens=8 * L,
    batch_warmup=BatchWarmup(tokens=24 * L, doublings=2),
    average=EMA(horizon_tokens=100),
    dtype="float16",
)
OPTIONS = {
    "evaluations": (RECIPE, {"eval_every": 4}, {"max_steps": 14}),
    "an evaluation after each step": (RECIPE, {"eval_every": 1}, {"max_steps": 5}),
    "checkpoints": (RECIPE, {"eval_every": 6, "save_every": 5}, {"max_steps": 14}),
    "growing batches": (WARMING, {"eval_every": 7}, {"max_steps": 20}),
    "tokens": (RECIPE, {"eval_every": 100}, {"max_tokens": 9 * STEP_TOKENS + 1}),
    "epochs": (RECIPE, {"eval_every": 100}, {"max_epochs": 0.2}),
    "divergence": (replace(RECIPE, learning_rate=1e25), {"eval_every": 100}, {"max_steps": 50}),
}


@pytest.fixture
def calls(monkeypatch):
    """Look ahead as on a GPU; the number of steps that have begun."""
    begun, call = [], TrainingStep.__call__
    monkeypatch.setattr(trainer, "on_gpu", lambda: True)
    monkeypatch.setattr(TrainingStep, "__call__", lambda *args: begun.append(1) or call(*args))
    return begun


def without_times(events):
    """The events without seconds and speeds."""
    keys = ("step", "tokens", "epochs", "metrics", "learning_rate", "gradient_norm", "valid_loss", "improved", "why")
    return [(type(event), [getattr(event, key, None) for key in (*keys, "message")]) for event in events]


@pytest.mark.parametrize("name", OPTIONS)
def test_events_and_weights_are_the_same(name, monkeypatch, request, tmp_path):
    recipe, options, limits = OPTIONS[name]
    expected, whole = train(recipe=recipe, options={**options, "checkpoints": tmp_path / "a"}, **limits)
    calls = request.getfixturevalue("calls")
    events, model = train(recipe=recipe, options={**options, "checkpoints": tmp_path / "b"}, **limits)
    assert str(without_times(events)) == str(without_times(expected))  # by text: nan is not nan
    assert_equal_weights(model, whole)
    assert len(calls) - len(of(Step, events)) == (name == "divergence")


def test_a_step_begins_before_the_last_one_is_reported(calls):
    ahead = {}
    for event in trainer.fit(
        make_model(),
        RECIPE,
        DATA,
        limits=trainer.Limits(max_steps=9),
        options=trainer.RunOptions(eval_every=4),
    ):
        if isinstance(event, Step):
            ahead[event.step] = len(calls) - event.step
    assert ahead == {1: 0, 2: 1, 3: 1, 4: 0, 5: 1, 6: 1, 7: 1, 8: 0, 9: 0}  # the first compiles


@pytest.mark.parametrize("stopped", [1, 3, 6])
def test_interrupted_and_resumed_is_uninterrupted(stopped, calls, tmp_path):
    events, whole = train(max_steps=14, options={"eval_every": 4})
    count = iter(range(99))
    options = {"eval_every": 4, "checkpoints": tmp_path}
    cut, _ = train(max_steps=14, options={**options, "should_stop": lambda: next(count) >= stopped})
    assert cut[-1].why == "interrupted"
    assert [event.step for event in of(Saved, cut)][-1] == of(Step, cut)[-1].step
    again, resumed = train(make_model(seed=9), max_steps=14, options=options)
    assert isinstance(again[0], Resumed)
    assert_equal_weights(resumed, whole)
    done = len(of(Step, cut))
    assert [event.metrics for event in of(Step, again)] == [event.metrics for event in of(Step, events)][done:]
    losses = [event.valid_loss for event in of(Eval, cut) + of(Eval, again)]
    assert losses == [event.valid_loss for event in of(Eval, events)]
