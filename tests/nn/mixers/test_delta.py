"""The gated delta rule: in chunks, token by token and as the equation, with equal gradients."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer import ops
from mlx_transformer.nn.mixers.delta import gated_delta_rule, scan_affine
from mlx_transformer.nn.mixers.recurrence import linear_recurrence

B, H, DK, DV = 2, 3, 8, 5


def drawn(length, hard=False):
    """Inputs of the rule; hard: nearly equal keys, b = 1 and hardly a decay."""
    q, k = mx.random.normal((2, B, H, length, DK), key=mx.random.key(length))
    if hard:
        k = 1 + 0.01 * k
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    v = mx.random.normal((B, H, length, DV), key=mx.random.key(1))
    log_decay = -mx.random.uniform(0, 1e-3 if hard else 1, (B, H, length), key=mx.random.key(2))
    beta = mx.ones((B, H, length)) if hard else mx.random.uniform(shape=(B, H, length), key=mx.random.key(3))
    return q, k, v, log_decay, beta, mx.random.normal((B, H, DK, DV), key=mx.random.key(4))


def by_equation(q, k, v, log_decay, beta, state):
    """S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T in float64."""
    q, k, v, log_decay, beta, state = (np.array(x, np.float64) for x in (q, k, v, log_decay, beta, state))
    outputs = []
    for t in range(q.shape[2]):
        kt, bt, at = k[:, :, t], beta[:, :, t, None, None], np.exp(log_decay[:, :, t, None, None])
        kept = np.eye(DK) - bt * kt[..., :, None] * kt[..., None, :]
        state = at * kept @ state + bt * kt[..., :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, None] @ state)[:, :, 0])
    return np.stack(outputs, axis=2), state


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 150])
def test_chunks_of_any_length_are_the_equation(length, hard):
    inputs = drawn(length, hard)
    expected = by_equation(*inputs)
    for chunk in (1, 5, 32, 64):
        for found, right in zip(gated_delta_rule(*inputs, chunk), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)


def test_a_sequence_in_parts_is_the_whole_one():
    *inputs, state = drawn(50)
    whole, last = gated_delta_rule(*inputs, state)
    parts = []
    for part in (slice(0, 7), slice(7, 41), *(slice(i, i + 1) for i in range(41, 50))):
        o, state = gated_delta_rule(*(x[:, :, part] for x in inputs), state)
        parts.append(o)
    np.testing.assert_allclose(mx.concatenate(parts, axis=2), whole, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_the_gradients_of_chunks_are_those_of_single_tokens():
    inputs = drawn(23)

    def gradients(chunk):
        def total(*inputs):
            o, state = gated_delta_rule(*inputs, chunk)
            return (o * mx.sin(mx.arange(o.size).reshape(o.shape))).sum() + state.square().sum()

        return mx.grad(total, argnums=range(6))(*inputs)

    for found, expected in zip(gradients(8), gradients(1), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_orthogonal_keys_make_it_the_plain_recurrence():
    q, _, v, log_decay, beta, state = drawn(DK)
    k = mx.broadcast_to(mx.eye(DK), q.shape)  # every key once
    o, _ = gated_delta_rule(q, k, v, log_decay, beta, 0 * state)
    plain, _ = linear_recurrence(q, beta[..., None] * k, v, log_decay)
    np.testing.assert_allclose(o, plain, atol=1e-5)
    again = mx.broadcast_to(k[:, :, :1], k.shape)  # one key all the time: replaced, not added
    apart = mx.abs(gated_delta_rule(q, again, v, log_decay, beta, 0 * state)[0] - linear_recurrence(
        q, beta[..., None] * again, v, log_decay)[0])  # fmt: skip
    assert apart.max() > 0.1


@pytest.mark.parametrize("n", [0, 1, 2, 3, 6, 7, 8])
def test_the_scan_is_the_loop(n):
    a, b = mx.random.normal((1, 2, n, 3, 3)), mx.random.normal((1, 2, n, 3, 4))
    states = [mx.random.normal((1, 2, 3, 4))]
    for i in range(n):
        states.append(a[:, :, i] @ states[-1] + b[:, :, i])
    np.testing.assert_allclose(scan_affine(a, b, states[0]), mx.stack(states, axis=2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 64])
def test_the_triangular_inverse_is_exact_also_where_the_series_overflows(n):
    for a in (mx.random.normal((2, n, n)) * n**-0.5, mx.ones((2, n, n))):
        expected = np.linalg.inv(np.eye(n) + np.tril(np.array(a, np.float64), -1))
        np.testing.assert_allclose(ops.unit_lower_inverse(a), expected, atol=1e-4 * np.abs(expected).max())
    weights, a = mx.random.normal((n, n)), mx.random.normal((n, n)) * n**-0.5
    found = mx.grad(lambda a: (weights * ops.unit_lower_inverse(a)).sum())(a)
    x = np.linalg.inv(np.eye(n) + np.tril(np.array(a, np.float64), -1))
    np.testing.assert_allclose(found, np.tril(-x.T @ np.array(weights) @ x.T, -1), rtol=1e-3, atol=1e-3)
