"""Attention against float64: the form of the device, the plain one and that of a GPU, with every kind of mask."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import softmax as softmax64

from bench.tools.graph import on_metal, trace
from bench.tools.kernels import kernels
from mlx_transformer import ops

B, H, LQ, LK, D, SCALE = 2, 4, 5, 7, 8, 0.3
SEEN = np.tril(np.ones((LQ, LK), bool), LK - LQ)
SEEN[2] = False  # a query that sees nothing
draw = np.random.default_rng(0)
BIAS = draw.normal(size=(H, LQ, LK))
MASKS = {
    "none": None,
    "bool": SEEN,
    "bool of a batch": draw.random((B, 1, LQ, LK)) < 0.5,
    "bool of a key": draw.random((B, 1, 1, LK)) < 0.5,
    "bool of heads": draw.random((B, H, LQ, LK)) < 0.5,
    "added": np.where(SEEN, 0, -np.inf),
    "added by heads": np.where(SEEN, BIAS, -np.inf),
    "added by batch and heads": draw.normal(size=(B, H, LQ, LK)),
}


@pytest.fixture(params=["fast", "plain", "gpu"], autouse=True)
def form(request, monkeypatch):
    monkeypatch.setenv("MLX_TRANSFORMER_PLAIN", str(int(request.param == "plain")))
    with on_metal() if request.param == "gpu" else nullcontext():
        yield request.param


def inputs(groups, lq=LQ):
    shapes = [(B, H, lq, D), (B, groups, LK, D), (B, groups, LK, D)]
    return [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(shapes)]


def reference(q, k, v, mask, do):
    """The output and the gradients of q, k, v and an added mask, in float64."""
    per = q.shape[1] // k.shape[1]
    k, v = k.repeat(per, axis=1), v.repeat(per, axis=1)
    mask = np.zeros(1) if mask is None else np.where(mask, 0, -np.inf) if mask.dtype == bool else mask
    scores = SCALE * q @ k.swapaxes(-1, -2) + mask
    sees = np.isfinite(scores).any(-1, keepdims=True)
    p = np.where(sees, softmax64(np.where(sees, scores, 0), axis=-1), 0)
    dp = do @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    together = lambda x: x.reshape(B, -1, per, *x.shape[2:]).sum(2)  # noqa: E731
    axes = tuple(i for i, n in enumerate((1,) * (4 - mask.ndim) + mask.shape) if n == 1)
    dmask = ds.sum(axes, keepdims=True).reshape(mask.shape)
    return p @ v, SCALE * ds @ k, together(SCALE * ds.swapaxes(-1, -2) @ q), together(p.swapaxes(-1, -2) @ do), dmask


def compare(function, groups, mask, dtype=mx.float32, run=lambda f: f, lq=LQ, tolerance=2e-6):
    arrays = [mx.array(x, mx.float32).astype(dtype) for x in inputs(groups, lq)]
    do = mx.random.normal((B, H, lq, D)).astype(dtype)
    exact = [np.array(x.astype(mx.float32)).astype(np.float64) for x in [*arrays, do]]
    added = mask is not None and mask.dtype != bool
    if mask is not None:
        mask = mask[..., :lq, :] if mask.shape[-2] > 1 else mask
        arrays += [mx.array(mask, mx.float32)] if added else []
    constant = None if mask is None or added else mx.array(mask)

    def both(*arrays):
        attend = lambda q, k, v, mask=constant: function(q, k, v, SCALE, mask)  # noqa: E731
        outputs, gradients = mx.vjp(attend, list(arrays), [do])
        return [*outputs, *gradients]

    expected = reference(*exact[:3], mask, exact[3])[: 5 if added else 4]
    for got, value in zip(run(both)(*arrays), expected, strict=True):
        assert got.dtype in (dtype, mx.float32)
        got = np.array(got.astype(mx.float32))
        np.testing.assert_allclose(got, value, rtol=0, atol=tolerance * max(1, np.abs(value).max()))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_grouped_attention_and_its_gradients(groups, mask, compiled):
    compare(ops.grouped_attention, groups, MASKS[mask], run=mx.compile if compiled else lambda f: f)


@pytest.mark.parametrize("mask", MASKS)
def test_dense_attention_and_its_gradients(mask):
    compare(ops.dense_attention, H, MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [4, 2])
def test_attention_of_a_single_query(groups, mask):
    compare(ops.grouped_attention, groups, MASKS[mask], lq=1)
    compare(ops.attention, groups, MASKS[mask], lq=1)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_in_16_bits(mask, dtype):
    compare(ops.dense_attention, H, MASKS[mask], dtype, tolerance=0.05 if dtype == mx.bfloat16 else 0.01)


@pytest.mark.parametrize("function", [ops.dense_attention, ops.grouped_attention, ops.attention])
def test_nan_stays_where_it_is(function):
    q, k, v = (mx.array(x, mx.float32) for x in inputs(H))
    q[0, 1, 3, 0] = mx.nan
    found = mx.isnan(function(q, k, v, SCALE, mx.array(SEEN))).any(-1)
    assert found[0, 1, 3].item()
    assert found.sum().item() == 1


def test_a_gpu_passes_over_the_scores_eleven_times(form):
    """A pass reads or writes B * H * L * L numbers; the small arrays are less than one, and the plain form has 20."""
    q, k, v, do = (mx.zeros((2, 4, 512, 8)) for _ in range(4))
    causal = mx.arange(512)[:, None] >= mx.arange(512)

    def step(q, k, v):
        return [*mx.value_and_grad(lambda qkv: (ops.dense_attention(*qkv, SCALE, causal) * do).sum())([q, k, v])[1]]

    with on_metal():
        passes = sum(kernel.nbytes for kernel in kernels(trace(step, q, k, v))) / (2 * 4 * 512 * 512 * 4)
    assert (passes < 12) == (form != "plain")
