"""The linear recurrence: parallel = chunkwise = recurrent, and a plain loop in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer.nn.mixers import chunkwise, linear_recurrence, parallel, recurrent

LENGTH, WIDE = 77, 5000  # beyond one chunk; beyond 64 chunks


def drawn(length, shared=False, decays=True, strong=1.0):
    """q, k, v, log decay and state of 2 sequences, 3 heads; shared: as Mamba-2, q and k of all heads at once."""
    keys = mx.random.split(mx.random.key(0), 5)
    heads = 1 if shared else 3
    q, k = (mx.random.normal((2, heads, length, 4), key=key) for key in keys[:2])
    v = mx.random.normal((2, 3, length, 5), key=keys[2])
    log_decay = -strong * mx.random.uniform(0, 1, (2, 3, length), key=keys[3]) ** 2 if decays else None
    return q, k, v, log_decay, mx.random.normal((2, 3, 4, 5), key=keys[4])


def loop(q, k, v, log_decay, state):
    """The equation, one token after the other, in float64."""
    q, k, v, held = (np.array(x, np.float64) for x in (q, k, v, state))
    a = np.ones(v.shape[:3]) if log_decay is None else np.exp(np.array(log_decay, np.float64))
    outputs = []
    for t in range(v.shape[2]):
        held = a[..., t, None, None] * held + k[..., t, :, None] * v[..., t, None, :]
        outputs.append((q[..., t, None, :] @ held)[..., 0, :])
    return np.stack(outputs, -2), held


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("decays", [False, True])
def test_the_three_forms_equal_a_plain_loop(decays, shared):
    arrays = drawn(LENGTH, shared, decays)
    o, state = loop(*arrays)
    for form in (parallel, recurrent, lambda *args: chunkwise(*args, 16), linear_recurrence):
        found = form(*arrays)
        np.testing.assert_allclose(found[0], o, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(found[1], state, atol=1e-4, rtol=1e-4)
        assert found[1].dtype == mx.float32


def test_a_sequence_in_parts_equals_the_whole_one_also_beyond_many_chunks():
    q, k, v, log_decay, _ = drawn(WIDE, strong=0.1)
    o, last = linear_recurrence(q, k, v, log_decay)
    state, parts = None, []
    for begin, end in ((0, 1), (1, 2), (2, 40), (40, 3000), (3000, WIDE)):
        own = (x[:, :, begin:end] for x in (q, k, v, log_decay))
        part, state = linear_recurrence(*own, state)
        parts.append(part)
    np.testing.assert_allclose(mx.concatenate(parts, axis=2), o, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(state, last, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(o, loop(q, k, v, log_decay, mx.zeros((2, 3, 4, 5)))[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strong", [0.0, 1.0, 300.0])
def test_gradients_are_those_of_the_plain_recurrence_and_finite_for_strong_decays(strong):
    arrays = drawn(40, strong=strong)

    def loss(form):
        return lambda *args: sum((x * mx.sin(mx.arange(x.size)).reshape(x.shape)).sum() for x in form(*args))

    expected = mx.grad(loss(recurrent), argnums=range(5))(*arrays)
    for form in (parallel, lambda *args: chunkwise(*args, 16)):
        for found, wanted in zip(mx.grad(loss(form), argnums=range(5))(*arrays), expected, strict=True):
            assert mx.isfinite(found).all()
            np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_dtype_of_the_values_is_kept_and_the_state_is_float32():
    q, k, v, log_decay, _ = (x.astype(mx.bfloat16) for x in drawn(LENGTH))
    for form in (parallel, recurrent, chunkwise):
        o, state = form(q, k, v, log_decay)
        assert (o.dtype, state.dtype) == (mx.bfloat16, mx.float32)
