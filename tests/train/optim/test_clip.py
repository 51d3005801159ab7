"""Clipping: each rule against its equation, and the state of the one that has some."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_transformer.train.optim.clip import AGC, ByValue, GlobalNorm, ZClip, sum_of_squares

numbers = st.floats(-1e3, 1e3, width=32)


def clip(rule, gradients, weights=None, memory=None):
    """The clipped gradients and the memory, as a step does it."""
    norm = mx.sqrt(sum_of_squares(gradients))
    memory = rule.watch(rule.start() if memory is None else memory, norm)
    return {path: np.array(g) for path, g in rule(gradients, weights or {}, norm, memory).items()}, memory


@given(st.lists(numbers, min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_the_joint_norm_is_bounded_and_the_direction_kept(values, most):
    gradients = {str(i): mx.array([value, 2 * value]) for i, value in enumerate(values)}
    clipped, _ = clip(GlobalNorm(max_norm=most), gradients)
    norm = float(np.linalg.norm([[v, 2 * v] for v in values]))
    assert np.linalg.norm(list(clipped.values())) <= most * 1.0001
    factor = min(1, most / (norm + 1e-6))
    for i, value in enumerate(values):
        np.testing.assert_allclose(clipped[str(i)], [value * factor, 2 * value * factor], rtol=1e-4, atol=1e-30)


@given(st.lists(numbers, min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_each_value_is_bounded_by_itself(values, most):
    clipped, _ = clip(ByValue(max_value=most), {"w": mx.array(values)})
    np.testing.assert_array_equal(clipped["w"], np.clip(np.float32(values), np.float32(-most), np.float32(most)))


def test_units_are_clipped_against_their_own_weights():
    rule = AGC(ratio=0.5, eps=1e-3)
    weights = {"w": mx.array([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]]), "b": mx.array([0.6, 0.8])}
    gradients = {"w": mx.array([[6.0, 8.0], [0.6, 0.8], [3.0, 4.0]]), "b": mx.array([0.0, 1.0])}
    weights["head.weight"] = weights["stack"] = mx.ones((2, 2, 4))
    gradients["head.weight"] = gradients["stack"] = mx.full((2, 2, 4), 8.0)
    clipped, _ = clip(rule, gradients, weights)
    expected = [[1.5, 2.0], [0.6, 0.8], [0.0003, 0.0004]]  # half the weights' norm 5; untouched; half of eps
    np.testing.assert_allclose(clipped["w"], expected, rtol=1e-4)
    np.testing.assert_allclose(clipped["b"], [0.0, 0.5], rtol=1e-4)
    np.testing.assert_allclose(clipped["stack"], 0.5, rtol=1e-4)  # a row of four at a time
    np.testing.assert_array_equal(clipped["head.weight"], 8.0)


def run(rule, norms):
    """The norms after clipping, one step after the other, and the last memory."""
    memory, after = rule.start(), []
    for norm in norms:
        clipped, memory = clip(rule, {"w": mx.array([float(norm)])}, memory=memory)
        after.append(float(clipped["w"][0]))
    return after, memory


def test_spikes_are_cut_and_nothing_else_is_touched():
    rule = ZClip(z_max=2.5, decay=0.9, warmup_steps=10)
    norms = (1 + 0.1 * np.sin(np.arange(40))).astype(np.float32)
    after, memory = run(rule, norms)
    assert after == norms.tolist()
    norms[30] = 50.0
    spiked, _ = run(rule, norms)
    others = [i for i in range(40) if i != 30]
    assert [spiked[i] for i in others] == norms[others].tolist()
    _, before = run(rule, norms[:30])
    mean, deviation = before["mean"].item(), before["variance"].item() ** 0.5
    z = (50 - mean) / deviation
    assert spiked[30] == pytest.approx(mean + 2.5**2 / z * deviation, rel=1e-3)
    assert spiked[30] < 1.2
    assert memory["steps"].item() == 40


def test_a_spike_in_the_first_steps_passes():
    assert run(ZClip(warmup_steps=10), [1.0, 1.1, 0.9, 30.0])[0][-1] == 30


def test_the_statistics_are_exact_until_they_move():
    norms = np.random.default_rng(0).uniform(1, 2, 20)
    _, memory = run(ZClip(decay=0.97, z_max=1e9), norms)
    assert memory["mean"].item() == pytest.approx(norms.mean(), rel=1e-5)
    assert memory["variance"].item() == pytest.approx(norms.var(), rel=1e-4)
    _, memory = run(ZClip(decay=0.5, z_max=1e9), [1.0, 1.0, 5.0, 3.0])
    assert memory["mean"].item() == pytest.approx(0.5 * (1 + 0.5 * 4) + 1.5)
