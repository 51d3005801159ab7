"""Custom primitives for a Linux CPU (primitives.cpp), against float64 and where they are missing."""

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


def seen_by_many(kind, seed, rows, heads, queries, keys):
    """A mask of many queries, of which the first may see nothing, and what it adds to the scores."""
    random = np.random.default_rng(seed)
    if kind == "none":
        return None, 0.0
    seen = np.tril(np.ones((queries, keys), bool), keys - queries) & (random.random((rows, 1, 1, keys)) < 0.9)
    if kind == "holes":
        seen = random.random((rows, heads, queries, keys)) < 0.5
    added = np.where(seen, 0, -np.inf)
    if kind == "numbers":
        added = (added + random.standard_normal((heads, queries, keys))).astype(np.float32)
    return mx.array(added if kind == "numbers" else seen), added


@here
@given(
    groups=st.integers(1, 2),
    shared=st.integers(1, 3),
    queries=st.integers(2, 40),
    keys=st.integers(1, 70),
    d=SIDES,
    width=SIDES,
    mask=st.sampled_from(["none", "causal", "holes", "numbers"]),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS, LAYOUTS),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_attention_of_many_queries(groups, shared, queries, keys, d, width, mask, layouts, seed):
    heads, scale = groups * shared, d**-0.5
    shapes = [(2, heads, queries, d), (2, groups, keys, d), (2, groups, keys, width), (2, heads, queries, width)]
    q, k, v, do = (drawn(seed + i, *shape) for i, shape in enumerate(shapes))
    given_mask, added = seen_by_many(mask, seed, 2, heads, queries, keys)
    *arrays, cotangent = map(laid_out, (q, k, v, do), layouts)
    attend = lambda *arrays: ops.grouped_attention(*arrays, scale, given_mask)  # noqa: E731
    (o,), gradients = mx.vjp(attend, arrays, [cotangent])
    q, k, v, do = (x.astype(np.float64) for x in (q, k, v, do))
    k, v = k.repeat(shared, axis=1), v.repeat(shared, axis=1)
    scores = q @ k.swapaxes(-1, -2) * scale + added
    sees = np.isfinite(scores).any(-1, keepdims=True)
    p = np.where(sees, softmax(np.where(sees, scores, 0), axis=-1), 0)
    ds = p * (do @ v.swapaxes(-1, -2) - ((p @ v) * do).sum(-1, keepdims=True)) * scale
    together = lambda x: x.reshape(2, groups, shared, *x.shape[2:]).sum(2)  # noqa: E731
    exact = [p @ v, ds @ k, together(ds.swapaxes(-1, -2) @ q), together(p.swapaxes(-1, -2) @ do)]
    for found, value in zip([o, *gradients], exact, strict=True):
        np.testing.assert_allclose(np.array(found), value, rtol=0, atol=1e-5 * max(1, np.abs(value).max()))


@here
def test_nan_and_infinity_of_visible_keys_show_and_far_scores_do_not_overflow():
    q, k, v = (mx.array(drawn(i, 1, 2, 20, 4)) for i in range(3))
    causal = mx.arange(20) <= mx.arange(20)[:, None]
    attend = lambda q, k, v: ops.grouped_attention(q, k, v, 1.0, causal)  # noqa: E731
    for bad in (mx.nan, mx.inf):
        broken = mx.where(mx.arange(20)[:, None] == 7, bad, mx.abs(q))
        found = np.array(attend(broken, mx.abs(k), v))
        assert np.isnan(found[:, :, 7]).all()
        assert np.isfinite(np.delete(found, 7, axis=2)).all()
        gradients = mx.grad(lambda *arrays: attend(*arrays).sum(), argnums=[0, 1, 2])(broken, mx.abs(k), v)
        assert all(np.isnan(np.array(one)).any() for one in gradients)
    far = mx.vjp(attend, [q * 1e4, k, v], [v])
    assert all(np.isfinite(np.array(one)).all() for part in far for one in part)


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
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("mask", ["none", "bools", "numbers"])
def test_gradients_are_those_of_the_steps(mask, length, monkeypatch):
    sides = [(4, length), (2, 9), (2, 9)]
    arrays = [mx.array(drawn(i, 2, heads, tokens, 5)) for i, (heads, tokens) in enumerate(sides)]
    given_mask, _ = mask_of(mask, 3, 2, 4, 9)
    if mask == "numbers":
        arrays.append(given_mask)

    def loss(q, k, v, bias=given_mask):
        return (ops.grouped_attention(q, k, v, 0.5, bias) ** 3).sum()

    assert_plain_gradients(loss, arrays, monkeypatch, 1e-5)


@here
@given(
    sides=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 70)),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_norms_and_their_gradients(sides, layouts, biased, seed):
    d = sides[-1]
    numbers, g = drawn(seed, *sides), drawn(seed + 1, *sides)
    x, cotangent = map(laid_out, (numbers, g), layouts)
    weight, bias = drawn(seed + 2, d), drawn(seed + 3, d)
    arrays = [mx.array(weight), mx.array(bias)][: 1 + biased]
    wide, by = numbers.astype(np.float64), g * weight.astype(np.float64)
    mean = lambda x: x.mean(-1, keepdims=True)  # noqa: E731
    for centered in (True, False):
        norm = (
            (lambda x, w, b=None: ops.layer_norm(x, w, b, 1e-3)) if centered else lambda x, w: ops.rms_norm(x, w, 1e-3)
        )
        own = arrays if centered else arrays[:1]
        (y,), gradients = mx.vjp(norm, [x, *own], [cotangent])
        middle = wide - mean(wide) if centered else wide
        scale = 1 / np.sqrt(mean(middle**2) + 1e-3)
        normed = middle * scale
        gx = scale * (by - normed * mean(by * normed) - (mean(by) if centered else 0))
        exact = [normed * weight + bias * (len(own) == 2), gx, (g * normed).sum((0, 1, 2)), g.sum((0, 1, 2))]
        for found, value in zip([y, *gradients], exact[: 2 + len(own)], strict=True):
            np.testing.assert_allclose(np.array(found), value, rtol=1e-4, atol=2e-5 * max(1, np.abs(value).max()))


@here
@given(
    tokens=st.integers(1, 20),
    vocab=st.integers(1, 70),
    smoothing=st.sampled_from([0.0, 0.1]),
    softcap=st.sampled_from([None, 3.0]),
    chunk=st.integers(1, 25),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_cross_entropy_in_one_operation_is_that_of_the_steps(tokens, vocab, smoothing, softcap, chunk, seed):
    h, weight = mx.array(drawn(seed, tokens, 6)), mx.array(drawn(seed + 1, vocab, 6))
    y, weights = mx.random.randint(0, vocab, (tokens,)), mx.random.uniform(shape=(tokens,))
    with pytest.MonkeyPatch.context() as patch:
        results = []
        for ours in (True, False):
            patch.setattr(fastmath, "on_linux_cpu", lambda ours=ours: ours)
            how = {"label_smoothing": smoothing, "softcap": softcap, "chunk": chunk}
            mean = lambda h, w, how=how: ops.mean_cross_entropy(h, w, y, weights, **how)  # noqa: E731
            each = lambda h, w, how=how: ops.cross_entropy(h, w, y, **how)  # noqa: E731
            results.append([*mx.vjp(mean, [h, weight], [mx.array(2.0)]), *mx.vjp(each, [h, weight], [weights])])
            mx.eval(results)
    for ours, plain in zip(*results, strict=True):
        for own, value in zip(ours, plain, strict=True):
            np.testing.assert_allclose(np.array(own), np.array(value), rtol=1e-4, atol=1e-5)


@here
def test_logits_that_are_no_numbers_show_in_the_loss_and_its_gradient():
    h, weight, y = mx.array(drawn(0, 4, 6)), mx.array(drawn(1, 20, 6)), mx.array([0, 19, 3, 3])
    for bad in (mx.nan, mx.inf):
        broken = mx.where(mx.arange(4)[:, None] == 2, bad, h)
        losses, (gh, _) = mx.vjp(lambda h, w: ops.cross_entropy(h, w, y), [broken, weight], [mx.ones(4)])
        for found in (losses[0], gh):
            assert np.isnan(np.array(found)[2]).all()
            assert np.isfinite(np.delete(np.array(found), 2, axis=0)).all()
    far = mx.vjp(lambda h, w: ops.cross_entropy(h, w, y), [h * 1e4, weight], [mx.ones(4)])
    assert all(np.isfinite(np.array(one)).all() for part in far for one in part)


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
    def attend_one(q, k, v, mask, scale):
        return v[:, :, :1] * 2

    @staticmethod
    def attend(q, k, v, mask, scale):
        return v[:, :, :2], None


class _Foreign:
    @staticmethod
    def attend_one(*_):
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
