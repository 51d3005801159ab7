"""fit() resumed from a checkpoint: as if it had not stopped."""

from dataclasses import replace

import pytest

from mlx_transformer.train.optim.stopping import Plateau
from mlx_transformer.train.trainer import Eval, Resumed, Saved, Step
from mlx_transformer.utils.errors import BadInput
from tests.train.test_trainer import (
    RECIPE,
    STEP_TOKENS,
    assert_equal_weights,
    make_model,
    of,
    train,
)


def test_resumed_is_uninterrupted(tmp_path):
    events, whole = train(max_steps=16, options={"eval_every": 4})
    train(max_steps=4, options={"eval_every": 4, "checkpoints": tmp_path})
    again, resumed = train(make_model(seed=9), max_steps=16, options={"eval_every": 4, "checkpoints": tmp_path})
    assert isinstance(again[0], Resumed)
    assert again[0].step == 4
    assert_equal_weights(resumed, whole)
    assert [event.metrics for event in of(Step, again)] == [event.metrics for event in of(Step, events)][4:]
    assert [event.valid_loss for event in of(Eval, again)] == [event.valid_loss for event in of(Eval, events)][1:]


def test_a_run_that_limits_cut_several_times_is_uninterrupted(tmp_path):
    """The evaluations at the cuts count neither for the plateau nor for the best weights."""
    recipe = replace(RECIPE, learning_rate=1e-7, stop=Plateau(patience=2, min_improvement=1.0))
    events, whole = train(recipe=recipe, max_steps=60, options={"eval_every": 8})
    options = {"eval_every": 8, "checkpoints": tmp_path}
    for limit in (2, 3, 4, 5, 8, 9, 10, 11, 23, 60):
        again, resumed = train(recipe=recipe, max_steps=limit, options=options)
    assert (events[-1].why, events[-1].progress.step) == ("plateau", 24)
    assert_same_progress(again[-1], events[-1])
    assert_equal_weights(resumed, whole)


def assert_same_progress(stopped, reference):
    clocks = ("train_seconds", "compile_seconds", "eval_seconds", "timed_tokens", "timed_seconds", "data_seconds")
    one, other = (
        {name: value for name, value in vars(event.progress).items() if name not in (*clocks, "peak_memory_bytes")}
        for event in (stopped, reference)
    )
    assert (stopped.why, one) == (reference.why, other)


def test_an_evaluation_that_an_interruption_left_out_is_made_up_for(tmp_path):
    whole, _ = train(max_steps=8, options={"eval_every": 4})
    options = {"eval_every": 4, "checkpoints": tmp_path}
    count = iter(range(99))
    train(max_steps=8, options={**options, "should_stop": lambda: next(count) == 3})
    again, _ = train(max_steps=8, options=options)
    assert [type(event) for event in again[:4]] == [Resumed, Eval, Saved, Step]
    assert [event.valid_loss for event in of(Eval, again)] == [event.valid_loss for event in of(Eval, whole)]


def test_a_target_given_when_resuming(tmp_path, scripted):
    scripted(3.0)
    options = {"eval_every": 4, "checkpoints": tmp_path}
    train(max_steps=4, options=options)
    events, _ = train(max_steps=99, target_loss=3.5, options=options)
    now = events[-1].progress
    assert (events[-1].why, now.step, now.tokens_to_target) == ("target", 4, 4 * STEP_TOKENS)
    assert now.seconds_to_target == now.train_seconds
    scripted(2.0)
    now = train(max_steps=5, target_loss=1.0, options=options)[0][-1].progress
    assert (now.step, now.seconds_to_target, now.tokens_to_target) == (5, None, None)


def test_a_checkpoint_of_another_model_is_bad_input(tmp_path):
    train(options={"checkpoints": tmp_path})
    with pytest.raises(BadInput, match=r"to another model or version: .* does not fit"):
        train(make_model(d_ff=32), options={"checkpoints": tmp_path})
    with pytest.raises(BadInput, match=r"to another model or version: .* does not fit"):
        train(make_model(n_layers=3), options={"checkpoints": tmp_path})
