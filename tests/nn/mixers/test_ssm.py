"""State space models: all forms of a scan and of a convolution agree, and their gradients are exact."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer import nn, ops
from mlx_transformer.ops import fastmath, scan
from mlx_transformer.utils.errors import BadInput
from phases import phase6
from tests.ladder import TINY, tiny

B, L, E, N = 2, 75, 21, 5  # neither chunks nor channels fill whole lanes
MAMBA, S4D = phase6.BRANCHES["mamba"], phase6.BRANCHES["s4d"]


@pytest.fixture(params=["MLX's operations", "our own"])
def device(request, monkeypatch):
    """Compute with MLX's operations, and with those in C++ where they are available."""
    if request.param == "MLX's operations":
        monkeypatch.setattr(fastmath, "on_linux_cpu", lambda: False)
    elif fastmath.custom_ops() is None:
        pytest.skip("there are none here")


def inputs(length=L):
    """x, dt, a, b, c and the state of a selective scan, in float64."""
    draw = np.random.default_rng(0).standard_normal
    x, dt, a = draw((B, length, E)), np.exp(draw((B, length, E)) - 2), -np.exp(draw((E, N)))
    return [x, dt, a, draw((B, length, N)), draw((B, length, N)), draw((B, E, N))]


def loop(x, dt, a, b, c, h):
    """The recurrence, token by token."""
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        h = np.exp(dt[:, t, :, None] * a) * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        y[:, t] = (h * c[:, t, None]).sum(-1)
    return y, h


def as_mlx(arrays):
    return [mx.array(one.astype(np.float32)) for one in arrays]


@pytest.mark.parametrize("chunk", [1, 16, scan.CHUNK, 100])
def test_in_parallel_in_chunks_and_token_by_token_the_scan_is_the_same(device, chunk):
    given = inputs()
    for got, exact in zip(ops.selective_scan(*as_mlx(given), chunk=chunk), loop(*given), strict=True):
        np.testing.assert_allclose(np.array(got), exact, atol=5e-5)


def test_the_scan_continues_from_its_state(device):
    given = as_mlx(inputs())
    whole, last = ops.selective_scan(*given)
    x, dt, a, b, c, h = given
    parts = []
    for part in (slice(0, 40), slice(40, 41), slice(41, L)):
        y, h = ops.selective_scan(x[:, part], dt[:, part], a, b[:, part], c[:, part], h)
        parts.append(y)
    np.testing.assert_allclose(mx.concatenate(parts, axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(h, last, atol=1e-5)


@pytest.mark.parametrize("chunk", [16, 100])
def test_the_gradient_of_the_scan_is_that_of_finite_differences(device, chunk):
    given, step = inputs(), 1e-5
    draw = np.random.default_rng(1).standard_normal
    weights = draw((B, L, E)), draw((B, E, N))

    def loss(*arrays):
        y, h = loop(*arrays)
        return (y * weights[0]).sum() + (h * weights[1]).sum()

    def ours(*arrays):
        y, h = ops.selective_scan(*arrays, chunk=chunk)
        w, v = as_mlx(weights)
        return (y * w).sum() + (h * v).sum()

    gradients = mx.grad(ours, argnums=list(range(6)))(*as_mlx(given))
    for i, gradient in enumerate(gradients):
        direction = draw(given[i].shape)
        ends = ([*given[:i], given[i] + sign * step * direction, *given[i + 1 :]] for sign in (1, -1))
        exact = (loss(*next(ends)) - loss(*next(ends))) / (2 * step)
        found = (np.array(gradient, np.float64) * direction).sum()
        assert found == pytest.approx(exact, rel=1e-4, abs=1e-3), ["x", "dt", "a", "b", "c", "state"][i]


def test_nan_in_a_step_reaches_the_output(device):
    """So that a run which diverges is seen to diverge."""
    given = inputs()
    given[1][0, 3, 2] = np.nan
    y, _ = ops.selective_scan(*as_mlx(given))
    assert np.isnan(np.array(y))[0, 3:, 2].all()
    assert np.isfinite(np.array(y))[1].all()


@pytest.mark.parametrize("length", [1, 2, 33, 64])
def test_a_linear_scan_is_the_recurrence(length):
    draw = np.random.default_rng(2).standard_normal
    decay, x, h = np.abs(draw((B, length, 3))) / 2, draw((B, length, 3)), draw((B, 3))
    got = np.array(ops.linear_scan(*as_mlx([decay, x, h])))
    for t in range(length):
        h = decay[:, t] * h + x[:, t]
        np.testing.assert_allclose(got[:, t], h, atol=1e-5)


def test_softplus_is_exact(device):
    x = np.concatenate([np.linspace(-90, 90, 2001), [-1e-6, 0, 1e-6]]).astype(np.float32)
    exact = np.logaddexp(x.astype(np.float64), 0)
    np.testing.assert_allclose(np.array(ops.softplus(mx.array(x))), exact, rtol=1e-5, atol=1e-30)
    slope = mx.grad(lambda x: ops.softplus(x).sum())(mx.array(x))
    np.testing.assert_allclose(np.array(slope), 1 / (1 + np.exp(-x.astype(np.float64))), rtol=2e-5, atol=1e-30)


def test_mamba_starts_as_s4d_real_with_small_steps():
    mixer = MAMBA(MAMBA.Config(**TINY)).blocks[0].mixer
    np.testing.assert_allclose(-mx.exp(mixer.a_log), np.broadcast_to(-np.arange(1, 17), (64, 16)), rtol=1e-6)
    dt = np.array(ops.softplus(mixer.dt_bias))
    assert 0.001 <= dt.min() < 0.003
    assert 0.03 < dt.max() <= 0.1001
    assert mixer.dt_rank == 2


# --- S4D --------------------------------------------------------------------------------------------------------------


def kernel_of(mixer, length):
    """The convolution's kernel (D, length) in complex double precision: the paper's eq. 6, with zero-order hold."""
    names = ("dt_log", "a_log", "a_imag", "c_real", "c_imag")
    dt_log, a_log, a_imag, c_real, c_imag = (np.array(mixer[name], np.float64) for name in names)
    a, dt = -np.exp(a_log) + 1j * a_imag, np.exp(dt_log)[:, None]
    c = (c_real + 1j * c_imag) * (np.exp(dt * a) - 1) / a
    return 2 * (c[..., None] * np.exp((dt * a)[..., None] * np.arange(length))).sum(1).real


@pytest.mark.parametrize("chunk", [1, 16, 64, 200])
def test_s4d_as_a_convolution_by_fft_in_chunks_and_as_a_recurrence_is_the_same(chunk):
    mixer, length = tiny(S4D).blocks[0].mixer, 150
    x = np.random.default_rng(0).standard_normal((B, TINY["d_model"], length))
    spectrum = np.fft.rfft(x, 2 * length) * np.fft.rfft(kernel_of(mixer, length), 2 * length)
    exact = np.fft.irfft(spectrum, 2 * length)[..., :length].swapaxes(1, 2)
    got, _ = mixer.convolve(as_mlx([x])[0].swapaxes(1, 2), mixer.initial_state(B), chunk)
    np.testing.assert_allclose(np.array(got), exact, atol=1e-4)


def test_s4d_starts_as_s4d_lin():
    mixer = S4D(S4D.Config(**TINY)).blocks[0].mixer
    np.testing.assert_allclose(mx.exp(mixer.a_log), np.full((32, 32), 0.5), rtol=1e-6)
    np.testing.assert_allclose(mixer.a_imag[5], np.pi * np.arange(32), rtol=1e-6)
    assert 0.5 < float(mx.var(mixer.c_real) + mx.var(mixer.c_imag)) < 1.5
    dt = np.exp(np.array(mixer.dt_log))
    assert 0.001 <= dt.min() < 0.003
    assert 0.03 < dt.max() <= 0.1001


def test_half_of_s4d_s_state_is_conjugates():
    with pytest.raises(BadInput, match="d_state = 7: expected an even number"):
        S4D(S4D.Config(**TINY, d_state=7))


def test_one_layer_in_four_of_the_hybrid_is_attention():
    kind = phase6.BRANCHES["hybrid"]
    mixers = [block.mixer for block in kind(kind.Config(**TINY)).blocks]
    assert [isinstance(mixer, nn.Attention) for mixer in mixers] == [False, True, False, False]
