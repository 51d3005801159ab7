"""What phase 2 added to training: parts, smoothing, scaling, averages, the clock; and that each survives a stop."""

import math
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_transformer.backend import divided_blas
from mlx_transformer.nn.config import SIZES
from mlx_transformer.train.optim.average import EMA
from mlx_transformer.train.optim.clip import GlobalNorm, ZClip
from mlx_transformer.train.optim.groups import Group
from mlx_transformer.train.optim.scaling import LossScale
from mlx_transformer.train.optim.schedules import BatchWarmup
from mlx_transformer.train.optim.stopping import NoStop, SuccessiveRises
from mlx_transformer.train.recipe import DTYPES
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.train.trainer import Eval, Resumed, Saved, Step
from phases import phase1, phase2
from phases.ablations import phase2 as ablations
from tests.train.test_trainer import (
    DATA,
    RECIPE,
    STEP_TOKENS,
    Descent,
    Everything,
    L,
    assert_equal_weights,
    flat,
    make_model,
    make_tokens,
    of,
    train,
)

PLAIN = replace(
    RECIPE,
    groups=(Group(name="all", select=Everything(), optimizer=Descent()),),
    clip=GlobalNorm(max_norm=math.inf),
    stop=NoStop(),
)


def rows_of(count, seed=0):
    """Return sequences (count, L + 1) of documents of unequal length with separators."""
    draw = np.random.default_rng(seed)
    tokens = np.concatenate([np.append(draw.integers(1, 61, draw.integers(1, 3 * L)), 0) for _ in range(2 * count)])
    return mx.array(np.resize(tokens, (count, L + 1)).astype(np.int32))


def one_step(recipe, batch, rate=1.0, compiled=True):
    """Metrics, and what the step took off each weight."""
    model = make_model(dropout=0.0)
    before = flat(model)
    with divided_blas():
        metrics, norm = TrainingStep(model, recipe, compiled=compiled)(batch, rate)
        after = flat(model)
    return {**{name: value.item() for name, value in metrics.items()}, "norm": norm.item()}, {
        path: before[path] - after[path] for path in before
    }


# Accumulation


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("parts", [2, 3, 7, 50])
def test_parts_give_the_gradients_of_the_whole(parts, compiled):
    batch = rows_of(7)
    metrics, whole = one_step(PLAIN, batch)
    added, sum_of_parts = one_step(replace(PLAIN, accumulate=parts), batch, compiled=compiled)
    assert added["loss"] == pytest.approx(metrics["loss"], rel=2e-6)
    for path, gradient in whole.items():
        np.testing.assert_allclose(sum_of_parts[path], gradient, rtol=0, atol=1e-6, err_msg=path)
    assert max(np.abs(gradient).max() for gradient in whole.values()) > 1e-3


def test_parts_of_a_step_need_the_memory_of_one():
    """Were all forward passes made first, eight parts would need as much as the whole."""
    config = phase1.Config(vocab_size=64, d_model=64, n_layers=2, n_heads=2, d_ff=256, seq_len=64, dropout=0.1)
    batch = mx.random.randint(0, 64, (64, 65), key=mx.random.key(0))
    peaks = []
    for parts in (1, 8):
        step = TrainingStep(phase1.Model(config), replace(PLAIN, accumulate=parts))
        mx.eval(step.state)
        mx.clear_cache()
        mx.reset_peak_memory()
        with divided_blas():
            mx.eval(step(batch, 1.0), step.state)
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 0.3 * peaks[0]


# Label smoothing


def test_smoothing_is_in_the_training_loss_alone():
    plain, _ = train(recipe=PLAIN, max_steps=1)
    smooth, _ = train(recipe=replace(PLAIN, label_smoothing=0.5, learning_rate=1e-30), max_steps=1)
    frozen, _ = train(recipe=replace(PLAIN, learning_rate=1e-30), max_steps=1)
    assert of(Step, plain)[0].metrics["loss"] != pytest.approx(of(Step, smooth)[0].metrics["loss"], abs=1e-3)
    assert of(Eval, smooth)[0].valid_loss == pytest.approx(of(Eval, frozen)[0].valid_loss, abs=1e-6)


def test_smoothing_is_the_mean_loss_of_a_mixed_target():
    model, batch, share = make_model(dropout=0.0), rows_of(3), 0.3
    log_p = np.array(model(batch[:, :-1])).astype(np.float64)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    at_target = np.take_along_axis(log_p, np.array(batch[:, 1:])[..., None], -1)
    expected = -(1 - share) * at_target.mean() - share * log_p.mean()
    metrics, _ = one_step(replace(PLAIN, label_smoothing=share), batch)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


# Mixed precision

HALF = replace(RECIPE, dtype="float16", loss_scale=LossScale(initial=2.0**40, growth_steps=8))


def test_an_overflow_is_survived():
    """From a scale far too large: steps are left out whole until it fits, then it learns, and grows again."""
    model = make_model(dropout=0.0)
    step, batch = TrainingStep(model, replace(HALF, average=EMA(horizon_tokens=100), clip=ZClip())), rows_of(3)
    scales, losses = [], []
    with divided_blas():
        for _ in range(60):
            before = {path: np.array(a) for path, a in tree_flatten([model.parameters(), step.state[1:3]])}
            scaling = {name: value.item() for name, value in step.memory["scaling"].items()}
            metrics, norm = step(batch, 1e-2)
            mx.eval(metrics, norm, step.state)
            skipped = step.memory["scaling"]["skipped_steps"].item() > scaling["skipped_steps"]
            after = {path: np.array(a) for path, a in tree_flatten([model.parameters(), step.state[1:3]])}
            same = {path: np.array_equal(before[path], after[path]) for path in before if "scaling" not in path}
            assert all(same.values()) if skipped else not all(same.values())
            assert (norm.item() == 0) == skipped
            scales.append(scaling["scale"])
            losses.append(metrics["loss"].item())
    skipped = int(step.memory["scaling"]["skipped_steps"].item())
    assert skipped >= 10
    assert scales[:11] == [2.0 ** (40 - i) for i in range(11)]
    assert any(after == 2 * before for before, after in pairwise(scales)), "it never grew again"
    assert losses[-1] < losses[0] - 1


def test_a_run_that_overflows_goes_on_and_says_so():
    events, _ = train(recipe=HALF, max_steps=40, options={"eval_every": 20})
    steps = of(Step, events)
    assert events[-1].why == "max_steps"
    assert steps[0].metrics["loss_scale"] == 2.0**40
    assert steps[-1].metrics["skipped_steps"] >= 10
    early, late = (event.valid_loss for event in of(Eval, events))
    assert late < early


def test_scaled_gradients_are_those_of_float32():
    _, half = one_step(replace(PLAIN, dtype="float16"), rows_of(3))
    _, full = one_step(PLAIN, rows_of(3))
    whole, apart = (
        math.sqrt(sum((gradient**2).sum() for gradient in tree.values()))
        for tree in (full, {path: half[path] - gradient for path, gradient in full.items()})
    )
    assert 0 < apart < 0.02 * whole


def test_what_no_scale_can_mend_is_divergence():
    recipe = replace(HALF, loss_scale=LossScale(initial=4.0), learning_rate=1e25)
    assert train(recipe=recipe, max_steps=50)[0][-1].why == "diverged"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_hundred_steps_in_half_precision_end_where_float32_does(dtype):
    data = make_tokens(train=60_000, valid=4000)
    losses = []
    for own in ("float32", dtype):
        recipe = replace(phase2.RECIPE.at("nano"), dtype=own, stop=NoStop())
        model = phase2.Model(phase2.Config(**{**SIZES["nano"], "vocab_size": 61}, dropout=0.0))
        events, _ = train(model, recipe, data, max_steps=200, options={"eval_every": 200})
        losses.append(of(Eval, events)[-1].valid_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


# Averages


def test_the_average_is_evaluated_and_kept_and_training_does_not_see_it(scripted):
    average = EMA(horizon_tokens=4 * STEP_TOKENS)
    seen = scripted(*[5.0 - 0.1 * i for i in range(30)])
    _, model = train(recipe=replace(RECIPE, average=average), max_steps=30, options={"eval_every": 1})
    weights = scripted(*[5.0 - 0.1 * i for i in range(30)])
    train(max_steps=30, options={"eval_every": 1})
    expected: dict[str, np.ndarray] = weights[0]
    for i, (own, after) in enumerate(zip(seen, weights, strict=True)):
        share = average.share(STEP_TOKENS, (i + 1) * STEP_TOKENS)
        expected = {path: w + share * (after[path] - w) for path, w in expected.items()}
        for path, value in expected.items():
            np.testing.assert_allclose(own[path], value, atol=1e-6, err_msg=path)
    assert share == pytest.approx(1 / 3)
    assert_equal_weights(model, type("Kept", (), {"parameters": lambda self: seen[-1]})())


def test_the_window_of_the_average_grows_to_its_horizon():
    average = EMA(horizon_tokens=500)
    assert [average.share(10, tokens) for tokens in (10, 100, 200, 1000, 5000, 10**6)] == [1, 1, 0.5, 0.1, 0.02, 0.02]


# Batch warm-up

WARMING = replace(RECIPE, batch_tokens=8 * L, batch_warmup=BatchWarmup(tokens=24 * L, doublings=2), learning_rate=1e-3)


def test_the_batch_grows_by_tokens():
    events, _ = train(recipe=WARMING, max_steps=9)
    tokens = [event.tokens // L for event in of(Step, events)]
    assert tokens == [2, 4, 6, 8, 10, 12, 16, 20, 24]
    assert of(Step, train(recipe=WARMING, max_steps=10)[0])[-1].tokens == 32 * L


# Stopping


def test_any_rule_may_end_a_run(scripted):
    scripted(4.0, 3.0, 3.1, 3.2, 3.3)
    recipe = replace(RECIPE, stop=SuccessiveRises(times=2))
    events, _ = train(recipe=recipe, max_steps=99, options={"eval_every": 1})
    assert (events[-1].why, events[-1].progress.step) == ("plateau", 4)
    assert events[-1].progress.valid_losses == [4.0, 3.0, 3.1, 3.2]


# All of it

EVERYTHING = replace(
    WARMING,
    accumulate=2,
    label_smoothing=0.1,
    clip=ZClip(warmup_steps=2),
    average=EMA(horizon_tokens=100),
    loss_scale=LossScale(initial=2.0**30, growth_steps=3),
)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_resumed_is_uninterrupted_with_all_that_remembers(dtype, tmp_path):
    recipe = replace(EVERYTHING, dtype=dtype)
    events, whole = train(recipe=recipe, max_steps=24, options={"eval_every": 8})
    train(recipe=recipe, max_steps=5, options={"eval_every": 8, "checkpoints": tmp_path, "save_every": 5})
    options = {"eval_every": 8, "checkpoints": tmp_path}
    again, resumed = train(make_model(seed=9), recipe, max_steps=24, options=options)
    assert isinstance(again[0], Resumed)
    assert_equal_weights(resumed, whole)
    assert [event.metrics for event in of(Step, again)] == [event.metrics for event in of(Step, events)][5:]
    assert [event.valid_loss for event in of(Eval, again)][-2:] == [event.valid_loss for event in of(Eval, events)][-2:]
    assert of(Saved, again)


@pytest.mark.parametrize("recipe", [replace(EVERYTHING, dtype=dtype) for dtype in DTYPES], ids=DTYPES)
def test_compiled_and_eager_agree_on_all_of_it(recipe):
    runs = [train(recipe=recipe, max_steps=18, options={"compile": on, "eval_every": 6})[0] for on in (True, False)]
    ours, eager = ([event.valid_loss for event in of(Eval, run)] for run in runs)
    np.testing.assert_allclose(ours, eager, rtol=1e-4 if recipe.dtype == "float32" else 5e-3)


@pytest.mark.parametrize("size", SIZES)
def test_every_named_recipe_is_whole(size):
    for name, recipe in phase2.RECIPES.items():
        sized = recipe.at(size).check()
        assert "BySize" not in str(sized.to_dict()), name


def cold(recipe):
    """Without the warm-up, which follows the batch."""
    return replace(recipe, schedule=replace(recipe.schedule, warmup_tokens=1))


def test_recipes_add_one_idea_to_phase_1_and_remove_one_from_phase_2():
    for name, change in ablations.CHOSEN.items():
        added, removed = phase2.RECIPES[f"phase_1_with_{name}"], phase2.RECIPES[f"without_{name}"]
        assert cold(added) == cold(change(phase1.RECIPE, phase2.RECIPE)) != cold(phase1.RECIPE)
        assert cold(change(removed, phase2.RECIPE)) == cold(phase2.RECIPE) != cold(removed)
        assert cold(change(added, phase1.RECIPE)) == cold(phase1.RECIPE)
    for name, add in ablations.OTHERS.items():
        assert cold(phase2.RECIPES[f"phase_1_with_{name}"]) == cold(add(phase1.RECIPE)) != cold(phase1.RECIPE)
        assert cold(phase2.RECIPES[f"with_{name}"]) == cold(add(phase2.RECIPE)) != cold(phase2.RECIPE)


@pytest.mark.parametrize("size", SIZES)
def test_every_recipe_warms_up_over_as_many_steps_as_phase_1(size):
    def steps(recipe):
        sized = recipe.at(size)
        return sized.schedule.warmup_tokens / sized.batch_tokens

    ablated = (recipe for name, recipe in phase2.RECIPES.items() if "with" in name)
    for recipe in (phase2.RECIPE, *ablated):
        assert steps(recipe) == pytest.approx(steps(phase1.RECIPE))


@pytest.mark.parametrize("name", sorted(name for name in phase2.RECIPES if name.startswith(("original", "with_"))))
def test_every_named_recipe_trains(name):
    recipe = replace(phase2.RECIPES[name].at("nano"), batch_tokens=8 * L, learning_rate=3e-3)
    recipe = replace(recipe, schedule=replace(recipe.schedule, warmup_tokens=1))
    events, _ = train(recipe=recipe, data=DATA, max_steps=12, options={"compile": False, "eval_every": 12})
    losses = [event.metrics["loss"] for event in of(Step, events)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
