"""The products that our shim computes itself (sgemm.cpp), as MLX's matmul calls it, against float64."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transformer.backend import prepare

pytestmark = pytest.mark.skipif(prepare().blas is None, reason="no BLAS of ours under MLX here")
SIDES = st.integers(1, 150)


def factors(rows, inner, columns, seed=0):
    random = np.random.default_rng(seed)
    shapes = ((rows, inner), (inner, columns), (columns,))
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def assert_right(found, exact, inner):
    assert np.abs(np.array(found) - exact).max() <= 1e-5 * inner**0.5


@given(rows=st.integers(1, 20), inner=SIDES, columns=SIDES, transposed=st.booleans(), seed=st.integers(0, 99))
def test_products_of_few_rows(rows, inner, columns, transposed, seed):
    a, b, c = factors(rows, inner, columns, seed)
    right = mx.contiguous(mx.array(b.T)).T if transposed else mx.array(b)  # weights lie transposed
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert_right(mx.array(a) @ right, exact, inner)
    assert_right(mx.addmm(mx.array(c), mx.array(a), right, 0.5, 2.0), 0.5 * exact + 2 * c, inner)


@given(
    rows=st.integers(64, 200),
    inner=st.integers(1, 600),
    columns=st.integers(32, 100),
    transposed=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_products_of_many_rows_on_one_thread(rows, inner, columns, transposed, seed):
    a, b, c = factors(rows, inner, columns, seed)
    left, right = (
        mx.contiguous(mx.array(x.T)).T if own else mx.array(x) for x, own in zip((a, b), transposed, strict=True)
    )
    exact = a.astype(np.float64) @ b.astype(np.float64)
    prepare().blas.set_threads(1)
    try:
        assert_right(left @ right, exact, inner)
        assert_right(mx.addmm(mx.array(c), left, right, 0.5, 2.0), 0.5 * exact + 2 * c, inner)
    finally:
        prepare().blas.set_threads(prepare().threads)


@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_a_product_deeper_than_the_room_for_it(rows):
    a, b, _ = factors(rows, 5000, 13)
    assert_right(mx.array(a) @ mx.contiguous(mx.array(b.T)).T, a.astype(np.float64) @ b.astype(np.float64), 5000)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_number_that_is_none_stays_in_its_row_and_column(rows):
    a, b, _ = factors(rows, 17, 30)
    b[3, 4] = np.nan
    found = np.array(mx.array(a) @ mx.contiguous(mx.array(b.T)).T)
    assert np.isnan(found[:, 4]).all()
    assert np.isfinite(np.delete(found, 4, axis=1)).all()


@pytest.mark.parametrize("rows", [4, 7, 16])
def test_a_product_that_two_threads_share(rows, two_threads):
    a, b, _ = factors(rows, 300, 2051)
    transposed = mx.contiguous(mx.array(b.T)).T
    exact = a.astype(np.float64) @ b.astype(np.float64)
    for _ in range(50):
        assert_right(mx.array(a) @ transposed, exact, 300)


def test_two_streams_at_once_do_not_take_each_other_s_helper(two_threads):
    a, b, _ = factors(16, 256, 4096)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    left, right = mx.array(a), mx.contiguous(mx.array(b.T)).T
    mx.eval(left, right)
    streams = [mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)]
    found = [mx.matmul(left + 0, right, stream=stream) for _ in range(50) for stream in streams]
    mx.eval(found)
    for one in found:
        assert_right(one, exact, 256)
