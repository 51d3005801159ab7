"""Linear recurrences h_t = a_t h_(t-1) + u_t: in parallel, in chunks, or one after the other."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_transformer.ops.fastmath import custom_ops

Arrays = list[mx.array]

CHUNK = 32  # tokens whose states are in memory at once


def linear_scan(decay: mx.array, inputs: mx.array, state: mx.array) -> mx.array:
    """Return h_t = decay_t h_(t-1) + inputs_t for t = 1 ... L, (B, L, ...), where h_0 = state (B, ...).

    In ceil(log2 L) steps over all tokens, after each of which a token has the sum over twice as many inputs as before
    (Hillis & Steele 1986; Blelloch 1990, "Prefix sums and their applications", sec. 1.4.1).
    """
    length = inputs.shape[1]
    first = inputs[:, :1] + decay[:, :1] * state[:, None]
    h = mx.concatenate([first, inputs[:, 1:]], axis=1)
    step = 1
    while step < length:
        later = h[:, step:] + decay[:, step:] * h[:, :-step]
        h = mx.concatenate([h[:, :step], later], axis=1)
        if 2 * step < length:  # the first `step` tokens have all their inputs: their decay counts no more
            decay = mx.concatenate([decay[:, :step], decay[:, step:] * decay[:, :-step]], axis=1)
        step *= 2
    return h


def selective_scan(
    x: mx.array, dt: mx.array, a: mx.array, b: mx.array, c: mx.array, state: mx.array, chunk: int = CHUNK
) -> tuple[mx.array, mx.array]:
    """Return y_t = h_t c_t, (B, L, E), and h_L, where h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t.

    Selective state space model (S6; Gu & Dao 2023, arXiv 2312.00752, alg. 2): x, dt (B, L, E), dt > 0; a (E, N) <= 0;
    b, c (B, L, N); h and state (B, E, N), a product over the axes E and N. All are float32.

    The states of `chunk` tokens are in memory at once; those between chunks are kept, and the gradient computes the
    others again (sec. 3.3.2). On a Linux CPU no state is ever in memory, but for those between chunks.
    """
    y, states = _scan(chunk)(x, dt, a, b, c, state)
    return y, states[-1]


def _scan(chunk: int):
    """Return the scan as a function of (x, dt, a, b, c, state) to y and the states between chunks (K + 1, B, E, N)."""
    function = mx.custom_function(lambda *inputs: _forward(chunk, *inputs))
    function.vjp(lambda primals, cotangents, outputs: _backward(chunk, primals, cotangents, outputs[1]))
    return function


def _forward(chunk: int, x: mx.array, dt: mx.array, a: mx.array, b: mx.array, c: mx.array, state: mx.array) -> Arrays:
    ours = custom_ops(x, dt, a, b, c, state)
    if ours is not None:
        return list(ours.selective_scan(x, dt, a, b, c, state, chunk))
    outputs, states = [], [state]
    for part in _parts(x.shape[1], chunk):
        y, state = _chunk(x[:, part], dt[:, part], a, b[:, part], c[:, part], state)
        outputs.append(y)
        states.append(state)
    return [mx.concatenate(outputs, axis=1), mx.stack(states)]


def _backward(chunk: int, primals: Sequence[mx.array], cotangents: Sequence[mx.array], states: mx.array) -> Arrays:
    x, dt, a, b, c, _ = primals
    dy, dstates = cotangents
    ours = custom_ops(x, dt, a, b, c, dy)
    if ours is not None:
        return list(ours.selective_scan_gradient(x, dt, a, b, c, states, dy, dstates, chunk))
    gradients: list[Arrays] = []  # of x, dt, b, c, chunk by chunk from the last one
    da, dstate = mx.zeros_like(a), dstates[-1]
    for k, part in reversed(list(enumerate(_parts(x.shape[1], chunk)))):
        own = [x[:, part], dt[:, part], a, b[:, part], c[:, part], states[k]]
        own = mx.depends(own, [dstate])  # else MLX would compute the states of all chunks at once
        _, (dx, ddt, da_part, db, dc, dh) = mx.vjp(_chunk, own, [dy[:, part], dstate])
        gradients.insert(0, [dx, ddt, db, dc])
        da, dstate = da + da_part, dh + dstates[k]
    dx, ddt, db, dc = (mx.concatenate(list(each), axis=1) for each in zip(*gradients, strict=True))
    return [dx, ddt, da, db, dc, dstate]


def _chunk(
    x: mx.array, dt: mx.array, a: mx.array, b: mx.array, c: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Return y and the last state of a chunk, whose states are all in memory."""
    h = linear_scan(mx.exp(dt[..., None] * a), (dt * x)[..., None] * b[..., None, :], state)
    return (h @ c[..., None])[..., 0], h[:, -1]


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
