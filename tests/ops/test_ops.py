"""The functions of mlx_transformer.ops against float64: fast and plain form, eager and compiled."""

import math
import re
from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax
from scipy.special import softmax as softmax64

from bench.tools.graph import on_metal
from mlx_transformer import ops
from mlx_transformer.ops import fastmath
from mlx_transformer.utils.errors import BadInput

EPS = 2.0**-24  # half a unit in the last place of a float32 just above 1
few = settings(max_examples=12)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(params=["fast", "plain", "gpu"], autouse=True)
def form(request, monkeypatch):
    """Run every test with the device's own forms, with the plain ones, and with those of a GPU."""
    monkeypatch.setenv("MLX_TRANSFORMER_PLAIN", str(int(request.param == "plain")))
    with on_metal() if request.param == "gpu" else nullcontext():
        yield request.param


@pytest.fixture(params=["eager", "compiled"])
def run(request):
    """Wrapper of a function: none, or mx.compile."""
    return mx.compile if request.param == "compiled" else lambda f: f


def array(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Return normally distributed float64 that float32 represents exactly."""
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return values.astype(np.float32).astype(np.float64)


def vjp(f, primals, cotangent, run=lambda f: f):
    """Return f(*primals) and the gradients of sum(f * cotangent), by MLX in float32."""
    arrays = [mx.array(p.astype(np.float32)) for p in primals]
    n = len(arrays)

    def both(*a):
        outputs, gradients = mx.vjp(f, a[:n], a[n:])
        return [*outputs, *gradients]

    return [np.array(a) for a in run(both)(*arrays, mx.array(cotangent.astype(np.float32)))]


def assert_close(got, expected, tolerance=2e-6):
    """Compare with an absolute tolerance relative to the largest expected number."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1e-30, np.abs(expected).max()))


# --- exponential ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-87.25, 0, width=32), min_size=1, max_size=200))
@few
def test_exp_error_is_within_the_stated_bound(xs):
    x = np.array(xs, np.float32)
    got = np.array(mx.compile(fastmath.exp_nonpositive)(mx.array(x))).astype(np.float64)
    x = x.astype(np.float64)
    assert np.all(np.abs(got / np.exp(x) - 1) <= (4 + 1.5 * np.abs(x)) * EPS)


def test_exp_of_extreme_arguments():
    x = mx.array([0.0, -100.0, -1e30, -math.inf])
    assert fastmath.exp_nonpositive(x).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_exp_is_differentiable_twice():
    f = lambda x: mx.sum(fastmath.exp_nonpositive(x))  # noqa: E731
    second = mx.grad(lambda x: mx.sum(mx.grad(f)(x)))
    assert second(mx.array([-1.0])).item() == pytest.approx(math.exp(-1), rel=1e-6)


@given(seeds, st.floats(1e-3, 30))
@few
def test_tanh(seed, scale):
    x = array(seed, 100, scale=scale)
    np.testing.assert_allclose(np.array(fastmath.tanh(mx.array(x, mx.float32))), np.tanh(x), rtol=0, atol=2e-7)


@pytest.mark.parametrize("n", [1, 7, 16, 48, 96])
def test_row_reductions(n):
    x = mx.array(array(0, 3, 5, n), mx.float32)
    assert mx.allclose(fastmath.row_sum(x), mx.sum(x, axis=-1, keepdims=True), atol=1e-5)
    assert mx.array_equal(fastmath.row_max(x), mx.max(x, axis=-1, keepdims=True))


# --- softmax --------------------------------------------------------------------------------------------------------


def softmax_reference(s, dp):
    p = softmax64(s, axis=-1)
    return p, p * (dp - (p * dp).sum(-1, keepdims=True))


@given(seeds, st.sampled_from([1e-3, 1.0, 30.0, 1e4]), st.sampled_from([5, 16, 32, 80, 3000]), st.sampled_from([1, 3]))
@few
def test_softmax_and_its_gradient(seed, scale, n, queries):
    s, dp = array(seed, 2, queries, n, scale=scale), array(seed + 1, 2, queries, n)
    for got, expected in zip(vjp(ops.softmax, [s], dp), softmax_reference(s, dp), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("additive", [False, True])
def test_softmax_with_a_mask(run, additive):
    s, dp = array(0, 2, 3, 8, 32, scale=100), array(1, 2, 3, 8, 32)
    seen = np.tril(np.ones((8, 32), bool), 3)
    mask = mx.array(np.where(seen, 0, -np.inf).astype(np.float32)) if additive else mx.array(seen)
    got = vjp(lambda s: ops.softmax(s, mask), [s], dp, run)
    for g, expected in zip(got, softmax_reference(np.where(seen, s, -np.inf), dp), strict=True):
        np.testing.assert_allclose(g, expected, rtol=0, atol=2e-6)
        assert np.all(g[..., ~seen] == 0)


def test_an_added_bias_has_a_gradient():
    s, bias, dp = array(0, 4, 8, 16), array(1, 8, 16), array(2, 4, 8, 16)
    _, ds, dbias = vjp(ops.softmax, [s, bias], dp)
    assert_close(ds, softmax_reference(s + bias, dp)[1])
    assert_close(dbias, ds.astype(np.float64).sum(0))


@pytest.mark.parametrize("additive", [False, True])
def test_a_query_without_visible_keys_gives_zeros(run, additive):
    seen = mx.array([[True] * 16, [False] * 16])
    mask = mx.where(seen, 0.0, -mx.inf) if additive else seen
    p, ds = vjp(lambda s: ops.softmax(s, mask), [array(0, 2, 16, scale=1e4)], array(1, 2, 16), run)
    assert np.all(p[1] == 0)
    assert np.all(ds[1] == 0)
    assert p[0].sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("additive", [False, True])
def test_a_single_query_without_visible_keys_gives_zeros(run, additive):
    mask = mx.full((1, 16), -mx.inf) if additive else mx.zeros((1, 16), mx.bool_)
    p, ds = vjp(lambda s: ops.softmax(s, mask), [array(0, 3, 1, 16, scale=1e4)], array(1, 3, 1, 16), run)
    assert np.all(p == 0)
    assert np.all(ds == 0)


@pytest.mark.parametrize("queries", [(), (1,), (200, 1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_softmax_propagates_nan_and_inf(bad, queries):
    s = mx.zeros((2, *queries, 32))
    s[0, ..., 3] = bad
    p = ops.softmax(s)
    assert mx.isnan(p[0]).any().item()
    assert not mx.isnan(p[1]).any().item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_softmax_is_computed_in_float32_and_keeps_the_dtype(dtype):
    s = mx.array(array(0, 4, 512), dtype)
    p = ops.softmax(s)
    assert p.dtype == dtype
    assert mx.array_equal(p, ops.softmax(s.astype(mx.float32)).astype(dtype))


# --- activations ----------------------------------------------------------------------------------------------------


def tanh_input(x):
    """Return twice the argument of the tanh: (1 + tanh(u)) / 2 = expit(2 u)."""
    return math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)


def gelu_tanh_slope(x):
    u = tanh_input(x)
    return expit(u) + x * expit(u) * expit(-u) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x**2)


ACTIVATIONS = {
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0),
    "gelu_tanh": (lambda x: x * expit(tanh_input(x)), gelu_tanh_slope),
    "sigmoid": (expit, lambda x: expit(x) * expit(-x)),
    "silu": (lambda x: x * expit(x), lambda x: expit(x) * (1 + x * (1 - expit(x)))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 5.0, 1e4]))
@few
def test_activation_and_its_gradient(name, seed, scale):
    value, slope = ACTIVATIONS[name]
    x, g = array(seed, 64, scale=scale), array(seed + 1, 64)
    y, dx = vjp(getattr(ops, name), [x], g)
    np.testing.assert_allclose(y, value(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(dx, slope(x) * g, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_keeps_nan_dtype_and_gradient_when_compiled(name, run):
    f = getattr(ops, name)
    assert math.isnan(f(mx.array([math.nan])).item())
    x = mx.array(array(0, 64), mx.bfloat16)
    assert f(x).dtype == mx.grad(lambda x: mx.sum(f(x)))(x).dtype == mx.bfloat16
    x, g = array(1, 8, 64), array(2, 8, 64)
    for a, b in zip(vjp(f, [x], g, run), vjp(f, [x], g), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


# --- norms ----------------------------------------------------------------------------------------------------------


def norm_reference(x, weight, bias, eps, g, centred):
    """Return value and gradients of LayerNorm (centred) or RMSNorm in float64."""
    c = x - x.mean(-1, keepdims=True) if centred else x
    scale = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + eps)
    n, gw = c * scale, g * weight
    dx = scale * (gw - n * (gw * n).mean(-1, keepdims=True) - centred * gw.mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    return n * weight + bias, dx, (g * n).sum(rows), g.sum(rows)


@given(seeds, st.sampled_from([(3, 4), (2, 5, 32), (64, 24)]), st.sampled_from([1e-3, 1.0, 1e4]))
@few
def test_layer_norm_and_its_gradient(seed, shape, scale):
    x, g, weight, bias = array(seed, *shape, scale=scale), array(seed + 1, *shape), *array(seed + 2, 2, shape[-1])
    got = vjp(lambda x, w, b: ops.layer_norm(x, w, b, 1e-5), [x, weight, bias], g)
    for a, b in zip(got, norm_reference(x, weight, bias, 1e-5, g, True), strict=True):
        assert_close(a, b, 2e-5)


@given(seeds, st.sampled_from([(3, 4), (2, 5, 32), (64, 24)]), st.sampled_from([1e-3, 1.0, 1e4]))
@few
def test_rms_norm_and_its_gradient(seed, shape, scale):
    x, g, weight = array(seed, *shape, scale=scale), array(seed + 1, *shape), array(seed + 2, shape[-1])
    y, dx, dweight, _ = norm_reference(x, weight, 0, 1e-5, g, False)
    for a, b in zip(vjp(lambda x, w: ops.rms_norm(x, w, 1e-5), [x, weight], g), (y, dx, dweight), strict=True):
        assert_close(a, b, 2e-5)
    y, dx, *_ = norm_reference(x, np.ones(shape[-1]), 0, 1e-5, g, False)
    for a, b in zip(vjp(lambda x: ops.rms_norm(x, None, 1e-5), [x], g), (y, dx), strict=True):
        assert_close(a, b, 2e-5)


def test_norms_far_from_zero_and_compiled(run):
    x, g, weight, bias = array(0, 6, 48) + 1000, array(1, 6, 48), *array(2, 2, 48)
    x = x.astype(np.float32).astype(np.float64)
    got = vjp(lambda x, w, b: ops.layer_norm(x, w, b, 1e-5), [x, weight, bias], g, run)
    assert_close(got[0], norm_reference(x, weight, bias, 1e-5, g, True)[0], 2e-4)
    plain = ops.layer_norm(mx.array(x, mx.float32), None, None, 1e-5)
    assert_close(np.array(plain), norm_reference(x, 1, 0, 1e-5, g, True)[0], 2e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_norms_keep_the_dtype(dtype):
    x, w = mx.array(array(0, 4, 32), dtype), mx.ones(32, dtype)
    assert ops.layer_norm(x, w, w, 1e-5).dtype == ops.rms_norm(x, w, 1e-5).dtype == dtype


# --- cross-entropy --------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 5.0},
    {"label_smoothing": 0.1, "softcap": 5.0},
]


def loss_reference(h, weight, y, w, label_smoothing=0.0, softcap=None):
    """Return the losses of all tokens, and the gradients of sum(w * losses), in float64."""
    raw = h @ weight.T
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    onehot = np.eye(len(weight))[y]
    target = (1 - label_smoothing) * onehot + label_smoothing / len(weight)
    losses = -(target * log_softmax(logits, axis=-1)).sum(-1)
    d = softmax64(logits, axis=-1) - target
    d = d * w[..., None] * (1 if softcap is None else 1 - np.tanh(raw / softcap) ** 2)
    flat = d.reshape(-1, len(weight))
    return losses, d @ weight, flat.T @ h.reshape(-1, h.shape[-1])


def problem(seed, shape=(3, 7), d=8, v=67, scale=1.0):
    rng = np.random.default_rng(seed)
    return array(seed, *shape, d, scale=scale), array(seed + 1, v, d), rng.integers(0, v, shape)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("v", [67, 96])
@given(seed=seeds, chunk=st.integers(1, 30))
@settings(max_examples=4)
def test_cross_entropy_and_its_gradient(options, v, seed, chunk):
    h, weight, y = problem(seed, v=v)
    w = np.random.default_rng(seed).random(y.shape).astype(np.float32).astype(np.float64)
    losses, *gradients = loss_reference(h, weight, y, w, **options)
    primals = [h, weight]
    targets, options = mx.array(y), dict(options, chunk=chunk)

    def each(h, weight):
        return ops.cross_entropy(h, weight, targets, **options)

    def mean(h, weight):
        return ops.mean_cross_entropy(h, weight, targets, mx.array(w, mx.float32), **options)

    for got, expected in zip(vjp(each, primals, w), [losses, *gradients], strict=False):
        assert_close(got, expected, 5e-6)
    for got, expected in zip(vjp(mean, primals, w.sum()[None][0] * np.ones(())), [None, *gradients], strict=False):
        if expected is None:
            assert got == pytest.approx((losses * w).sum() / w.sum(), rel=5e-6)
        else:
            assert_close(got, expected, 5e-6)


def test_mean_cross_entropy_compiled_in_a_whole_step(run):
    """Loss, gradient and update in one compiled function, as in the trainer."""
    h, weight, y = problem(0, shape=(40,), v=96)
    targets = mx.array(y)

    def step(h, weight):
        loss = lambda h, weight: ops.mean_cross_entropy(h, weight, targets, chunk=16)  # noqa: E731
        value, (dh, dweight) = mx.value_and_grad(loss, (0, 1))(h, weight)
        return value, h - 0.1 * dh, weight - 0.1 * dweight, mx.sqrt(mx.sum(dh * dh) + mx.sum(dweight * dweight))

    got = run(step)(mx.array(h, mx.float32), mx.array(weight, mx.float32))
    losses, dh, dweight = loss_reference(h, weight, y, np.full(40, 1 / 40))
    expected = [losses.mean(), h - 0.1 * dh, weight - 0.1 * dweight, math.sqrt((dh**2).sum() + (dweight**2).sum())]
    for a, b in zip(got, expected, strict=True):
        assert_close(np.array(a), np.array(b), 5e-6)


@given(seeds)
@few
def test_loss_gradient_by_finite_differences(seed):
    h, weight, y = problem(seed, shape=(6,), d=4, v=11)
    f = lambda h: ops.mean_cross_entropy(h, mx.array(weight, mx.float32), mx.array(y), softcap=3.0)  # noqa: E731
    x, direction = mx.array(h, mx.float32), mx.array(array(seed + 9, 6, 4), mx.float32)
    difference = (f(x + 0.01 * direction) - f(x - 0.01 * direction)).item() / 0.02
    assert mx.sum(mx.grad(f)(x) * direction).item() == pytest.approx(difference, abs=3e-3)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_logits_of_ten_thousand(chunk):
    h, weight, y = problem(0, shape=(10,), scale=3e3)
    w = np.full(10, 0.1)
    losses, dh, dweight = loss_reference(h, weight, y, w)
    assert losses.max() > 1e4
    f = lambda h, weight: ops.mean_cross_entropy(h, weight, mx.array(y), chunk=chunk)  # noqa: E731
    loss, *gradients = vjp(f, [h, weight], np.ones(()))
    assert loss == pytest.approx(losses.mean(), rel=1e-6)
    for got, expected in zip(gradients, (dh, dweight), strict=True):
        assert_close(got, expected, 2e-3)  # the logits have an error of 1e4 * 2^-24


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_loss_and_gradient_of_nan_are_nan(softcap):
    h = mx.zeros((4, 8))
    h[2, 0] = math.nan
    f = lambda h: ops.mean_cross_entropy(h, mx.ones((32, 8)), mx.zeros(4, mx.int32), softcap=softcap)  # noqa: E731
    loss, dh = mx.value_and_grad(f)(h)
    assert math.isnan(loss.item())
    assert mx.isnan(dh).any().item()


def test_tokens_of_weight_0_do_not_count():
    h, weight, y = problem(0, shape=(4,))
    h, weight, y = mx.array(h, mx.float32), mx.array(weight, mx.float32), mx.array(y)
    some = ops.mean_cross_entropy(h, weight, y, mx.array([1.0, 0.0, 1.0, 0.0]))
    assert some.item() == pytest.approx(mx.mean(ops.cross_entropy(h, weight, y)[::2]).item(), rel=1e-6)
    assert ops.mean_cross_entropy(h, weight, y, mx.zeros(4)).item() == 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_gradients_have_the_dtype_of_their_parameter(dtype):
    h, weight, y = problem(0, shape=(32,), v=96)
    w = np.full(32, 1 / 32)
    a, b, targets = mx.array(h, dtype), mx.array(weight, dtype), mx.array(y)
    loss, (dh, dweight) = mx.value_and_grad(lambda a, b: ops.mean_cross_entropy(a, b, targets, chunk=8), (0, 1))(a, b)
    assert loss.dtype == mx.float32
    assert dh.dtype == dweight.dtype == dtype
    expected = loss_reference(np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32)), y, w)
    assert_close(np.array(dh.astype(mx.float32)), expected[1], 0.03)
    assert_close(np.array(dweight.astype(mx.float32)), expected[2], 0.03)


@pytest.mark.parametrize("f", [ops.cross_entropy, ops.mean_cross_entropy])
def test_gradients_inside_a_checkpoint(f):
    h, weight, y = problem(0, shape=(6,))
    weight, y = mx.array(weight, mx.float32), mx.array(y)
    loss = lambda h, weight: mx.mean(f(ops.gelu_tanh(ops.softmax(h)), weight, y, chunk=4))  # noqa: E731
    x = mx.array(h, mx.float32)
    for a, b in zip(both_gradients(mx.checkpoint(loss), x, weight), both_gradients(loss, x, weight), strict=True):
        assert_close(np.array(a), np.array(b), 1e-6)


SECOND_ORDER = {
    "cross_entropy": lambda h: mx.mean(ops.cross_entropy(h, mx.sin(mx.arange(28.0)).reshape(7, 4), mx.arange(4))),
    "mean_cross_entropy": lambda h: ops.mean_cross_entropy(h, mx.sin(mx.arange(28.0)).reshape(7, 4), mx.arange(4)),
    "softmax": lambda h: mx.sum(ops.softmax(h) ** 2),
    "gelu_tanh": lambda h: mx.sum(ops.gelu_tanh(h)),
    "sigmoid": lambda h: mx.sum(ops.sigmoid(h)),
    "silu": lambda h: mx.sum(ops.silu(h)),
    "layer_norm": lambda h: mx.sum(ops.layer_norm(h, None, None, 1e-5) ** 3),
}


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order_gradient_is_right_or_an_error(name):
    gradient = mx.grad(SECOND_ORDER[name])
    x, u = mx.array(array(0, 4, 4), mx.float32), mx.array(array(5, 4, 4), mx.float32)
    try:
        second = mx.grad(lambda h: mx.sum(gradient(h) * u))(x)
    except (RuntimeError, ValueError):
        return
    expected = (gradient(x + 0.01 * u) - gradient(x - 0.01 * u)) / 0.02
    assert_close(np.array(second), np.array(expected), 1e-2)


def peak_bytes(f, *arrays):
    mx.eval(arrays)
    mx.eval(f(*arrays))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(f(*arrays))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("loss", [ops.cross_entropy, ops.mean_cross_entropy])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_logits_are_never_all_in_memory(form, run, loss, gradient):
    n, v, d = 4096, 512, 8
    h, weight, y = mx.zeros((n, d)), mx.zeros((v, d)), mx.zeros(n, mx.int32)
    f = lambda h, weight: mx.mean(loss(h, weight, y, chunk=32))  # noqa: E731
    peak = peak_bytes(run(mx.value_and_grad(f, (0, 1)) if gradient else f), h, weight)
    assert (peak < n * v * 4 / 2) == (form != "plain")


def matmuls(tmp_path, *outputs):
    mx.export_to_dot(str(tmp_path / "graph.dot"), *outputs)
    return len(re.findall('"(Matmul|AddMM|CpuCrossEntropy)"', (tmp_path / "graph.dot").read_text()))


def test_the_number_of_products_is_minimal(form, tmp_path):
    if form == "plain":
        pytest.skip("MLX decides in the plain form")
    h, weight, y = mx.zeros((12, 8)), mx.zeros((32, 8)), mx.zeros(12, mx.int32)
    losses = lambda h, weight: mx.mean(ops.cross_entropy(h, weight, y, chunk=4))  # noqa: E731
    means = lambda h, weight: ops.mean_cross_entropy(h, weight, y, chunk=4)  # noqa: E731
    if form == "fast" and fastmath.custom_ops(h):  # one operation with all products
        found = [losses(h, weight)], both_gradients(losses, h, weight), both_gradients(means, h, weight)
        assert [matmuls(tmp_path, *one) for one in found] == [1, 2, 1]
        return
    assert matmuls(tmp_path, losses(h, weight)) == 3  # the logits of 3 chunks
    assert matmuls(tmp_path, *both_gradients(losses, h, weight)) == 3 + 9  # logits again, dh and dweight
    assert matmuls(tmp_path, *both_gradients(means, h, weight)) == 9  # the logits only once


def both_gradients(f, h, weight):
    value, gradients = mx.value_and_grad(f, (0, 1))(h, weight)
    return [value, *gradients]


# --- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_of_zero_is_the_identity():
    x = mx.ones(4)
    assert ops.dropout(x, 0.0) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
def test_dropout_of_no_probability_is_bad_input(p):
    with pytest.raises(BadInput, match="dropout = "):
        ops.dropout(mx.ones(4), p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_a_share_p_independently(p):
    mx.random.seed(1)
    n = 1 << 18
    kept = (np.array(ops.dropout(mx.ones(n), p)) != 0).astype(np.float64)
    sigma = math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) < 5 * sigma / math.sqrt(n)
    z = (kept - kept.mean()) / sigma
    for lag in (1, 2, 3, 128, 1024):  # neighbors in both axes of an array 1024 wide
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n)
    blocks = z.reshape(-1, 1024).sum(-1) / 32
    assert abs(blocks.var() - 1) < 5 * math.sqrt(2 / len(blocks))


def test_two_masks_are_independent():
    mx.random.seed(2)
    n = 1 << 18
    a, b = (np.array(ops.dropout(mx.ones(n), 0.5)) - 1.0 for _ in range(2))
    for shifted in (b, np.roll(b, 1), b[::-1]):
        assert abs((a * shifted).mean()) < 5 / math.sqrt(n)


def test_dropout_keeps_the_mean_and_scales_the_gradient(run):
    step = mx.random.state
    f = lambda x: ops.dropout(x, 0.1)  # noqa: E731
    x, g = mx.ones((64, 64)), mx.array(array(0, 64, 64), mx.float32)

    def both(x, g):
        outputs, gradients = mx.vjp(f, [x], [g])
        return outputs[0], gradients[0]

    both = mx.compile(both, inputs=step, outputs=step) if run is mx.compile else both
    y, dx = both(x, g)
    assert mx.allclose(dx, g * y, rtol=1e-6)  # y is 0 or 1 / (1 - p)
    assert mx.max(y).item() == pytest.approx(1 / 0.9, rel=1e-4)
    assert not mx.array_equal(y, both(x, g)[0])


def test_dropout_follows_the_random_state(run):
    f = lambda x: ops.dropout(x, 0.3)  # noqa: E731
    f = mx.compile(f, inputs=mx.random.state, outputs=mx.random.state) if run is mx.compile else f
    x = mx.ones((3, 37))
    draws = []
    for seed in (7, 7, 8):
        mx.random.seed(seed)
        draws.append([f(x), f(x)])
        mx.eval(draws)
    assert mx.array_equal(draws[0][0], draws[1][0])
    assert mx.array_equal(draws[0][1], draws[1][1])
    assert not mx.array_equal(draws[0][0], draws[0][1])
    assert not mx.array_equal(draws[0][0], draws[2][0])


def test_dropout_in_half_precision_keeps_the_dtype():
    x = mx.ones((8, 8), mx.bfloat16)
    assert ops.dropout(x, 0.5).dtype == mx.grad(lambda x: mx.sum(ops.dropout(x, 0.5)))(x).dtype == mx.bfloat16
