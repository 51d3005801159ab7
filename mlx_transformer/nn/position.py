"""Position encodings: hooks at the input, on queries and keys, and on the scores."""

import math
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.config import Config
from mlx_transformer.nn.context import Ctx
from mlx_transformer.utils.errors import BadInput

MAX_DISTANCE = 65_536  # largest number of rows of a table indexed by the distance from query to key


class Position(nn.Module):
    """No position encoding; subclasses override the hooks that they need."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.build(config)

    def build(self, config: Config) -> None:
        """Make the parameters; subclasses override this."""

    def at_input(self, x: mx.array, ctx: Ctx) -> mx.array:
        """Return the embeddings x (B, L, D) with positions added."""
        return x

    def rotate(self, q: mx.array, k: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array]:
        """Return queries and keys (B, H, L, head_dim) with positions encoded; called in every layer."""
        return q, k

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array | None:
        """Return the bias added to the scores, broadcast to (B, H, Lq, Lk), or None.

        Query positions are ctx.positions ([B,] Lq), key positions k_pos ([B,] Lk). Called in every layer.
        """
        return None


class SinusoidalPosition(Position):
    """Fixed sinusoids added to the embeddings times sqrt(d_model) (Vaswani et al. 2017, sec. 3.4 and 3.5).

    PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos of the same; an odd d_model has no last cosine.
    """

    def build(self, config: Config) -> None:
        self.base = 10000.0  # sec. 3.5

    def at_input(self, x: mx.array, ctx: Ctx) -> mx.array:
        return x * math.sqrt(x.shape[-1]) + self.encoding(ctx.positions, x.shape[-1]).astype(x.dtype)

    def encoding(self, positions: mx.array, d_model: int) -> mx.array:
        """Return the sinusoids (..., d_model) float32 of positions (...) int."""
        exponent = mx.arange(0, d_model, 2, dtype=mx.float32) / d_model
        angle = positions[..., None].astype(mx.float32) * mx.exp(-math.log(self.base) * exponent)
        both = mx.stack([mx.sin(angle), mx.cos(angle)], axis=-1)
        return both.flatten(-2)[..., :d_model]


class LearnedPosition(Position):
    """A learned vector for each of max_len positions, added to the embeddings (Gehring et al. 2017; GPT-2).

    weight (max_len, d_model). Positions from max_len on use the last row, so that evaluation past the training length
    measures the loss there instead of failing.
    """

    def build(self, config: Any) -> None:
        self.weight = mx.zeros((config.max_len, config.d_model))

    def at_input(self, x: mx.array, ctx: Ctx) -> mx.array:
        return x + self.weight[mx.minimum(ctx.positions, self.weight.shape[0] - 1)]


class RotaryPosition(Position):
    """RoPE: pair i of each query and key is rotated by position * rope_theta^(-2i / head_dim) (Su et al. 2021, eq. 15).

    arXiv 2104.09864. Pairs are (i, i + head_dim / 2), as in GPT-NeoX and Llama; the paper pairs neighbors, which is a
    permutation of the projections' outputs. Angles in float32. Raises BadInput for an odd head_dim or a rope_theta not
    above 0.
    """

    def build(self, config: Any) -> None:
        if config.head_dim % 2:
            raise BadInput(
                f"head_dim = {config.head_dim}, of {config.n_heads} heads: rotary positions turn pairs, it must be even"
            )
        if not config.rope_theta > 0:
            raise BadInput(f"rope_theta = {config.rope_theta}: expected a number above 0")
        self.theta = config.rope_theta

    def frequencies(self, half: int) -> mx.array:
        """Return the rotation of each pair in radians per position, (half,) float32."""
        return mx.exp(mx.arange(half) * (-math.log(self.theta) / half))

    def rotate(self, q: mx.array, k: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array]:
        angle = ctx.positions[..., None] * self.frequencies(q.shape[-1] // 2)
        angle = angle if angle.ndim == 2 else angle[:, None]  # shared by all heads
        cos, sin = mx.cos(angle), mx.sin(angle)
        return _rotate_pairs(q, cos, sin), _rotate_pairs(k, cos, sin)


class ScaledRotaryPosition(RotaryPosition):
    """RoPE stretched to longer texts, as Llama 3.1 does it (Grattafiori et al. 2024, arXiv 2407.21783; Meta's code).

    By the number of rotations of a pair over the rope_original_len positions of the first training: below
    rope_low_freq_factor its frequency is divided by rope_factor, above rope_high_freq_factor it is unchanged, and
    between the two it is interpolated linearly. With rope_factor 1 it is RoPE. Raises BadInput for factors not above 0
    or not in this order.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        if not (config.rope_factor > 0 and 0 < low < high):
            raise BadInput(
                f"rope_factor = {config.rope_factor}, rope_low_freq_factor = {low}, rope_high_freq_factor = {high}: "
                "expected numbers above 0, and high above low"
            )
        self.factor, self.original_len, self.low, self.high = config.rope_factor, config.rope_original_len, low, high

    def frequencies(self, half: int) -> mx.array:
        plain = super().frequencies(half)
        turns = plain * (self.original_len / math.tau)
        kept = mx.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return plain * (kept + (1 - kept) / self.factor)


def _rotate_pairs(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_distances(q_pos: mx.array, k_pos: mx.array) -> mx.array:
    """Return max(q_pos - k_pos, 0) for positions (.., Lq) and (.., Lk): (.., Lq, Lk)."""
    return mx.maximum(q_pos[..., :, None] - k_pos[..., None, :], 0)


class ALiBi(Position):
    """Each score is lowered by slope * distance (Press et al. 2021, arXiv 2108.12409, sec. 3).

    For n heads, n a power of two, the slopes are 2^(-8 / n), 2^(-16 / n), ..., 2^-8; any other n uses those of the next
    lower power of two, then every second one of the next higher, as the paper's code and Hugging Face's Bloom do.
    """

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array:
        slopes = mx.array(alibi_slopes(q.shape[1]))[:, None, None]
        return (-slopes * causal_distances(ctx.positions, k_pos)[..., None, :, :]).astype(q.dtype)


def alibi_slopes(n_heads: int) -> list[float]:
    """Return the slope of each head."""
    power = 2 ** int(math.log2(n_heads))
    exact = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
    return (exact + between)[:n_heads]


class T5Position(Position):
    """A learned bias per head and bucket of distances, added to the scores (Raffel et al. 2019, sec. 2.1).

    arXiv 1910.10683. The first half of the n_buckets are single distances, the widths of the others grow
    logarithmically up to max_distance; weight (n_buckets, n_heads), shared by all layers. Differs from T5: scores are
    scaled by 1 / sqrt(head_dim). Raises BadInput as `t5_buckets` does.
    """

    def build(self, config: Any) -> None:
        self.weight = mx.zeros((config.n_buckets, config.n_heads))
        self._buckets = mx.array(t5_buckets(config.n_buckets, config.max_distance))

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array:
        back = mx.minimum(causal_distances(ctx.positions, k_pos), self._buckets.size - 1)
        return mx.moveaxis(self.weight[self._buckets[back]], -1, -3)


def t5_buckets(n_buckets: int, max_distance: int) -> list[int]:
    """Return the bucket of each distance from 0 to max_distance.

    Raises BadInput if max_distance is too small for the logarithmic buckets, or above MAX_DISTANCE.
    """
    single = n_buckets // 2
    if not 1 <= single < max_distance <= MAX_DISTANCE:
        raise BadInput(
            f"n_buckets = {n_buckets}, max_distance = {max_distance}: expected at least 2 buckets, and a distance of "
            f"more than half as many and at most {MAX_DISTANCE:,}"
        )
    growing, span = n_buckets - single, math.log(max_distance / single)
    shares = [math.log(distance / single) / span for distance in range(single, max_distance + 1)]
    wide = [int(share * growing + 1e-9) for share in shares]  # 1e-9: rounding must not lower an integer
    return [*range(single), *(single + min(bucket, growing - 1) for bucket in wide)]
