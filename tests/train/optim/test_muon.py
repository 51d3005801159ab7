"""Muon: the orthogonality and scale of its update, its momentum and decay, and matrices taken at once or singly."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transformer.train.optim.groups import Group, Optimizers, Paths, Vectors
from mlx_transformer.train.optim.muon import Muon, orthogonal, orthogonal_each

sizes = st.integers(1, 40)


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def singular_values(x):
    return np.linalg.svd(np.array(x, np.float64), compute_uv=False)


def take(rule, gradients, weights, rate=0.1):
    """The weights after a step for each of the lists' gradients."""
    optimizers = Optimizers([Group(name="all", select=Paths(".*"), optimizer=rule)], weights)
    for step in gradients:
        optimizers.advance(mx.array(rate))
        weights = optimizers.update(step, weights)
    return weights


@given(rows=sizes, columns=sizes, scale=st.floats(1e-4, 1e4), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_the_update_is_nearly_orthogonal_whatever_the_gradient_s_scale(rows, columns, scale, seed):
    gradient = normal(rows, columns, seed=seed) * scale
    before = singular_values(gradient)
    update = np.array(orthogonal_each({"w": gradient}, 5)["w"], np.float64)
    after = singular_values(update)
    large = before > 0.02 * np.linalg.norm(before)
    assert ((after[large] > 0.6) & (after[large] < 1.3)).all()
    assert after.max() < 1.3
    u, _, v = np.linalg.svd(np.array(gradient, np.float64), full_matrices=False)
    nearness = np.diag(u.T @ update @ v.T)  # along the singular vectors of the gradient, none turned round
    np.testing.assert_allclose(nearness, after[np.argsort(np.argsort(-nearness))], atol=1e-2)


def test_more_iterations_leave_less_of_the_spread():
    x = normal(32, 32)
    spread = [np.log(singular_values(orthogonal(x, n))).std() for n in (0, 2, 5)]
    assert spread[0] > spread[1] > spread[2]


@given(shapes=st.lists(st.tuples(st.sampled_from((1, 4, 9)), st.sampled_from((1, 4, 9))), min_size=1, max_size=8))
@settings(max_examples=25)
def test_matrices_taken_at_once_are_taken_singly(shapes):
    rule = Muon(weight_decay=0.1)
    weights = {str(i): normal(*shape, seed=i) for i, shape in enumerate(shapes)}
    gradients = [{path: normal(*w.shape, seed=100 + step) for path, w in weights.items()} for step in range(3)]
    together = take(rule, gradients, weights)
    for path, w in weights.items():
        alone = take(rule, [{path: step[path]} for step in gradients], {path: w})
        np.testing.assert_allclose(together[path], alone[path], atol=1e-5)


def test_a_stack_of_matrices_is_each_of_them():
    weights, gradient = normal(3, 8, 5), normal(3, 8, 5, seed=1)
    whole = take(Muon(), [{"w": gradient}], {"w": weights})["w"]
    for i in range(3):
        np.testing.assert_allclose(whole[i], take(Muon(), [{"w": gradient[i]}], {"w": weights[i]})["w"], atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(64, 16), (16, 64), (24, 32)])
def test_a_step_changes_an_output_by_the_learning_rate_and_the_root_of_the_shape(rows, columns):
    step = np.array(take(Muon(), [{"w": normal(rows, columns)}], {"w": mx.zeros((rows, columns))})["w"])
    values = singular_values(step) / (0.1 * max(1, rows / columns) ** 0.5)
    assert 0.6 < values.min() < values.max() < 1.3


def test_the_decay_is_decoupled_from_the_orthogonalisation():
    weights, gradient = {"w": normal(6, 9) * 50}, {"w": normal(6, 9, seed=1)}
    plain = take(Muon(), [gradient], weights)["w"]
    decayed = take(Muon(weight_decay=0.5), [gradient], weights)["w"]
    np.testing.assert_allclose(decayed, plain - 0.1 * 0.5 * weights["w"], atol=1e-4)


def test_the_momentum_is_nesterov_s_and_rises():
    """By hand, with the orthogonalisation left to one gradient direction, which it only scales."""
    rule = Muon(momentum=0.9, first_momentum=0.5, warmup_steps=2, iterations=0)  # iterations=0: of Frobenius norm 1
    gradients = [normal(4, 4, seed=i) for i in range(3)]
    w = v = mx.zeros((4, 4))
    for m, g in zip((0.7, 0.9, 0.9), gradients, strict=True):
        v = m * v + (1 - m) * g
        ahead = m * v + (1 - m) * g
        w = w - 0.1 * ahead / mx.linalg.norm(ahead)
    ours = take(rule, [{"w": g} for g in gradients], {"w": mx.zeros((4, 4))})["w"]
    np.testing.assert_allclose(ours, w, atol=1e-5)


def test_no_gradient_is_no_step():
    weights = {"w": normal(4, 6)}
    assert mx.array_equal(take(Muon(), [{"w": mx.zeros((4, 6))}], weights)["w"], weights["w"])


def test_a_half_precision_gradient_is_orthogonalised_in_float32():
    gradient = normal(16, 32).astype(mx.bfloat16)
    weights = {"w": mx.zeros((16, 32))}
    ours = take(Muon(), [{"w": gradient}], weights)["w"]
    assert ours.dtype == mx.float32
    assert mx.array_equal(ours, take(Muon(), [{"w": gradient.astype(mx.float32)}], weights)["w"])


def test_each_group_has_its_own_rate():
    groups = [
        Group(name="matrices", select=Paths(r".*_proj\.weight"), optimizer=Muon(), lr_multiplier=2.0),
        Group(name="vectors", select=Vectors(), optimizer=Muon(), lr_multiplier=0.5),
    ]
    weights = {"q_proj.weight": mx.zeros((2, 2)), "bias": mx.zeros((2,))}
    optimizers = Optimizers(groups, weights)
    optimizers.advance(mx.array(0.1))
    rates = [optimizer.learning_rate.item() for optimizer in optimizers.optimizers]
    assert rates == pytest.approx([0.2, 0.05])
