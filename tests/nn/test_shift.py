"""The token shift: its predecessor, its equation, and where a sequence begins."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer.utils.errors import BadInput
from phases import phase6
from tests.ladder import TINY, tiny, tokens
from tests.phases.test_architecture import apart, like, set_all


def test_factors_of_zero_are_no_shift_and_a_new_model_has_them():
    before = tiny(phase6.BRANCHES["without_token_shift"])
    net = like(phase6.Model, before)
    assert apart(net, before) > 1e-3
    assert apart(set_all(net, "shift_lambda", 0.0), before) == 0
    assert all((shift.shift_lambda == 0).all() for shift in phase6.Model(phase6.Config(**TINY)).shifts)
    assert (before.shifts, before.n_recent) == ([], 0)


def test_each_input_has_its_own_embedding_and_those_before_it():
    net, x = tiny(phase6.Model, n_shifts=3), tokens(2, 6)
    found, rows = net.embed_tokens(net.context(x)), np.array(net.embedding(x))
    expected = rows.copy()
    for i, shift in enumerate(net.shifts, 1):
        expected[:, i:] += np.array(shift.shift_lambda) * rows[:, :-i]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(BadInput, match="n_shifts = -1: expected a whole number of at least 0"):
        phase6.Config(**TINY, n_shifts=-1)


def test_the_embedding_learns_from_every_place():
    net, x = tiny(phase6.Model, n_shifts=1), mx.array([[1, 2, 3]])

    def last(weight):
        net.embedding.weight = weight
        return net.embed_tokens(net.context(x))[0, 2].sum()

    gradient = mx.grad(last)(net.embedding.weight)
    np.testing.assert_allclose(gradient[2], net.shifts[0].shift_lambda, atol=1e-6)
    assert (gradient[3] == 1).all()
    assert (gradient[1] == 0).all()
