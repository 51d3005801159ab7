"""How a model knows where a token stands: three doors, of which each kind opens what it needs."""

import math
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.config import Config
from mlx_transformer.nn.context import Ctx
from mlx_transformer.utils.errors import BadInput

MAX_DISTANCE = 65_536  # tokens from a query to a key: as many rows as a table over distances may have


class Position(nn.Module):
    """No positions at all: every door shut."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.build(config)

    def build(self, config: Config) -> None:
        """Make what the kind needs; variants extend this."""

    def at_input(self, x: mx.array, ctx: Ctx) -> mx.array:
        """Embeddings (B, L, D) -> (B, L, D)."""
        return x

    def rotate(self, q: mx.array, k: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array]:
        """Queries and keys (B, H, L, head_dim) of one layer, before they meet."""
        return q, k

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array | None:
        """What is added to the scores, broadcast to (B, H, Lq, Lk), or None; the queries stand at ctx.positions."""
        return None


class SinusoidalPosition(Position):
    """Fixed sinusoids added to the embeddings times sqrt(d_model) (Vaswani et al. 2017, sec. 3.4 and 3.5).

    PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos of the same; for any position, and for an odd
    d_model the last cosine falls away.
    """

    def build(self, config: Config) -> None:
        self.base = 10000.0  # the paper's constant, sec. 3.5

    def at_input(self, x: mx.array, ctx: Ctx) -> mx.array:
        return x * math.sqrt(x.shape[-1]) + self.encoding(ctx.positions, x.shape[-1]).astype(x.dtype)

    def encoding(self, positions: mx.array, d_model: int) -> mx.array:
        """positions (...,) int -> (..., d_model) float32."""
        exponent = mx.arange(0, d_model, 2, dtype=mx.float32) / d_model
        angle = positions[..., None].astype(mx.float32) * mx.exp(-math.log(self.base) * exponent)
        both = mx.stack([mx.sin(angle), mx.cos(angle)], axis=-1)
        return both.flatten(-2)[..., :d_model]


class LearnedPosition(Position):
    """A learned vector for each of max_len positions, added to the embeddings (Gehring et al. 2017; GPT-2).

    weight (max_len, d_model). A position behind the last row takes the last row's vector: no such row was ever trained,
    and a model that is evaluated there is to show what that costs rather than to fail.
    """

    def build(self, config: Any) -> None:
        self.weight = mx.zeros((config.max_len, config.d_model))

    def at_input(self, x: mx.array, ctx: Ctx) -> mx.array:
        return x + self.weight[mx.minimum(ctx.positions, self.weight.shape[0] - 1)]


class RotaryPosition(Position):
    """RoPE: pair i of a query or key is turned by the angle position * theta^(-2i / head_dim) (Su et al. 2021, eq. 15).

    arXiv 2104.09864. The pairs are (i, i + head_dim / 2), as in GPT-NeoX and Llama; the paper's are neighbours, which
    is another order of the projections' rows. Angles in float32. Raises BadInput for an odd head_dim or a rope_theta
    not above 0.
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
        """Radians a position, of each pair: (half,) float32."""
        return mx.exp(mx.arange(half) * (-math.log(self.theta) / half))

    def rotate(self, q: mx.array, k: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array]:
        angle = ctx.positions[..., None] * self.frequencies(q.shape[-1] // 2)
        angle = angle if angle.ndim == 2 else angle[:, None]  # the same for every head
        cos, sin = mx.cos(angle), mx.sin(angle)
        return _rotate_pairs(q, cos, sin), _rotate_pairs(k, cos, sin)


class ScaledRotaryPosition(RotaryPosition):
    """RoPE stretched to longer texts, as Llama 3.1 does it (Grattafiori et al. 2024, arXiv 2407.21783; Meta's code).

    Over the rope_original_len positions of the first training a pair turns so many times: fewer than
    rope_low_freq_factor, and its frequency is divided by rope_factor; more than rope_high_freq_factor, and it stays;
    between the two it goes over in a straight line. With rope_factor 1 it is RoPE. Raises BadInput for factors
    not above 0 or not in this order.
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
    """How far behind each query each key stands: positions (.., Lq) and (.., Lk) -> (.., Lq, Lk); 0 for a later key."""
    return mx.maximum(q_pos[..., :, None] - k_pos[..., None, :], 0)


class ALiBi(Position):
    """A penalty of slope * distance on each score (Press et al. 2021, arXiv 2108.12409, sec. 3).

    For n heads, n a power of two, the slopes are 2^(-8 / n), 2^(-16 / n), ...; any other n takes those of the power
    below and fills up with every second one of the power above, as the paper's code and Hugging Face's Bloom do.
    """

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array:
        slopes = mx.array(alibi_slopes(q.shape[1]))[:, None, None]
        return (-slopes * causal_distances(ctx.positions, k_pos)[..., None, :, :]).astype(q.dtype)


def alibi_slopes(n_heads: int) -> list[float]:
    """The slope of each head."""
    power = 2 ** int(math.log2(n_heads))
    exact = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
    return (exact + between)[:n_heads]


class T5Position(Position):
    """A learned number for each head and bucket of distances, added to the scores (Raffel et al. 2019, sec. 2.1).

    arXiv 1910.10683. The first half of the n_buckets are single distances, the others grow by the logarithm up to
    max_distance; weight (n_buckets, n_heads), one for all layers. Differs from T5: scores keep 1 / sqrt(head_dim).
    Raises BadInput as `t5_buckets` does.
    """

    def build(self, config: Any) -> None:
        self.weight = mx.zeros((config.n_buckets, config.n_heads))
        self._buckets = mx.array(t5_buckets(config.n_buckets, config.max_distance))

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array:
        back = mx.minimum(causal_distances(ctx.positions, k_pos), self._buckets.size - 1)
        return mx.moveaxis(self.weight[self._buckets[back]], -1, -3)


def t5_buckets(n_buckets: int, max_distance: int) -> list[int]:
    """The bucket of each distance from 0 to max_distance, where the last one begins at the latest.

    Raises BadInput where max_distance leaves nothing for the buckets that grow.
    """
    single = n_buckets // 2
    if not 1 <= single < max_distance <= MAX_DISTANCE:
        raise BadInput(
            f"n_buckets = {n_buckets}, max_distance = {max_distance}: expected at least 2 buckets, and a distance of "
            f"more than half as many and at most {MAX_DISTANCE:,}"
        )
    growing, span = n_buckets - single, math.log(max_distance / single)
    shares = [math.log(distance / single) / span for distance in range(single, max_distance + 1)]
    wide = [int(share * growing + 1e-9) for share in shares]  # a whole number must not fall below itself by rounding
    return [*range(single), *(single + min(bucket, growing - 1) for bucket in wide)]
