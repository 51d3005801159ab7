"""Gradients of rows that are selected by indices: summed in float32, and on request in a fixed order."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from bench.tools.graph import labels, on_metal
from mlx_transformer import ops
from mlx_transformer.backend import divided_blas
from mlx_transformer.train.optim import GlobalNorm, Group
from mlx_transformer.train.step import TrainingStep
from phases import phase1
from tests.train.test_trainer import Descent, Everything

V, N, HALF = 50, 20_000, (mx.float16, mx.bfloat16)


def draw(seed=0):
    """Ids of which half are 3, and cotangents with a mean, as those of a frequent token have."""
    random = np.random.default_rng(seed)
    ids = np.where(random.random(N) < 0.5, 3, random.integers(0, V, N))
    return mx.array(ids.astype(np.int32)), mx.array(random.normal(0.1, 1, (N, 4)).astype(np.float32))


def gradient(function, ids, cotangent, dtype):
    """Return the gradient of a table (V, 4) and that of the same cotangents in float64."""
    cotangent = cotangent.astype(dtype)
    (got,) = mx.vjp(lambda table: function(table, ids), [mx.zeros((V, 4), dtype)], [cotangent])[1]
    exact = np.zeros((V, 4))
    np.add.at(exact, np.array(ids), np.array(cotangent.astype(mx.float32)).astype(np.float64))
    return np.array(got.astype(mx.float32)), exact


@pytest.mark.parametrize("dtype", HALF)
def test_a_frequent_token_has_its_gradient_in_16_bits(dtype):
    got, exact = gradient(ops.gather_rows, *draw(), dtype)
    np.testing.assert_allclose(got[3], exact[3], rtol=0.01)
    plain, exact = gradient(lambda table, ids: table[ids], *draw(), dtype)
    assert np.abs(plain[3] / exact[3] - 1).max() > 0.02, "MLX sums in float32 by now: gather_rows is not needed"


def test_float32_is_what_mlx_does():
    ids, cotangent = draw()
    got, plain = (gradient(f, ids, cotangent, mx.float32)[0] for f in (ops.gather_rows, lambda t, i: t[i]))
    np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize("dtype", [mx.float32, *HALF])
@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (0,)])
def test_rows_are_those_of_the_table(dtype, shape):
    table = mx.random.normal((V, 3, 2)).astype(dtype)
    ids = mx.random.randint(-V, V, shape)
    assert mx.array_equal(ops.gather_rows(table, ids), table[ids])


@pytest.mark.parametrize("dtype", [mx.float32, *HALF])
def test_a_fixed_order_adds_without_a_scatter(dtype):
    ids, cotangent = draw()
    with on_metal(), ops.fixed_order(True):
        got, exact = gradient(ops.gather_rows, ids - V * (ids == 7), cotangent, dtype)  # a negative index counts back
        graph = mx.vjp(lambda table: ops.gather_rows(table, ids), [mx.zeros((V, 4))], [cotangent])[1]
    np.testing.assert_allclose(got, exact, rtol=2e-5 if dtype == mx.float32 else 0.01, atol=2e-3)
    found = labels(*graph)
    assert "SegmentedMM" in found
    assert "Scatter" not in found


@pytest.mark.parametrize("clipped", [1, 3, 9])
def test_scores_by_distance_in_a_fixed_order(clipped):
    scores, g = mx.random.normal((2, 3, 6, clipped + 1)), mx.random.normal((2, 3, 6, 6))
    distances = mx.clip(mx.arange(6)[:, None] - mx.arange(6), 0, clipped)
    results = []
    for fixed in (False, True):
        with on_metal(), ops.fixed_order(fixed):
            results.append(mx.vjp(lambda s: ops.gather_by_distance(s, distances), [scores], [g]))
            assert ("ScatterAxis" in labels(*results[-1][1])) != fixed
    for one, other in zip(*results, strict=True):
        assert mx.allclose(one[0], other[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, *HALF])
def test_tokens_taken_and_put_back_add_nothing(dtype):
    x, g = (mx.random.normal(shape).astype(dtype) for shape in ((2, 6, 3), (2, 4, 3)))
    chosen = mx.array([[0, 2, 3, 5], [4, 1, 5, 0]])
    sequences, zeros = mx.arange(2)[:, None], mx.zeros_like(x)
    taken, to_x = mx.vjp(lambda x: ops.take_tokens(x, chosen), [x], [g])
    put, to_some = mx.vjp(lambda some: ops.put_tokens(some, chosen, 6), [g], [x])
    for got in (taken[0], to_some[0]):
        assert mx.array_equal(got, x[sequences, chosen])
    for got in (to_x[0], put[0]):
        assert mx.array_equal(got, zeros.at[sequences, chosen].add(g))
        assert got.dtype == dtype


class Counting(phase1.Model):
    """Its loss is the sum of the rows of a table of its own: the gradient is how often each token occurs."""

    def build(self, config):
        super().build(config)
        self.table = mx.zeros((config.vocab_size, 4))

    def loss(self, batch):
        loss = self.table[batch].sum() + self.table[1:3].sum() + self.head.weight.sum()
        return loss, {"loss": loss}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_part_that_indexes_a_parameter_of_its_own(dtype, deterministic):
    group = Group(name="all", select=Everything(), optimizer=Descent())
    recipe = replace(phase1.RECIPE.at("nano"), groups=(group,), clip=GlobalNorm(max_norm=math.inf), dtype=dtype)
    model = Counting(phase1.Config(vocab_size=V, d_model=16, n_layers=1, n_heads=2, seq_len=99, dropout=0.0))
    before, batch = model.table, draw()[0].reshape(-1, 100)
    with divided_blas(), on_metal():
        mx.eval(TrainingStep(model, recipe, deterministic=deterministic)(batch, 1.0))
    counts = np.bincount(np.array(batch).flatten(), minlength=V) + ((np.arange(V) > 0) & (np.arange(V) < 3))
    np.testing.assert_allclose(np.array(before - model.table)[:, 0], counts, rtol=1e-5)
    assert counts.max() > 256, "8 bits of mantissa would do"
