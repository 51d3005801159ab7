"""Gated DeltaNet: a linear recurrence that overwrites what its keys held before."""

from typing import Any, ClassVar

import mlx.core as mx

from mlx_transformer import ops
from mlx_transformer.nn import init
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import Linear
from mlx_transformer.nn.mixers.base import RecurrentMixer
from mlx_transformer.nn.mixers.convolution import ShortConvolution
from mlx_transformer.nn.mixers.recurrence import decays, in_chunks
from mlx_transformer.nn.mixers.ssm import step_biases
from mlx_transformer.nn.norm import RMSNorm

CHUNK = 32  # tokens of a chunk: the fastest at head widths of 16 and 32 on a CPU
_L2_EPS = 1e-6  # added to the squared norm of queries and keys, as in flash-linear-attention


class GatedDeltaNet(RecurrentMixer):
    """Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464, sec. 3.4, fig. 1).

        q, k, v = silu(conv(q_proj(x), k_proj(x), v_proj(x))), in heads; q, k with norm 1
        a = exp(-exp(a_log) softplus(decay_proj(x) + dt_bias)), b = sigmoid(beta_proj(x)), a number for each head
        S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T;   o_t = S_t^T q_t / sqrt(head_dim)
        y = o_proj(norm(o) silu(g_proj(x))), the norm over each head

    Where b = 1 a key replaces the value that the state held for it, to which a plain recurrence would add. Decoding
    keeps S (B, H, head_dim, head_dim) and the last conv_width - 1 inputs of the convolution. exp(a_log) starts within 1
    and 16, softplus(dt_bias) within 0.001 and 0.1, as in Mamba-2. transformers' Qwen3-Next is the same where it has as
    many heads of values as of keys. Differs from the paper: q, k and v are n_heads * head_dim wide.
    """

    init_rules: ClassVar = {"a_log": init.log_uniform(1.0, 16.0), "dt_bias": step_biases}

    def build(self, config: Any) -> None:
        d, width = config.d_model, config.n_heads * config.head_dim
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.q_proj, self.k_proj, self.v_proj = Linear(d, width), Linear(d, width), Linear(d, width)
        self.g_proj, self.o_proj = Linear(d, width), Linear(width, d)
        self.beta_proj, self.decay_proj = Linear(d, config.n_heads), Linear(d, config.n_heads)
        self.conv = ShortConvolution(3 * width, config.conv_width, bias=False)
        self.a_log, self.dt_bias = mx.zeros((config.n_heads,)), mx.zeros((config.n_heads,))
        self.o_norm = RMSNorm(config.head_dim, config.norm_eps)

    def initial_state(self, batch: int) -> dict[str, mx.array]:
        memory = mx.zeros((batch, self.n_heads, self.head_dim, self.head_dim))
        return {"memory": memory, "tail": self.conv.initial_tail(batch)}

    def n_kept(self, length: int, keeps_scores: bool) -> int:
        chunk = min(length, CHUNK)
        a_token = 20 * self.head_dim + 12 * chunk + 6 * self.head_dim**2 // chunk  # the last: of the states of chunks
        return self.n_heads * length * a_token

    def advance(self, x: mx.array, ctx: Ctx, state: dict[str, mx.array] | None) -> tuple[mx.array, dict[str, mx.array]]:
        held = self.initial_state(x.shape[0]) if state is None else state
        qkv = mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        qkv, tail = self.conv(qkv, held["tail"])
        q, k, v = mx.split(self.split(ops.silu(qkv)).astype(mx.float32), 3, axis=1)
        q, k = _unit(q) * self.head_dim**-0.5, _unit(k)
        log_decay, beta = self.rates(x)
        o, memory = gated_delta_rule(q, k, v, log_decay, beta, held["memory"])
        o = self.o_norm(o.astype(x.dtype)) * ops.silu(self.split(self.g_proj(x)))
        return self.o_proj(o.swapaxes(1, 2).flatten(2)), {"memory": memory, "tail": tail}

    def split(self, x: mx.array) -> mx.array:
        """Split heads: (B, L, heads * head_dim) -> (B, heads, L, head_dim)."""
        return x.reshape(*x.shape[:2], -1, self.head_dim).swapaxes(1, 2)

    def rates(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return log a and b of x (B, L, D), each (B, H, L) float32."""
        dt = (self.decay_proj(x) + self.dt_bias).astype(mx.float32)
        log_decay = -mx.exp(self.a_log.astype(mx.float32)) * ops.softplus(dt)
        beta = ops.sigmoid(self.beta_proj(x).astype(mx.float32))
        return log_decay.swapaxes(1, 2), beta.swapaxes(1, 2)


def _unit(x: mx.array) -> mx.array:
    """Return x / |x| over the last axis."""
    d = x.shape[-1]
    return ops.rms_norm(x, None, _L2_EPS / d) * d**-0.5


def gated_delta_rule(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array, chunk: int = CHUNK
) -> tuple[mx.array, mx.array]:
    """Return o_t = S_t^T q_t (B, H, L, d_v) and S_L: S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T.

    q, k (B, H, L, d_k), k of norm at most 1; v (B, H, L, d_v); log_decay = log a <= 0 and beta = b in [0, 1],
    (B, H, L); state S_0 (B, H, d_k, d_v). Yang et al. 2024, arXiv 2412.06464, eq. 10: in parallel within chunks of
    `chunk` tokens (sec. 3.3; the UT transform of arXiv 2406.06484, eq. 10-11), and by a parallel scan over the chunks.
    """
    length = q.shape[2]
    if length == 1:
        return _step(q, k, v, log_decay, beta, state)
    chunk = min(chunk, length)
    q, k, v, log_decay, beta = (in_chunks(x, chunk, -2) for x in (q, k, v, log_decay[..., None], beta[..., None]))
    total = mx.cumsum(log_decay, axis=-2)  # log of the decay since the chunk began, (B, H, N, C, 1)
    decay = decays(total[..., 0])  # from key to query, (B, H, N, C, C)
    since_start, to_end = ops.exp_decay(total), ops.exp_decay(total[..., -1:, :] - total)

    transposed, written = k.swapaxes(-1, -2), beta * k
    inverse = ops.unit_lower_inverse((written @ transposed) * decay)
    # The values that a chunk writes are u - w S, S the state before it.
    u, w = inverse @ (beta * v), inverse @ (written * since_start)
    keys, kept = (k * to_end).swapaxes(-1, -2), since_start[..., -1:, :]
    first = (slice(None), slice(None), slice(-1))  # all chunks but the last
    before = scan_affine(
        kept[first] * mx.eye(k.shape[-1], dtype=k.dtype) - keys[first] @ w[first], keys[first] @ u[first], state
    )
    values = u - w @ before
    o = (q * since_start) @ before + ((q @ transposed) * decay) @ values
    last = kept[:, :, -1] * before[:, :, -1] + keys[:, :, -1] @ values[:, :, -1]
    return o.flatten(2, 3)[:, :, :length], last


def _step(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the same for one token, (B, H, 1, d_v), in fewer operations."""
    state = mx.exp(log_decay)[..., None] * state
    state = state + k.swapaxes(-1, -2) @ (beta[..., None] * (v - k @ state))
    return q @ state, state


def scan_affine(a: mx.array, b: mx.array, start: mx.array) -> mx.array:
    """Return S_0 ... S_N (B, H, N + 1, d, e) with S_n = a_n S_(n-1) + b_n, S_0 = start (B, H, d, e).

    a (B, H, N, d, d); b (B, H, N, d, e). Pairs of steps are joined to one until a single one is left (Blelloch 1990,
    "Prefix sums and their applications", sec. 1.4): 2 log2(N) products one after the other, of about 3 N in all.
    """
    n = a.shape[2]
    if n == 0:
        return start[:, :, None]
    if n == 1:
        return mx.stack([start, a[:, :, 0] @ start + b[:, :, 0]], axis=2)
    second = a[:, :, 1::2]
    pairs = second.shape[2]
    first_a, first_b = a[:, :, : 2 * pairs : 2], b[:, :, : 2 * pairs : 2]
    even = scan_affine(second @ first_a, second @ first_b + b[:, :, 1::2], start)  # S_0, S_2, ...
    odd = a[:, :, ::2] @ even[:, :, : (n + 1) // 2] + b[:, :, ::2]  # S_1, S_3, ...
    if n % 2:
        return mx.stack([even, odd], axis=3).flatten(2, 3)
    both = mx.stack([even[:, :, :-1], odd], axis=3).flatten(2, 3)
    return mx.concatenate([both, even[:, :, -1:]], axis=2)
