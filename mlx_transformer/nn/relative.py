"""Attention by distance rather than by position: Shaw et al. 2018 and Transformer-XL."""

from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_transformer import ops
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import Linear
from mlx_transformer.nn.position import MAX_DISTANCE, SinusoidalPosition, causal_distances
from mlx_transformer.utils.errors import BadInput


class ShawAttention(Attention):
    """A learned vector for each distance, added to the keys and to the values (Shaw et al. 2018, eq. 3-4).

    arXiv 1803.02155: e_ij = q_i (k_j + a^K_ij) / sqrt(head_dim), z_i = sum_j p_ij (v_j + a^V_ij), distances cut off at
    max_distance, one table for all heads of a layer. Of the paper's 2 max_distance + 1 rows a causal model sees half.
    It attends by itself, so that it goes with no variant that does (windows, groups). Raises BadInput for a
    max_distance above MAX_DISTANCE.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        if config.max_distance > MAX_DISTANCE:
            raise BadInput(f"max_distance = {config.max_distance}: expected at most {MAX_DISTANCE:,}")
        self.relative_keys = mx.zeros((config.max_distance + 1, self.head_dim))
        self.relative_values = mx.zeros((config.max_distance + 1, self.head_dim))

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array:
        scores = gather_by_distance((q * self.scale) @ self.relative_keys.T, self.distances(k_pos, ctx))
        return plus(scores, super().bias(q, k, k_pos, ctx))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, ctx: Ctx) -> mx.array:
        k, v, k_pos = self.recall(k, v, ctx)
        weights = ops.softmax((q * self.scale) @ k.swapaxes(-1, -2), self.mask(q, k, k_pos, ctx))
        relative = self.relative_values[self.distances(k_pos, ctx)]  # (.., Lq, Lk, head_dim)
        return weights @ v + (weights.swapaxes(1, 2) @ relative).swapaxes(1, 2)

    def distances(self, k_pos: mx.array, ctx: Ctx) -> mx.array:
        """The row of the tables for each query and key (.., Lq, Lk)."""
        return mx.minimum(causal_distances(ctx.positions, k_pos), self.relative_keys.shape[0] - 1)


def gather_by_distance(scores: mx.array, back: mx.array) -> mx.array:
    """Scores of each query for each distance (B, H, Lq, n) -> for each key, whose distance is back (.., Lq, Lk)."""
    back = mx.broadcast_to(back[..., None, :, :], (*scores.shape[:3], back.shape[-1]))
    return mx.take_along_axis(scores, back, axis=-1)


def plus(scores: mx.array, bias: mx.array | None) -> mx.array:
    """The sum of both, as far as there are two."""
    return scores if bias is None else scores + bias


class TransformerXLAttention(Attention):
    """Segments that also read the one before them, by distance (Dai et al. 2019, arXiv 1901.02860, sec. 3.2-3.3).

    The score is (q_i + u) k_j + (q_i + v) r_(i-j), where r_d is a projection of the sinusoid of d; u is content_bias, v
    is position_bias. A token sees its own segment of segment_len positions and the whole one before; what it reads
    there sends no gradient back ("SG" in sec. 3.2). The paper carries segments over from step to step; the rows of a
    shuffled batch have no predecessor, so here the segments are those of a row, and its first one has no memory. Raises
    BadInput for a segment longer than half of MAX_DISTANCE.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        if config.segment_len > MAX_DISTANCE // 2:
            raise BadInput(f"segment_len = {config.segment_len}: expected at most {MAX_DISTANCE // 2:,}")
        self.segment_len = config.segment_len
        self.r_proj = Linear(config.d_model, config.d_model)
        self.content_bias = mx.zeros(config.n_heads * self.head_dim)
        self.position_bias = mx.zeros(config.n_heads * self.head_dim)
        distances = mx.arange(2 * config.segment_len)  # no key that is seen stands further back
        self._sinusoids = SinusoidalPosition(config).encoding(distances, config.d_model)

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        """Segment by segment; with a cache, which trains nothing, `visible` alone draws the line."""
        if ctx.cache is not None:
            return super().__call__(x, ctx)
        q, k, v = self.project(x, ctx)
        _, old_k, old_v = self.project(mx.stop_gradient(x), ctx)
        _, old_k = self.condition(q, old_k, ctx)
        q, k = self.condition(q, k, ctx)
        segments = []
        for start in range(0, x.shape[1], self.segment_len):
            before, own = slice(max(0, start - self.segment_len), start), slice(start, start + self.segment_len)
            seen_k = mx.concatenate([old_k[:, :, before], k[:, :, own]], axis=2)
            seen_v = mx.concatenate([old_v[:, :, before], v[:, :, own]], axis=2)
            here = replace(ctx, positions=ctx.positions[..., own])
            k_pos = ctx.positions[..., before.start : own.stop]
            segments.append(self.mix(q[:, :, own], seen_k, seen_v, self.mask(q[:, :, own], seen_k, k_pos, here)))
        return self.merge(mx.concatenate(segments, axis=2))

    def n_keys(self, length: int) -> int:
        return min(length, 2 * self.segment_len)

    def visible(self, q_pos: mx.array, k_pos: mx.array) -> mx.array:
        near = k_pos[..., None, :] // self.segment_len >= q_pos[..., :, None] // self.segment_len - 1
        return (k_pos[..., None, :] <= q_pos[..., :, None]) & near

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array:
        r = self.split(self.r_proj(self._sinusoids.astype(q.dtype))[None])
        scores = ((q + self.per_head(self.position_bias)) * self.scale) @ r.swapaxes(-1, -2)
        back = mx.minimum(causal_distances(ctx.positions, k_pos), r.shape[2] - 1)
        return plus(gather_by_distance(scores, back), super().bias(q, k, k_pos, ctx))

    def mix(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
        return super().mix(q + self.per_head(self.content_bias), k, v, mask)

    def per_head(self, bias: mx.array) -> mx.array:
        """(heads * head_dim,) -> (heads, 1, head_dim)."""
        return bias.reshape(self.n_heads, 1, self.head_dim)
