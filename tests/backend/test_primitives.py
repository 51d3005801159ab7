"""Custom primitives for decoding on a Linux CPU (primitives.cpp), against float64 and where they are missing."""

from importlib.metadata import PackageNotFoundError

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from mlx_transformer import ops
from mlx_transformer.backend import describe_primitives, extension, native
from mlx_transformer.ops import fastmath

here = pytest.mark.skipif(fastmath.custom_ops() is None, reason=describe_primitives())
SIDES = st.integers(1, 40)
LAYOUTS = st.sampled_from(["rows", "heads inside", "columns", "a part"])


def laid_out(x, layout):
    """The array of these numbers, lying in memory in another way."""
    if layout == "heads inside":
        return mx.contiguous(mx.array(x).swapaxes(1, 2)).swapaxes(1, 2)
    if layout == "columns":
        return mx.contiguous(mx.array(x).swapaxes(2, 3)).swapaxes(2, 3)
    if layout == "a part":
        return mx.pad(mx.array(x), [(1, 0), (0, 1), (2, 1), (1, 2)])[1:, :-1, 2:-1, 1:-2]
    return mx.array(x)


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact(q, k, v, scale, added):
    k, v = (np.repeat(x.astype(np.float64), q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    return softmax(q.astype(np.float64) @ k.swapaxes(-1, -2) * scale + added, axis=-1) @ v


def mask_of(kind, seed, rows, heads, keys):
    """(what is given, what is added to the scores)."""
    random = np.random.default_rng(seed)
    if kind == "bools":
        seen = random.random((rows, 1, 1, keys)) < 0.7
        seen[..., 0] = True
        return mx.array(seen), np.where(seen, 0, -np.inf)
    if kind == "numbers":
        bias = random.standard_normal((heads, 1, keys)).astype(np.float32)
        return mx.array(bias), bias
    return None, 0


def assert_plain_gradients(loss, arrays, monkeypatch, tolerance):
    """The gradients of loss(*arrays) are those without our operations."""
    gradient = mx.grad(loss, argnums=list(range(len(arrays))))
    ours = gradient(*arrays)
    monkeypatch.setattr(fastmath, "on_linux_cpu", lambda: False)
    for own, plain in zip(ours, gradient(*arrays), strict=True):
        np.testing.assert_allclose(np.array(own), np.array(plain), rtol=1e-4, atol=tolerance)


@here
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    keys=st.integers(1, 70),
    d=SIDES,
    width=SIDES,
    mask=st.sampled_from(["none", "bools", "numbers"]),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_attention_of_one_query(rows, groups, shared, keys, d, width, mask, layouts, seed):
    heads = groups * shared
    q, k, v = drawn(seed, rows, heads, 1, d), drawn(seed, rows, groups, keys, d), drawn(seed, rows, groups, keys, width)
    given_mask, added = mask_of(mask, seed, rows, heads, keys)
    found = ops.grouped_attention(*map(laid_out, (q, k, v), layouts), d**-0.5, given_mask)
    np.testing.assert_allclose(np.array(found), exact(q, k, v, d**-0.5, added), rtol=0, atol=1e-5)


@here
def test_a_query_that_sees_nothing_gives_zeros_and_numbers_that_are_none_show():
    k, v = mx.array(drawn(0, 2, 1, 5, 4)), mx.array(drawn(1, 2, 1, 5, 3))
    q = mx.ones((2, 2, 1, 4))
    for nothing in (mx.zeros((1, 5), mx.bool_), mx.full((1, 5), -mx.inf)):
        assert mx.array_equal(ops.grouped_attention(q, k, v, 1.0, nothing), mx.zeros((2, 2, 1, 3)))
    for bad in (mx.nan, mx.inf):
        broken = mx.concatenate([q[:, :1], q[:, 1:] * bad], axis=1)
        found = np.array(ops.grouped_attention(broken, mx.abs(k), v, 1.0))
        assert np.isnan(found[:, 1]).all()
        assert np.isfinite(found[:, 0]).all()
    far = ops.grouped_attention(q * 1e4, k, v, 1.0)  # scores beyond what exp can hold
    assert np.isfinite(np.array(far)).all()


@here
@pytest.mark.parametrize(
    ("q", "k", "v", "mask"),
    [
        ((1, 2, 1, 4), (1, 3, 5, 4), (1, 3, 5, 4), None),
        ((1, 3, 1, 4), (1, 2, 5, 4), (1, 2, 5, 4), None),
        ((1, 2, 1, 3), (1, 2, 5, 4), (1, 2, 5, 4), None),
        ((1, 2, 1, 4), (1, 2, 5, 4), (1, 2, 4, 4), None),
        ((2, 2, 1, 4), (3, 2, 5, 4), (3, 2, 5, 4), None),
        ((1, 2, 1, 4), (1, 2, 5, 4), (1, 2, 5, 4), (1, 4)),
        ((1, 2, 1, 4), (1, 2, 5, 4), (1, 2, 5, 4), (3, 1, 5)),
        ((1, 2, 1, 4), (1, 2, 5, 4), (1, 2, 5, 4), (1, 1, 1, 1, 5)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v, mask):
    with pytest.raises(ValueError, match="attend: "):
        ops.grouped_attention(mx.ones(q), mx.ones(k), mx.ones(v), 1.0, None if mask is None else mx.ones(mask))


@here
def test_weights_of_another_width_are_refused():
    x, weight, short = mx.ones((2, 1, 4)), mx.ones(4), mx.ones(3)
    for own in (lambda: ops.layer_norm(x, weight, short, 1e-5), lambda: ops.layer_norm(x, short, weight, 1e-5)):
        with pytest.raises(ValueError, match="norm: "):
            own()
    with pytest.raises(ValueError, match="norm: "):
        ops.rms_norm(x, mx.ones((1, 4)), 1e-5)


@here
@pytest.mark.parametrize("mask", ["none", "bools", "numbers"])
def test_gradients_are_those_of_the_steps(mask, monkeypatch):
    arrays = [mx.array(drawn(i, 2, heads, length, 5)) for i, (heads, length) in enumerate([(4, 1), (2, 9), (2, 9)])]
    given_mask, _ = mask_of(mask, 3, 2, 4, 9)
    if mask == "numbers":
        arrays.append(given_mask)

    def loss(q, k, v, bias=given_mask):
        return (ops.grouped_attention(q, k, v, 0.5, bias) ** 3).sum()

    assert_plain_gradients(loss, arrays, monkeypatch, 1e-5)


@here
@given(rows=st.integers(1, 5), d=st.integers(1, 70), layout=LAYOUTS, biased=st.booleans(), seed=st.integers(0, 99))
def test_norms_of_one_token(rows, d, layout, biased, seed):
    x, weight, bias = drawn(seed, rows, 1, d), drawn(seed + 1, d), drawn(seed + 2, d)
    token, wide = laid_out(x[:, None], layout)[:, 0], x.astype(np.float64)
    scaled = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * weight
    found = ops.layer_norm(token, mx.array(weight), mx.array(bias) if biased else None, 1e-5)
    np.testing.assert_allclose(np.array(found), scaled + bias * biased, rtol=1e-5, atol=2e-5)
    found = ops.rms_norm(token, mx.array(weight), 1e-5)
    scaled = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(np.array(found), scaled, rtol=1e-5, atol=2e-5)


@here
def test_gradients_of_norms_of_one_token(monkeypatch):
    arrays = [mx.array(drawn(0, 3, 1, 7)), mx.array(drawn(1, 7)), mx.array(drawn(2, 7))]

    def loss(x, weight, bias):
        return (ops.layer_norm(x, weight, bias, 1e-5) ** 3 + ops.rms_norm(x, weight, 1e-5) ** 3).sum()

    assert_plain_gradients(loss, arrays, monkeypatch, 1e-4)


@here
def test_two_threads_share_the_heads_and_two_streams_do_not_disturb_each_other(two_threads):
    q, k, v = drawn(0, 8, 8, 1, 32), drawn(1, 8, 8, 200, 32), drawn(2, 8, 8, 200, 32)
    arrays = [mx.array(x) for x in (q, k, v)]
    mx.eval(arrays)
    found = []
    for stream in [mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)] * 25:
        with mx.stream(stream):
            found.append(ops.grouped_attention(*arrays, 0.2))
    mx.eval(found)
    wanted = exact(q, k, v, 0.2, 0)
    for one in found:
        np.testing.assert_allclose(np.array(one), wanted, rtol=0, atol=1e-5)


@here
def test_other_numbers_than_float32_go_step_by_step():
    q, k = mx.ones((1, 1, 1, 4), mx.float16), mx.ones((1, 1, 3, 4), mx.float16)
    assert ops.grouped_attention(q, k, k, 1.0).dtype == mx.float16
    assert fastmath.custom_ops(q) is None


class _Wrong:
    @staticmethod
    def attend(q, k, v, mask, scale):
        return v[:, :, :1] * 2


class _Foreign:
    @staticmethod
    def attend(*_):
        raise TypeError("incompatible function arguments")


def _raise(error):
    raise error


@here
@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("_build", lambda: _raise(native.CompilerError("g++ failed: no such header")), "no such header"),
        ("_folder", lambda package: _raise(PackageNotFoundError(package)), "No package metadata"),
        ("find_spec", lambda package: None, "nanobind is not installed"),
        ("_load", lambda path: _raise(ImportError("an undefined symbol")), "an undefined symbol"),
        ("_load", lambda path: _Wrong, "where [0.88"),
        ("_load", lambda path: _Foreign, "does not have the internals"),
    ],
)
def test_where_they_cannot_be_had_it_is_said_why(name, value, why, monkeypatch):
    monkeypatch.setattr(extension, name, value)
    module, fault = extension._load_checked.__wrapped__()
    assert module is None
    assert why in fault
