"""mLSTM: the stabilized recurrence equals the paper's equations, in parallel, in chunks and token by token."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer.nn.mixers import recurrence
from mlx_transformer.nn.mixers.mlstm import stabilized_recurrence

B, H, D, L = 2, 3, 8, 150


def drawn(scale=1.0):
    q, k, v = mx.random.normal((3, B, H, L, D), key=mx.random.key(0))
    log_input = scale * mx.random.normal((B, H, L), key=mx.random.key(1))
    log_forget = -mx.logaddexp(0, -mx.random.normal((B, H, L), key=mx.random.key(2)) - 1)
    return q, k, v, log_input, log_forget


def start():
    return {"sums": mx.zeros((B, H, D, D + 1)), "m": mx.zeros((B, H))}


def by_equation(q, k, v, log_input, log_forget):
    """The paper's equations in float64, without a stabilizer."""
    q, k, v, log_input, log_forget = (np.array(x, np.float64) for x in (q, k, v, log_input, log_forget))
    c, n, outputs = np.zeros((B, H, D, D)), np.zeros((B, H, D)), []
    for t in range(L):
        i, f = np.exp(log_input[:, :, t, None]), np.exp(log_forget[:, :, t, None])
        c = f[..., None] * c + i[..., None] * k[:, :, t, :, None] * v[:, :, t, None]
        n = f * n + i * k[:, :, t]
        size = np.maximum(np.abs((n * q[:, :, t]).sum(-1, keepdims=True)), 1)
        outputs.append((q[:, :, t, None] @ c)[:, :, 0] / size)
    return np.stack(outputs, axis=2)


@pytest.mark.parametrize("scale", [1.0, 6.0])  # input gates up to e^18
@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent"])
def test_every_form_is_the_equation(form, scale, monkeypatch):
    monkeypatch.setattr("mlx_transformer.nn.mixers.mlstm.linear_recurrence", getattr(recurrence, form))
    inputs = drawn(scale)
    found, expected = stabilized_recurrence(*inputs, start())[0], by_equation(*inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_sequence_in_parts_is_the_whole_one():
    inputs, state, parts = drawn(4.0), start(), []
    whole, last = stabilized_recurrence(*inputs, state)
    for part in (slice(0, 7), slice(7, 141), *(slice(i, i + 1) for i in range(141, L))):
        h, state = stabilized_recurrence(*(x[:, :, part] for x in inputs), state)
        parts.append(h)
    np.testing.assert_allclose(mx.concatenate(parts, axis=2), whole, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state["sums"], last["sums"], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(state["m"], last["m"])


def test_input_gates_that_overflow_are_held_by_the_stabilizer():
    q, k, v, log_input, log_forget = drawn()
    h, state = stabilized_recurrence(q, k, v, log_input + 200, log_forget, start())
    assert mx.isfinite(state["sums"]).all()
    unbounded = stabilized_recurrence(q, k, v, log_input + 30, log_forget, start())[0]  # the normalizer exceeds 1
    np.testing.assert_allclose(h, unbounded, rtol=1e-2, atol=1e-3)


def test_the_gradients_do_not_depend_on_the_stabilizer():
    inputs = drawn()

    def gradients(m):
        def total(*inputs):
            held = {"sums": mx.zeros((B, H, D, D + 1)), "m": mx.full((B, H), m)}
            h, _ = stabilized_recurrence(*inputs, held)
            return (h * mx.sin(mx.arange(h.size).reshape(h.shape))).sum()

        return mx.grad(total, argnums=range(5))(*inputs)

    for found, expected in zip(gradients(0.0), gradients(7.0), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
