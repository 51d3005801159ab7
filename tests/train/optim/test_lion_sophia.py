"""Lion and Sophia: the steps of their papers' algorithms by hand, and Sophia's estimate of the curvature."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transformer.run import training
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.train.curvature import sample_targets, sampled_loss
from mlx_transformer.train.optim.groups import AdamW, Group, Optimizers, Paths
from mlx_transformer.train.optim.lion import Lion
from mlx_transformer.train.optim.sophia import Sophia
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.trees import by_path
from phases import phase5
from tests.faults.runs import ON_CPU, command, write_text
from tests.ladder import TINY, V, tiny, tokens

SIZE = 5
numbers = st.integers(0, 999).map(lambda seed: np.random.default_rng(seed).normal(size=(4, SIZE)))


def optimizers_of(rule, weight):
    return Optimizers([Group(name="all", select=Paths(".*"), optimizer=rule)], {"w": mx.array(weight)})


@given(numbers, st.floats(0, 0.5), st.floats(1e-3, 0.5))
@settings(max_examples=30)
def test_lion_is_algorithm_2(values, decay, rate):
    weight, gradients = values[0], values[1:]
    optimizers = optimizers_of(Lion(betas=(0.8, 0.95), weight_decay=decay), weight)
    ours, m = {"w": mx.array(weight)}, np.zeros(SIZE)
    for g in gradients:
        optimizers.advance(mx.array(rate))
        ours = optimizers.update({"w": mx.array(g)}, ours)
        weight = weight - rate * (np.sign(0.8 * m + 0.2 * g) + decay * weight)
        m = 0.95 * m + 0.05 * g
    np.testing.assert_allclose(np.array(ours["w"]), weight, atol=1e-5)


@given(numbers, numbers, st.floats(0, 0.5), st.floats(1e-3, 0.5), st.integers(1, 3))
@settings(max_examples=30)
def test_sophia_is_algorithm_3(values, drawn, decay, rate, every):
    """gamma is such that some numbers are clipped and others are not."""
    weight, gradients = values[0], values[1:]
    rule = Sophia(betas=(0.9, 0.7), gamma=0.3, weight_decay=decay, every=every)
    optimizers = optimizers_of(rule, weight)
    ours, m, h = {"w": mx.array(weight)}, np.zeros(SIZE), np.zeros(SIZE)
    for t, g in enumerate(gradients, 1):
        estimates = every == 1 or t % every == 1
        assert optimizers.want_curvature() == estimates
        if estimates:
            optimizers.observe({"w": mx.array(drawn[t])}, 7)
            h = 0.7 * h + 0.3 * 7 * drawn[t] ** 2
        optimizers.advance(mx.array(rate))
        ours = optimizers.update({"w": mx.array(g)}, ours)
        m = 0.9 * m + 0.1 * g
        weight = weight - rate * decay * weight
        weight = weight - rate * np.clip(m / np.maximum(0.3 * h, 1e-12), -1, 1)
    np.testing.assert_allclose(np.array(ours["w"]), weight, atol=1e-5)


def test_an_overflow_leaves_the_estimate_as_it_was():
    optimizers = optimizers_of(Sophia(), np.zeros(3))
    optimizers.observe({"w": mx.array([1.0, 2.0, 3.0])}, 2)
    before = np.array(optimizers.state[0]["w"]["h"])
    optimizers.observe({"w": mx.array([mx.inf, mx.nan, 3.0])}, 2)
    after = np.array(optimizers.state[0]["w"]["h"])
    assert (after[:2] == before[:2]).all()
    assert after[2] > before[2]


def test_other_rules_never_ask_for_the_curvature():
    for rule in (AdamW(), Lion()):
        assert not optimizers_of(rule, np.zeros(3)).want_curvature()


def test_targets_are_drawn_as_the_model_predicts(monkeypatch):
    net = tiny(phase5.Model)
    h = mx.broadcast_to(mx.random.normal((1, 1, TINY["d_model"]), key=mx.random.key(0)) * 0.5, (40, 500, 32))
    monkeypatch.setattr(
        "mlx_transformer.train.curvature.CHUNK_ELEMENTS", 3000 * V
    )  # several chunks, the last one shorter
    mx.random.seed(0)
    drawn = sample_targets(net, h)
    assert drawn.shape == (40, 500)
    found = np.bincount(np.array(drawn).ravel(), minlength=V) / drawn.size
    expected = np.array(mx.softmax(net.unembed(h[0, 0])))
    assert np.abs(found - expected).max() < 0.015
    assert not mx.array_equal(drawn[:20], drawn[20:])


def test_the_estimate_is_the_gauss_newton_diagonal_of_the_head():
    """Of a linear head the matrix is known: the mean over tokens of h^2 p (1 - p)."""
    net, batch = tiny(phase5.Model), tokens(2, 18)
    h = net.hidden(net.inputs(batch)[0]).reshape(-1, TINY["d_model"])
    p = mx.softmax(h @ net.head.weight.T, axis=-1)
    exact = np.array((p * (1 - p)).T @ h.square() / len(h))

    def loss(weight):
        net.head.weight = weight
        return sampled_loss(net, batch)

    weight, look = net.head.weight, mx.grad(loss)
    mx.random.seed(0)
    total = mx.zeros(weight.shape)
    for _ in range(300):
        total = total + look(weight).square()
        mx.eval(total)
    found = np.array(total) / 300 * batch[:, 1:].size
    assert abs(found.sum() / exact.sum() - 1) < 0.03
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.97


_SOPHIA = phase5.RECIPES["sophia"].at("nano")
OFTEN = replace(
    _SOPHIA,
    groups=tuple(replace(group, optimizer=Sophia(every=2)) for group in _SOPHIA.groups),
    learning_rate=1e-3,
)


def trained(recipe, steps, compiled=True):
    """Losses, the sum of what Sophia holds for the Hessian after each step, and the weights."""
    net = phase5.Model(phase5.Config(**TINY))
    mx.random.seed(1)
    take_step = TrainingStep(net, recipe, compiled=compiled)
    losses, hessians = [], []
    for i in range(steps):
        metrics, _ = take_step(tokens(6, 18, seed=i % 2), recipe.learning_rate)
        mx.eval(metrics, take_step.state)
        losses.append(metrics["loss"].item())
        held = [value for path, value in by_path(take_step.optimizers.state).items() if path.endswith(".h")]
        hessians.append(sum(value.sum().item() for value in held))
    return losses, hessians, by_path(net.parameters())


def test_the_step_looks_before_the_first_and_every_second():
    _, hessians, _ = trained(OFTEN, 5)
    assert [before != after for before, after in pairwise([0.0, *hessians])] == [True, False, True, False, True]


def test_the_compiled_step_draws_as_the_eager_one():
    (losses, hessians, weights), (eager, seen, others) = trained(OFTEN, 4), trained(OFTEN, 4, compiled=False)
    np.testing.assert_allclose(losses, eager, rtol=1e-4)
    np.testing.assert_allclose(hessians, seen, rtol=1e-3)
    assert all(np.allclose(value, others[path], atol=3e-3) for path, value in weights.items())


@pytest.mark.parametrize("name", phase5.RECIPES)
def test_the_loss_falls(name):
    losses, _, _ = trained(phase5.RECIPES[name].at("nano"), 40)
    assert losses[-1] < losses[0] - 0.4


def test_a_run_that_was_stopped_between_two_looks_ends_with_the_same_weights(tmp_path):
    text = write_text(tmp_path / "text.txt")
    phase5 = find_phase(5)
    line = [*ON_CPU, "--data", text, "--recipe", "sophia", "--quiet"]
    for folder, steps in (("whole", 13), ("parts", 7)):
        assert command(lambda: training.main(phase5), *line, "--max-steps", steps, "--out", tmp_path / folder).code == 0
    assert (
        command(lambda: training.main(phase5), "--resume", tmp_path / "parts", "--max-steps", 13, "--quiet").code == 0
    )
    whole, parts = (mx.load(str(tmp_path / name / "model" / "model.safetensors")) for name in ("whole", "parts"))
    assert all(mx.array_equal(value, parts[name]) for name, value in whole.items())
