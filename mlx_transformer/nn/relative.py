"""Attention with relative positions: Shaw et al. 2018 and Transformer-XL."""

from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_transformer import ops
from mlx_transformer.nn.attention import Attention, identity_like
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import Linear
from mlx_transformer.nn.position import MAX_DISTANCE, SinusoidalPosition, causal_distances
from mlx_transformer.utils.errors import BadInput

Pair = tuple[mx.array, mx.array]


class ShawAttention(Attention):
    """A learned vector per distance, added to keys and to values (Shaw et al. 2018, arXiv 1803.02155, eq. 3-4).

    e_ij = q_i (k_j + a^K_ij) / sqrt(head_dim), z_i = sum_j p_ij (v_j + a^V_ij), distances clipped to max_distance.
    relative_keys, relative_values (max_distance + 1, head_dim), shared by all heads; the paper's rows for later keys
    are not needed. Overrides `attend`: it does not combine with windows or grouped heads. Raises BadInput for a
    max_distance above MAX_DISTANCE.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        if config.max_distance > MAX_DISTANCE:
            raise BadInput(f"max_distance = {config.max_distance}: expected at most {MAX_DISTANCE:,}")
        self.relative_keys = mx.zeros((config.max_distance + 1, self.head_dim))
        self.relative_values = mx.zeros((config.max_distance + 1, self.head_dim))

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array:
        scores = ops.gather_by_distance((q * self.scale) @ self.relative_keys.T, self.distances(k_pos, ctx))
        return add_bias(scores, super().bias(q, k, k_pos, ctx))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, ctx: Ctx) -> mx.array:
        k, v, k_pos = self.recall(k, v, ctx)
        weights = self.softmax(q, k, k_pos, ctx)
        relative = self.relative_values[self.distances(k_pos, ctx)]  # (.., Lq, Lk, head_dim)
        return weights @ v + (weights.swapaxes(1, 2) @ relative).swapaxes(1, 2)

    def softmax(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array:
        """Return the weights p (B, heads, Lq, Lk)."""
        return ops.softmax((q * self.scale) @ k.swapaxes(-1, -2), self.mask(q, k, k_pos, ctx))

    def weights_of(self, x: mx.array, ctx: Ctx) -> mx.array:
        q, k, _ = self.project(x, ctx)
        q, k = self.condition(q, k, ctx)
        return self.softmax(q, k, ctx.positions, ctx)

    def n_kept(self, length: int, keeps_scores: bool) -> int:
        return super().n_kept(length, True)

    def distances(self, k_pos: mx.array, ctx: Ctx) -> mx.array:
        """Return the table row of each query and key, (.., Lq, Lk)."""
        return mx.minimum(causal_distances(ctx.positions, k_pos), self.relative_keys.shape[0] - 1)


def add_bias(scores: mx.array, bias: mx.array | None) -> mx.array:
    """Return scores + bias, or scores if bias is None."""
    return scores if bias is None else scores + bias


class TransformerXLAttention(Attention):
    """Attention to the own and the previous segment, by distance (Dai et al. 2019, arXiv 1901.02860, sec. 3.2-3.3).

    Scores (q_i + u) k_j + (q_i + v) r_(i-j), r_d a projection of the sinusoid of d; u is content_bias, v position_bias,
    each (n_heads * head_dim,). Segments have segment_len positions; no gradient flows into the previous segment (SG in
    sec. 3.2). Differs from the paper, which carries segments over from step to step: sequences of a shuffled batch have
    no predecessor, so segments are parts of one sequence and the first has no memory. Raises BadInput for a
    segment_len above MAX_DISTANCE / 2.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        if config.segment_len > MAX_DISTANCE // 2:
            raise BadInput(f"segment_len = {config.segment_len}: expected at most {MAX_DISTANCE // 2:,}")
        self.segment_len = config.segment_len
        self.r_proj = Linear(config.d_model, config.d_model)
        self.content_bias = mx.zeros(config.n_heads * self.head_dim)
        self.position_bias = mx.zeros(config.n_heads * self.head_dim)
        distances = mx.arange(2 * config.segment_len)  # the largest distance of a visible key, plus 1
        self._sinusoids = SinusoidalPosition(config).encoding(distances, config.d_model)

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        """Attend segment by segment. With a cache there is no gradient to stop, and `visible` limits the keys."""
        if ctx.cache is not None:
            return super().__call__(x, ctx)
        q, k, v = self.project(x, ctx)
        _, old_k, old_v = self.project(mx.stop_gradient(x), ctx)
        _, old_k = self.condition(q, old_k, ctx)
        q, k = self.condition(q, k, ctx)
        return self.merge(self.by_segment(q, (old_k, old_v), (k, v), ctx))

    def weights_of(self, x: mx.array, ctx: Ctx) -> mx.array:
        q, k, v = self.project(x, ctx)
        q, k = self.condition(q, k, ctx)
        v = identity_like(v)
        return self.by_segment(q, (k, v), (k, v), ctx)

    def by_segment(self, q: mx.array, old: Pair, own: Pair, ctx: Ctx) -> mx.array:
        """Attend from q to keys and values, of the previous segment to those in `old`: (B, heads, L, d)."""
        (old_k, old_v), (k, v) = old, own
        segments = []
        for start in range(0, q.shape[2], self.segment_len):
            previous, current = slice(max(0, start - self.segment_len), start), slice(start, start + self.segment_len)
            all_k = mx.concatenate([old_k[:, :, previous], k[:, :, current]], axis=2)
            all_v = mx.concatenate([old_v[:, :, previous], v[:, :, current]], axis=2)
            q_ctx = replace(ctx, positions=ctx.positions[..., current])
            k_pos = ctx.positions[..., previous.start : current.stop]
            mask = self.mask(q[:, :, current], all_k, k_pos, q_ctx)
            segments.append(self.mix(q[:, :, current], all_k, all_v, mask))
        return mx.concatenate(segments, axis=2)

    def n_keys(self, length: int) -> int:
        return min(length, 2 * self.segment_len)

    def n_kept(self, length: int, keeps_scores: bool) -> int:
        return super().n_kept(length, True)  # the bias has the size of the scores

    def visible(self, q_pos: mx.array, k_pos: mx.array) -> mx.array:
        near = k_pos[..., None, :] // self.segment_len >= q_pos[..., :, None] // self.segment_len - 1
        return (k_pos[..., None, :] <= q_pos[..., :, None]) & near

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array:
        r = self.split(self.r_proj(self._sinusoids.astype(q.dtype))[None])
        scores = ((q + self.per_head(self.position_bias)) * self.scale) @ r.swapaxes(-1, -2)
        distances = mx.minimum(causal_distances(ctx.positions, k_pos), r.shape[2] - 1)
        return add_bias(ops.gather_by_distance(scores, distances), super().bias(q, k, k_pos, ctx))

    def mix(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
        return super().mix(q + self.per_head(self.content_bias), k, v, mask)

    def per_head(self, bias: mx.array) -> mx.array:
        """Reshape (heads * head_dim,) to (heads, 1, head_dim)."""
        return bias.reshape(self.n_heads, 1, self.head_dim)
