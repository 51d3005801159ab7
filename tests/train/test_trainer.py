"""fit(): what stops it, what it measures, and that nothing but seed, recipe and data decides the weights."""

import math
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_transformer.data.tokens import Tokens
from mlx_transformer.nn.dropout import Dropout
from mlx_transformer.train.evaluate import Evaluator
from mlx_transformer.train.optim.average import EMA
from mlx_transformer.train.optim.clip import GlobalNorm
from mlx_transformer.train.optim.groups import Group, UpdateRule
from mlx_transformer.train.optim.schedules import InverseSqrt, Linear
from mlx_transformer.train.optim.stopping import Plateau
from mlx_transformer.train.recipe import BySize
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.train.trainer import Eval, Limits, RunOptions, Saved, Step, Stopped, fit
from mlx_transformer.utils.errors import BadInput
from phases import phase1

V, L, SEQUENCES = 61, 12, 3
STEP_TOKENS = SEQUENCES * L
CONFIG = phase1.Config(vocab_size=V, d_model=16, n_layers=2, n_heads=2, d_ff=24, seq_len=L, dropout=0.1)
RECIPE = replace(
    phase1.RECIPE.at("nano"),
    batch_tokens=STEP_TOKENS,
    learning_rate=3e-3,
    schedule=InverseSqrt(warmup_tokens=10 * STEP_TOKENS),
    stop=Plateau(patience=10**6, min_improvement=0.0),
)


def make_tokens(train=1500, valid=200, seed=0):
    """Tokens in which each depends on the one before, so that there is something to learn."""
    draw = np.random.default_rng(seed)
    stream = np.cumsum(draw.integers(1, 5, train + valid)) % (V - 1) + 1
    stream[::30] = 0
    tokens = stream.astype(np.uint16)
    tokens[train] = 0
    return Tokens(
        tokens[:train],
        tokens[train:],
        0,
        valid_bytes=500,
        valid_documents=9,
        floor_bits=None,
        unknown_rate=0.0,
        lossless=True,
    )


DATA = make_tokens()


def make_model(seed=0, **numbers):
    return phase1.Model(replace(CONFIG, **numbers), seed)


def train(model=None, recipe=RECIPE, data=DATA, *, seed=0, options=None, **limits):
    """All events of a run, and its model."""
    model = model or make_model()
    limits = Limits(**(limits or {"max_steps": 8}))
    return list(fit(model, recipe, data, seed=seed, limits=limits, options=RunOptions(**(options or {})))), model


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def flat(model):
    return {path: np.array(value) for path, value in tree_flatten(model.parameters())}


def assert_equal_weights(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


# What stops it


def test_it_learns():
    events, _ = train(max_steps=60, options={"eval_every": 20})
    losses = [event.valid_loss for event in of(Eval, events)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.05


def test_a_plateau_stops_it_after_its_patience_with_the_best_weights(scripted):
    seen = scripted(4.0, 3.0, 2.95, 2.99, 3.5)
    recipe = replace(RECIPE, stop=Plateau(patience=3, min_improvement=0.1))
    events, model = train(recipe=recipe, max_steps=99, options={"eval_every": 2})
    stopped = events[-1]
    assert (stopped.why, stopped.progress.step) == ("plateau", 10)
    assert stopped.progress.best_valid_loss == 2.95, "too small a gain does not count, but it is the best"
    assert stopped.progress.final_valid_loss == 3.5
    assert [event.improved for event in of(Eval, events)] == [True, True, True, False, False]
    assert flat(model).keys() == seen[2].keys()
    for path, value in flat(model).items():
        np.testing.assert_array_equal(value, seen[2][path])
    assert any((seen[2][path] != seen[4][path]).any() for path in seen[2])


def test_many_small_gains_are_one_large_one(scripted):
    """Patience counts from the best loss there is, not from the last one that counted."""
    scripted(3.0, 2.95, 2.91, 2.85, 2.84, 2.83)
    recipe = replace(RECIPE, stop=Plateau(patience=5, min_improvement=0.1))
    assert train(recipe=recipe, max_steps=99, options={"eval_every": 1})[0][-1].progress.step == 6


LIMITS = {"max_steps": 5, "max_tokens": 4 * STEP_TOKENS + 1, "max_epochs": 0.1}


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_each_limit_stops_it_with_an_evaluation(name, limit):
    events, _ = train(**{name: limit}, options={"eval_every": 3})
    stopped = events[-1]
    assert (stopped.why, stopped.progress.step) == (name, 5)
    assert stopped.progress.tokens == 5 * STEP_TOKENS
    assert stopped.progress.epochs == pytest.approx(5 * STEP_TOKENS / (len(DATA.train) - 1))
    assert [event.step for event in of(Eval, events)] == [3, 5]


def test_the_target_stops_it_and_is_noted(scripted):
    scripted(4.0, 3.0, 2.0)
    events, _ = train(max_steps=99, target_loss=2.5, options={"eval_every": 2})
    now = events[-1].progress
    assert (events[-1].why, now.step) == ("target", 6)
    assert (now.seconds_to_target, now.tokens_to_target) == (now.train_seconds, 6 * STEP_TOKENS)


def test_a_target_that_is_not_met_is_not_noted(scripted):
    scripted(4.0)
    now = train(max_steps=2, target_loss=2.5)[0][-1].progress
    assert now.seconds_to_target is None
    assert now.tokens_to_target is None


@pytest.mark.parametrize("eval_every", [1, 100], ids=["seen in an evaluation", "seen in a step"])
def test_divergence_stops_it_and_names_the_step(eval_every, tmp_path):
    options = {"eval_every": eval_every, "checkpoints": tmp_path}
    events, model = train(recipe=replace(RECIPE, learning_rate=1e25), max_steps=50, options=options)
    stopped = events[-1]
    assert stopped.why == "diverged"
    assert stopped.message.startswith(f"diverged at step {stopped.progress.step}: ")
    assert "nan" in stopped.message
    assert all(np.isfinite(value).all() for value in flat(model).values())
    assert all(event.step < stopped.progress.step for event in of(Saved, events))


def test_a_stop_from_outside_saves_without_an_evaluation(tmp_path):
    steps = iter([False, False, True])
    options = {"checkpoints": tmp_path, "eval_every": 3, "should_stop": lambda: next(steps)}
    events, _ = train(max_steps=9, options=options)
    assert [type(event) for event in events] == [Step, Step, Step, Saved, Stopped]
    assert events[-1].why == "interrupted"


# What decides the weights


@pytest.mark.usefixtures("on_cpu")
def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    (one, first), (two, second), (three, third) = train(), train(), train(seed=1)
    assert_equal_weights(first, second)
    assert [event.metrics for event in of(Step, one)] == [event.metrics for event in of(Step, two)]
    assert of(Step, one)[0].metrics != of(Step, three)[0].metrics
    assert any((flat(first)[path] != flat(third)[path]).any() for path in flat(first))


def test_the_seed_draws_the_dropout():
    """The same batches and weights, with and without dropout."""
    losses = [of(Step, train(make_model(dropout=dropout))[0])[0].metrics["loss"] for dropout in (0.0, 0.3)]
    assert losses[0] != losses[1]


def test_compiled_and_eager_steps_agree():
    events = [train(max_steps=15, options={"compile": compiled, "eval_every": 5})[0] for compiled in (True, False)]
    for kind, values in ((Step, lambda e: (e.metrics["loss"], e.gradient_norm)), (Eval, lambda e: e.valid_loss)):
        one, other = ([values(event) for event in of(kind, run)] for run in events)
        np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.usefixtures("on_cpu")
def test_evaluating_more_often_changes_nothing():
    _, often = train(max_steps=9, options={"eval_every": 1})
    _, seldom = train(max_steps=9, options={"eval_every": 9})
    losses = of(Eval, train(max_steps=9, options={"eval_every": 1})[0])
    assert losses[-1].improved, "else the weights kept are not the last ones"
    assert_equal_weights(often, seldom)


@pytest.mark.usefixtures("on_cpu")
def test_saving_changes_nothing(tmp_path):
    _, saved = train(options={"checkpoints": tmp_path, "save_every": 1})
    _, plain = train()
    assert_equal_weights(saved, plain)


@pytest.mark.usefixtures("on_cpu")
def test_a_text_shorter_than_a_row_is_bad_input():
    with pytest.raises(BadInput, match=f"fewer than one sequence of {L + 1}"):
        train(data=make_tokens(train=L))


def test_a_batch_larger_than_the_text_trains():
    events, _ = train(recipe=replace(RECIPE, batch_tokens=300 * L), max_steps=2)
    assert events[-1].progress.tokens == 2 * 300 * L


# Evaluation


@pytest.mark.parametrize("valid", [2, L, L + 1, L + 2, 200, 9000], ids=lambda n: f"{n} tokens")
def test_the_validation_loss_predicts_each_token_once(valid):
    data = make_tokens(valid=valid)
    model = make_model(dropout=0.5)
    model.eval()
    losses = []
    for start in range(0, valid - 1, 400 * L):  # many windows at once, the last and shorter one alone
        tokens = data.valid[start : start + 400 * L + 1].astype(np.int64)
        whole = (len(tokens) - 1) // L * L
        for inputs, targets in (
            (tokens[:whole].reshape(-1, L), tokens[1 : whole + 1].reshape(-1, L)),
            (tokens[None, whole:-1], tokens[None, whole + 1 :]),
        ):
            if inputs.size:
                logits = np.array(model(mx.array(inputs))).astype(np.float64)
                log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                losses.extend(-np.take_along_axis(log_p, targets[..., None], -1).ravel())
    assert len(losses) == valid - 1
    model.train()
    for compiled in (True, False):
        assert Evaluator(model, data.validation(L, 8192), compiled=compiled)() == pytest.approx(
            np.mean(losses), rel=1e-5
        )
    assert model.training


# The step


def gradients(model, batch):
    loss = mx.value_and_grad(lambda weights: (model.update(weights), model.loss(batch)[0])[1])
    weights = model.trainable_parameters()
    value, found = loss(weights)
    model.update(weights)
    return value.item(), {path: np.array(g, np.float64) for path, g in tree_flatten(found)}


@dataclass(frozen=True)
class Everything:
    def __call__(self, path, parameter):
        return True


@dataclass(frozen=True)
class Descent(UpdateRule):
    """Plain gradient descent, in which the clipped gradient can be seen."""

    def make(self):
        from mlx import optimizers

        return optimizers.SGD(0.0)


@pytest.mark.parametrize("max_norm", [0.01, 1e6], ids=["clipped", "not clipped"])
def test_gradients_are_clipped_together(max_norm):
    groups = (Group(name="all", select=Everything(), optimizer=Descent()),)
    recipe = replace(RECIPE, groups=groups, clip=GlobalNorm(max_norm=max_norm))
    model, batch = make_model(dropout=0.0), mx.array(DATA.train[: L + 1].astype(np.int32)[None])
    before, (loss, gradient) = flat(model), gradients(model, batch)
    norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
    metrics, reported = TrainingStep(model, recipe)(batch, 0.5)
    assert metrics["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert reported.item() == pytest.approx(norm, rel=1e-4), "the norm before clipping"
    for path, value in flat(model).items():
        expected = before[path] - 0.5 * gradient[path] * min(1, max_norm / norm)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-7, err_msg=path)


def test_the_learning_rate_follows_warm_up_and_inverse_square_root():
    events, _ = train(max_steps=40)
    steps = np.arange(1, 41)
    expected = RECIPE.learning_rate * np.minimum(steps / 10, np.sqrt(10 / steps))
    np.testing.assert_allclose([event.learning_rate for event in of(Step, events)], expected, rtol=1e-12)


def test_the_learning_rate_follows_tokens_not_steps():
    recipe = replace(RECIPE, batch_tokens=2 * STEP_TOKENS)
    large, _ = train(recipe=recipe, max_steps=10)
    small, _ = train(max_steps=20)
    rates = {event.tokens: event.learning_rate for event in of(Step, small)}
    assert all(event.learning_rate == rates[event.tokens] for event in of(Step, large))


def test_weight_decay_touches_matrices_only():
    """One step with and without decay: matrices differ by rate * decay * weight, vectors not at all."""
    *matrices, vectors = RECIPE.groups
    batch = mx.array(DATA.train[: L + 1].astype(np.int32)[None])
    after = []
    for decay in (0.0, 0.5):
        decayed = [replace(group, optimizer=replace(group.optimizer, weight_decay=decay)) for group in matrices]
        recipe = replace(RECIPE, groups=(*decayed, vectors)).with_rates(0.01, embedding=1.0, head=1.0)
        model = make_model(dropout=0.0)
        before = flat(model)
        TrainingStep(model, recipe)(batch, 0.01)
        after.append(flat(model))
    for path, start in before.items():
        expected = 0.01 * 0.5 * start if start.ndim >= 2 else np.zeros_like(start)
        np.testing.assert_allclose(after[0][path] - after[1][path], expected, atol=1e-6, err_msg=path)
    assert all(group.optimizer.weight_decay > 0 for group in matrices)
    assert vectors.optimizer.weight_decay == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_in_it_and_keeps_float32_weights(dtype, monkeypatch):
    seen, objective = set(), phase1.Model.objective

    def spied(self, h, targets, ctx):
        seen.add(h.dtype)
        return objective(self, h, targets, ctx)

    monkeypatch.setattr(phase1.Model, "objective", spied)
    events, model = train(recipe=replace(RECIPE, dtype=dtype), max_steps=30, options={"eval_every": 10})
    assert seen == {getattr(mx, dtype)}
    full, _ = train(max_steps=30, options={"eval_every": 10})
    assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.float32}
    halves, wholes = ([event.valid_loss for event in of(Eval, run)] for run in (events, full))
    assert halves != wholes
    np.testing.assert_allclose(halves, wholes, atol=0.02)


def test_a_run_whose_schedule_has_ended_stops_at_the_next_evaluation():
    over = replace(RECIPE, schedule=Linear(warmup_tokens=1, total_tokens=7 * STEP_TOKENS))
    events, _ = train(recipe=over, max_steps=40, options={"eval_every": 5})
    *_, last, stopped = [event for event in events if isinstance(event, Eval | Stopped)]
    assert (last.step, stopped.why) == (10, "plateau"), "the learning rate is 0 from step 7 on"


@pytest.mark.parametrize(("steps", "end"), [(3, 10), (4, 15)])
def test_an_average_is_waited_for(steps, end):
    over = replace(RECIPE, schedule=Linear(warmup_tokens=1, total_tokens=7 * STEP_TOKENS))
    events, _ = train(
        recipe=replace(over, average=EMA(horizon_tokens=steps * STEP_TOKENS)), max_steps=40, options={"eval_every": 5}
    )
    *_, last, stopped = [event for event in events if isinstance(event, Eval | Stopped)]
    assert (last.step, stopped.why) == (end, "plateau"), "the learning rate is 0 from step 7 on"


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("ours", "recipe_s"), [(0.1, 0.0), (0.0, 0.2)])
def test_the_recipe_s_dropout_replaces_the_model_s_while_training(ours, recipe_s):
    model = make_model(dropout=ours)
    _, expected = train(make_model(dropout=recipe_s))
    train(model, recipe=replace(RECIPE, dropout=recipe_s))
    assert_equal_weights(model, expected)
    assert {part.p for part in model.modules() if isinstance(part, Dropout)} == {ours}
    with pytest.raises(AssertionError):
        assert_equal_weights(train(make_model(dropout=ours))[1], expected)


def test_a_recipe_of_several_sizes_is_bad_input():
    with pytest.raises(BadInput, match="size = 'big': expected one of nano, small, base"):
        RECIPE.at("big")
    with pytest.raises(BadInput, match=r'the recipe\'s batch_tokens differs by model size: use recipe\.at\("nano"\)'):
        train(recipe=phase1.RECIPE)
    schedule = InverseSqrt(warmup_tokens=BySize(nano=1, small=2, base=3))
    with pytest.raises(BadInput, match=r"schedule\.warmup_tokens"):
        train(recipe=replace(RECIPE, schedule=schedule))
