"""State space models: Mamba's, whose step depends on the token, and S4D, a convolution as long as the text."""

import math
from typing import Any, ClassVar

import mlx.core as mx

from mlx_transformer import ops
from mlx_transformer.nn import init
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import Linear
from mlx_transformer.nn.mixers.base import RecurrentMixer
from mlx_transformer.nn.mixers.convolution import ShortConvolution
from mlx_transformer.utils.errors import BadInput

_LEAST_STEP, _LARGEST_STEP = 1e-3, 1e-1  # of the steps dt at the start, drawn log-uniformly
CHUNK = 64  # tokens that S4D convolves at once

State = dict[str, mx.array]


def log_steps(value: mx.array, key: mx.array) -> mx.array:
    """Draw log dt from U(log 0.001, log 0.1)."""
    return mx.random.uniform(math.log(_LEAST_STEP), math.log(_LARGEST_STEP), value.shape, key=key, dtype=value.dtype)


def step_biases(value: mx.array, key: mx.array) -> mx.array:
    """Draw dt as `log_steps` does; return the bias whose softplus it is (Mamba, sec. 3.6)."""
    dt = mx.exp(log_steps(value, key))
    return dt + mx.log(-mx.expm1(-dt))


class Mamba(RecurrentMixer):
    """Selective state space model (S6, the block of Mamba; Gu & Dao 2023, arXiv 2312.00752, alg. 2, fig. 3).

        x, z = in_proj(u), each of E = expand d_model channels;   x = silu(conv(x))
        dt = softplus(dt_proj(r) + dt_bias), b, c, where r, b, c = x_proj(x)
        h_t = exp(dt_t A) h_(t-1) + dt_t x_t b_t;   y_t = c_t h_t + skip x_t        A = -exp(a_log)
        u' = o_proj(y silu(z))

    Decoding keeps h (B, E, d_state) and the last conv_width - 1 inputs of the convolution. A starts as -1 ... -d_state
    in each channel (S4D-Real, sec. 3.6), dt within 0.001 and 0.1. Differs from the paper: a feed-forward part follows
    each mixer, as in Jamba (Lieber et al. 2024, arXiv 2403.19887), and dt_proj starts as any linear map.
    """

    init_rules: ClassVar = {"dt_bias": step_biases}

    def build(self, config: Any) -> None:
        width = config.expand * config.d_model
        self.width, self.d_state, self.dt_rank = width, config.d_state, config.dt_rank
        self.in_proj = Linear(config.d_model, 2 * width)
        self.conv = ShortConvolution(width, config.conv_width)
        self.x_proj = Linear(width, config.dt_rank + 2 * config.d_state)
        self.dt_proj = Linear(config.dt_rank, width)
        self.dt_bias = mx.zeros((width,))
        self.a_log = mx.broadcast_to(mx.log(mx.arange(1, config.d_state + 1)), (width, config.d_state))
        self.skip = mx.ones((width,))
        self.o_proj = Linear(width, config.d_model)

    def initial_state(self, batch: int) -> State:
        return {"h": mx.zeros((batch, self.width, self.d_state)), "tail": self.conv.initial_tail(batch)}

    def n_kept(self, length: int, keeps_scores: bool) -> int:
        between_chunks = 2 * self.d_state * -(-length // ops.SCAN_CHUNK)
        within = 4 * self.d_state * min(length, ops.SCAN_CHUNK) if keeps_scores else 0
        return self.width * (16 * length + between_chunks + within)

    def advance(self, x: mx.array, ctx: Ctx, state: State | None) -> tuple[mx.array, State]:
        held = self.initial_state(x.shape[0]) if state is None else state
        x, z = mx.split(self.in_proj(x), 2, axis=-1)
        x, tail = self.conv(x, held["tail"])
        x = ops.silu(x)
        y, h = self.scan(x, held["h"])
        return self.o_proj(y * ops.silu(z)), {"h": h, "tail": tail}

    def scan(self, x: mx.array, h: mx.array) -> tuple[mx.array, mx.array]:
        """Return y (B, L, E) of x (B, L, E), and the state after it; h: the state before it."""
        r, b, c = mx.split(self.x_proj(x), [self.dt_rank, self.dt_rank + self.d_state], axis=-1)
        dt = ops.softplus((self.dt_proj(r) + self.dt_bias).astype(mx.float32))
        a = -mx.exp(self.a_log.astype(mx.float32))
        y, h = ops.selective_scan(x.astype(mx.float32), dt, a, b.astype(mx.float32), c.astype(mx.float32), h)
        return y.astype(x.dtype) + self.skip * x, h


class S4D(RecurrentMixer):
    """Diagonal state space model, the same for all tokens (S4D; Gu et al. 2022, arXiv 2206.11893, eq. 2-6).

        h_t = exp(dt A) h_(t-1) + x_t;   y_t = 2 Re(C' h_t) + skip x_t;   C' = C (exp(dt A) - 1) / A
        u' = GLU(o_proj(gelu(y)))

    Each of the d_model channels has d_state / 2 complex numbers h, the other half being their conjugates. So y is a
    convolution of x with K_j = 2 Re(C' exp(j dt A)), computed in chunks of CHUNK tokens as a product with a Toeplitz
    matrix, to which the state before the chunk adds its part. Decoding keeps h (B, D, d_state / 2).

    A starts as -1/2 + i pi n (S4D-Lin), dt within 0.001 and 0.1. Differs from the paper: no Fourier transform, whose
    rounding lets every token change those before it. Raises BadInput for an odd d_state.
    """

    init_rules: ClassVar = {
        "dt_log": log_steps,
        "c_real": init.normal(0.5**0.5),
        "c_imag": init.normal(0.5**0.5),
        "skip": init.normal(1.0),
    }

    def build(self, config: Any) -> None:
        if config.d_state % 2:
            raise BadInput(f"d_state = {config.d_state}: expected an even number, of which half are conjugates")
        shape = config.d_model, config.d_state // 2
        self.dt_log = mx.zeros(shape[:1])
        self.a_log = mx.full(shape, math.log(0.5))  # of -Re A
        self.a_imag = mx.broadcast_to(math.pi * mx.arange(shape[1]), shape)
        self.c_real, self.c_imag = mx.zeros(shape), mx.zeros(shape)
        self.skip = mx.zeros(shape[:1])
        self.o_proj = Linear(config.d_model, 2 * config.d_model)

    def initial_state(self, batch: int) -> State:
        return {"real": mx.zeros((batch, *self.a_log.shape)), "imag": mx.zeros((batch, *self.a_log.shape))}

    def n_kept(self, length: int, keeps_scores: bool) -> int:
        return 6 * self.skip.size * length

    def n_shared(self, length: int) -> int:
        return 16 * self.skip.size * min(length, CHUNK) ** 2  # of the Toeplitz matrices and what they are cut from

    def advance(self, x: mx.array, ctx: Ctx, state: State | None) -> tuple[mx.array, State]:
        y, state = self.convolve(x.astype(mx.float32), state or self.initial_state(x.shape[0]))
        y = y.astype(x.dtype) + self.skip * x
        value, gate = mx.split(self.o_proj(ops.gelu_tanh(y)), 2, axis=-1)
        return value * ops.sigmoid(gate), state

    def convolve(self, x: mx.array, state: State, chunk: int = CHUNK) -> tuple[mx.array, State]:
        """Return 2 Re(C' h_t) (B, L, D) of x (B, L, D) float32, and the state after it, chunk by chunk."""
        real, imag = state["real"].swapaxes(0, 1), state["imag"].swapaxes(0, 1)  # (D, B, n)
        n = min(chunk, x.shape[1])
        (p_real, p_imag), (w_real, w_imag) = self.tables(n)  # (D, n, count + 1), exp(q dt A) and 2 C' exp(q dt A)
        kernel = w_real[..., :n].sum(axis=1)
        outputs = []
        for part in mx.split(x.transpose(2, 0, 1), range(n, x.shape[1], n), axis=-1):  # (D, B, q)
            q = part.shape[-1]
            y = part @ _toeplitz(kernel[:, :q])
            outputs.append(y + real @ w_real[..., 1 : q + 1] - imag @ w_imag[..., 1 : q + 1])
            last_real, last_imag = p_real[:, None, :, q], p_imag[:, None, :, q]
            back = slice(q - 1, None, -1)  # the last token has decayed least
            real, imag = (
                real * last_real - imag * last_imag + part @ p_real[..., back].swapaxes(1, 2),
                real * last_imag + imag * last_real + part @ p_imag[..., back].swapaxes(1, 2),
            )
        y = mx.concatenate(outputs, axis=-1).transpose(1, 2, 0)
        return y, {"real": real.swapaxes(0, 1), "imag": imag.swapaxes(0, 1)}

    def tables(self, n: int) -> tuple[tuple[mx.array, mx.array], tuple[mx.array, mx.array]]:
        """Return exp(q dt A) and 2 C' exp(q dt A), q = 0 ... n: real and imaginary parts (D, d_state / 2, n + 1)."""
        dt = mx.exp(self.dt_log.astype(mx.float32))[:, None]
        a_real, a_imag = -mx.exp(self.a_log.astype(mx.float32)), self.a_imag.astype(mx.float32)
        size = mx.exp(dt * a_real)
        step = size * mx.cos(dt * a_imag), size * mx.sin(dt * a_imag)
        c = 2 * self.c_real.astype(mx.float32), 2 * self.c_imag.astype(mx.float32)
        held = _times(c, _times((step[0] - 1, step[1]), (a_real, -a_imag)))  # 1 / A = conj(A) / |A|^2
        norm = a_real * a_real + a_imag * a_imag
        powers = _powers((step[0][..., None], step[1][..., None]), n)
        return powers, _times(((held[0] / norm)[..., None], (held[1] / norm)[..., None]), powers)


Complex = tuple[mx.array, mx.array]


def _times(x: Complex, y: Complex) -> Complex:
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _powers(x: Complex, n: int) -> Complex:
    """Return x^0 ... x^n along the last axis, by doubling: MLX has no vectorized sine on a CPU."""
    real, imag = mx.ones_like(x[0]), mx.zeros_like(x[0])
    while real.shape[-1] <= n:
        later = _times((real, imag), x)
        real, imag = (mx.concatenate([old, new], axis=-1) for old, new in zip((real, imag), later, strict=True))
        x = _times(x, x)
    return real[..., : n + 1], imag[..., : n + 1]


def _toeplitz(kernel: mx.array) -> mx.array:
    """Return T[j, i] = kernel[i - j], 0 for i < j: (D, q) -> (D, q, q), without an index, whose gradient is slow."""
    d, q = kernel.shape
    row = mx.concatenate([kernel, mx.zeros_like(kernel)], axis=-1)
    rows = mx.broadcast_to(row[:, None], (d, q, 2 * q)).reshape(d, -1)  # cut one shorter, each row moves on by one
    return rows[:, : q * (2 * q - 1)].reshape(d, q, 2 * q - 1)[..., :q]
