"""The linear recurrence with decay, S_t = a_t S_(t-1) + k_t v_t^T, o_t = S_t^T q_t, in three equal forms.

Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 16-20), RetNet (Sun et al. 2023, arXiv 2307.08621,
eq. 5-7), Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, eq. 16-17) and mLSTM (Beck et al. 2024, arXiv 2405.04517, eq. 19-21)
are this equation with their own q, k, v and a.

    parallel    O((Lq Lk) d) time: all scores of the sequence, for one chunk
    chunkwise   O(L (C + d) d) time: scores within chunks of C tokens, a state from chunk to chunk (2405.21060, sec. 6)
    recurrent   O(L d^2) time, one token after the other: decoding

Shapes of all: q (..., L, dk), k (..., L, dk), v (..., L, dv), log_decay = log a <= 0 (..., L) or None for a = 1, the
state before the first token (..., dk, dv) float32 or None for 0. The leading axes (batch, heads) broadcast against each
other, so what heads share is computed once: keys of grouped queries, or a decay that no batch changes. All return o
(..., L, dv) in the dtype of v, and the state after the last token in float32, in which everything is computed. Decays
enter only as differences of summed logs, which are at most 0, so that nothing overflows. A normalizer is a column of
ones in v.
"""

import mlx.core as mx

from mlx_transformer.ops import exp_decay

CHUNK = 64  # tokens of a chunk
_BLOCK = 64  # chunks whose states are carried on by one product; beyond it block by block, so that time stays linear

Result = tuple[mx.array, mx.array]  # o and the state after it


def linear_recurrence(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array | None = None,
    state: mx.array | None = None,
    chunk: int = CHUNK,
) -> Result:
    """Return o and the last state by the form that is fastest for the length."""
    if q.shape[-2] == 1:
        return recurrent(q, k, v, log_decay, state)
    if q.shape[-2] <= chunk:
        return parallel(q, k, v, log_decay, state)
    return chunkwise(q, k, v, log_decay, state, chunk)


def n_scores(n_heads: int, length: int) -> int:
    """Return the number of scores of one sequence of `length` tokens, which training keeps."""
    return n_heads * length * min(length, CHUNK)


def recurrent(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array | None = None, state: mx.array | None = None
) -> Result:
    """Return o and the last state, token by token."""
    dtype, (q, k, v) = v.dtype, _float32(q, k, v)
    outputs = []
    for t in range(q.shape[-2]):
        if log_decay is not None and state is not None:
            state = exp_decay(log_decay[..., t, None, None].astype(mx.float32)) * state
        new = k[..., t, :, None] * v[..., t, None, :]
        state = new if state is None else state + new
        outputs.append(q[..., t : t + 1, :] @ state)
    assert state is not None, "no token"
    o = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-2)
    return o.astype(dtype), state


def parallel(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array | None = None, state: mx.array | None = None
) -> Result:
    """Return o and the last state by all pairs of tokens: o_i = sum over j <= i of a_i ... a_(j+1) (q_i k_j) v_j."""
    dtype, (q, k, v) = v.dtype, _float32(q, k, v)
    scores = q @ k.swapaxes(-1, -2)
    if log_decay is None:
        o = mx.where(_causal(q.shape[-2]), scores, 0) @ v
        last = k.swapaxes(-1, -2) @ v
        o, last = (o, last) if state is None else (o + q @ state, last + state)
        return o.astype(dtype), last
    summed = mx.cumsum(log_decay.astype(mx.float32), axis=-1)
    o = (scores * decays(summed)) @ v
    total = summed[..., -1:]
    last = k.swapaxes(-1, -2) @ (exp_decay(total - summed)[..., None] * v)
    if state is not None:
        o = o + exp_decay(summed)[..., None] * (q @ state)
        last = last + exp_decay(total)[..., None] * state
    return o.astype(dtype), last


def chunkwise(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array | None = None,
    state: mx.array | None = None,
    chunk: int = CHUNK,
) -> Result:
    """Return o and the last state by chunks: each in parallel from a state of 0, then what the chunks before it add."""
    dtype, length = v.dtype, q.shape[-2]
    q, k, v = (in_chunks(x, chunk, -2) for x in _float32(q, k, v))
    if log_decay is not None:
        log_decay = in_chunks(log_decay.astype(mx.float32), chunk, -1)
    o, updates = parallel(q, k, v, log_decay)
    summed = None if log_decay is None else mx.cumsum(log_decay, axis=-1)
    starts, last = _carry(updates, None if summed is None else summed[..., -1], state)
    before = q @ starts
    o = o + (before if summed is None else exp_decay(summed)[..., None] * before)
    return o.flatten(-3, -2)[..., :length, :].astype(dtype), last


def _carry(updates: mx.array, log_decay: mx.array | None, state: mx.array | None) -> Result:
    """Return the state before each chunk (..., N, dk, dv) and the one after the last.

    updates (..., N, dk, dv): the state that each chunk alone ends with; log_decay (..., N): of a whole chunk.
    """
    starts = []
    shape = updates.shape[:-3]
    for begin in range(0, updates.shape[-3], _BLOCK):
        block = updates[..., begin : begin + _BLOCK, :, :]
        first = mx.zeros_like(block[..., :1, :, :]) if state is None else state[..., None, :, :]
        first = mx.broadcast_to(first, (*shape, 1, *block.shape[-2:]))
        terms = mx.concatenate([first, block], axis=-3)
        if log_decay is None:
            weights = _causal(terms.shape[-3]).astype(mx.float32)
        else:
            own = log_decay[..., begin : begin + _BLOCK]
            own = mx.concatenate([mx.zeros_like(own[..., :1]), own], axis=-1)
            weights = decays(mx.cumsum(own, axis=-1))
        states = mx.unflatten(weights @ terms.flatten(-2, -1), -1, block.shape[-2:])
        starts.append(states[..., :-1, :, :])
        state = states[..., -1, :, :]
    assert state is not None, "no chunk"
    return (starts[0] if len(starts) == 1 else mx.concatenate(starts, axis=-3)), state


def decays(summed: mx.array) -> mx.array:
    """Return the decay a_i ... a_(j+1) from each token j to each token i, 0 for j > i: (..., L) -> (..., L, L)."""
    steps = summed[..., :, None] - summed[..., None, :]
    return exp_decay(mx.where(_causal(summed.shape[-1]), steps, -mx.inf))  # before exp: no inf in its gradient


def _causal(length: int) -> mx.array:
    """Return which key each query sees, bool (L, L)."""
    at = mx.arange(length)
    return at[:, None] >= at


def in_chunks(x: mx.array, chunk: int, axis: int) -> mx.array:
    """Split an axis, counted from the end, into chunks, padded with 0, which leaves state and decay unchanged."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % chunk)
    return mx.unflatten(mx.pad(x, widths), axis, (-1, chunk))


def _float32(*arrays: mx.array) -> tuple[mx.array, ...]:
    return tuple(x.astype(mx.float32) for x in arrays)
