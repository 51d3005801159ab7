"""Attention: project -> condition -> attend -> merge."""

from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops
from mlx_transformer.nn import linear
from mlx_transformer.nn.cache import EMPTY_POSITION, KVCache, LayerCache
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import BiasedLinear
from mlx_transformer.nn.norm import RMSNorm
from mlx_transformer.utils.errors import BadInput


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(head_dim)) v (Vaswani et al. 2017, sec. 3.2, eq. 1).

    x (B, L, D) -> (B, L, D); scores (B, n_heads, L, L), softmax in float32. Causal self-attention, unless the context
    has a memory (B, S, D), which keys and values are then made of, or says that it is not causal. Subclasses override
    one step and call super(), so that they combine: `class Mixer(WindowAttention, QKNorm, FusedAttention): pass`.
    """

    Linear: type[linear.Linear] = BiasedLinear  # slot: with or without bias

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer = layer  # index of the block
        self.build(config)

    def build(self, config: Config) -> None:
        """Make the parts; subclasses extend this."""
        d, width = config.d_model, config.n_heads * config.head_dim
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        self.q_proj = self.Linear(d, width)
        self.k_proj = self.Linear(d, width)
        self.v_proj = self.Linear(d, width)
        self.o_proj = self.Linear(width, d)

    def make_cache(self, batch: int) -> LayerCache:
        """Return an empty cache for decoding `batch` sequences."""
        return KVCache()

    def n_scores(self, length: int) -> int:
        """Return the number of scores, over all heads, of one sequence of `length` tokens."""
        return self.n_heads * length * self.n_keys(length)

    def n_kept(self, length: int, keeps_scores: bool) -> int:
        """Return about how many numbers training keeps of such a sequence; keeps_scores: as `ops.keeps_scores`."""
        return 6 * self.n_heads * self.head_dim * length + 4 * keeps_scores * self.n_scores(length)

    def n_keys(self, length: int) -> int:
        """Return the number of keys that each query of such a sequence has a score with."""
        return length

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        q, k, v = self.project(x, ctx)
        q, k = self.condition(q, k, ctx)
        return self.merge(self.attend(q, k, v, ctx))

    def project(self, x: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array, mx.array]:
        """Return q of x (B, L, D), and k and v of x or of the memory, each (B, heads, its length, head_dim)."""
        y = x if ctx.memory is None else ctx.memory
        return self.split(self.q_proj(x)), self.split(self.k_proj(y)), self.split(self.v_proj(y))

    def split(self, x: mx.array) -> mx.array:
        """Split heads: (B, L, heads * head_dim) -> (B, heads, L, head_dim)."""
        return x.reshape(*x.shape[:2], x.shape[-1] // self.head_dim, self.head_dim).swapaxes(1, 2)

    def condition(self, q: mx.array, k: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array]:
        """Transform queries and keys (B, heads, L, head_dim) before the scores: the model's Position rotates them."""
        return ctx.position.rotate(q, k, ctx)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, ctx: Ctx) -> mx.array:
        """Attend from the queries to this call's and the cached keys: (B, heads, L, head_dim)."""
        k, v, k_pos = self.recall(k, v, ctx)
        return self.mix(q, k, v, self.mask(q, k, k_pos, ctx))

    def merge(self, o: mx.array) -> mx.array:
        """Merge heads and project: (B, heads, L, head_dim) -> (B, L, D)."""
        return self.o_proj(o.swapaxes(1, 2).flatten(2))

    def weights_of(self, x: mx.array, ctx: Ctx) -> mx.array | None:
        """Return the weight of each key in the output of each query, (B, n_heads, L, keys), for people to look at.

        `attend` is linear in the values, so that the rows of the identity as values yield the weights, also where a
        window or a segment has keys of its own. None: there are no such weights. Without a cache; see nn/maps.py.
        """
        q, k, v = self.project(x, ctx)
        q, k = self.condition(q, k, ctx)
        return self.attend(q, k, identity_like(v), ctx)

    def recall(self, k: mx.array, v: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array, mx.array]:
        """Return all keys, values and key positions: the cached ones, if there is a cache, then this call's."""
        positions = ctx.positions if ctx.memory_positions is None else ctx.memory_positions
        if ctx.cache is None:
            return k, v, positions
        return ctx.cache.update(k, v, positions)

    def visible(self, q_pos: mx.array, k_pos: mx.array) -> mx.array | None:
        """Return which keys a query attends to: positions (.., Lq), (.., Lk) -> bool (.., Lq, Lk); None: all."""
        return k_pos[..., None, :] <= q_pos[..., :, None]

    def mask(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array | None:
        """Return the mask of the scores, ([B, heads,] Lq, Lk): bool (True: visible), float (added), or None."""
        visible = self.visible(ctx.positions, k_pos) if ctx.causal else (k_pos < EMPTY_POSITION)[..., None, :]
        if visible is not None and visible.ndim == 3:
            visible = visible[:, None]  # shared by all heads
        if ctx.mask is not None:
            visible = ctx.mask if visible is None else visible & ctx.mask
        bias = self.bias(q, k, k_pos, ctx)
        if bias is None or visible is None:
            return visible if bias is None else bias
        return mx.where(visible, bias, mx.array(-mx.inf, bias.dtype))

    def bias(self, q: mx.array, k: mx.array, k_pos: mx.array, ctx: Ctx) -> mx.array | None:
        """Return the bias added to the scores, broadcast to (B, heads, Lq, Lk), or None: the Position's."""
        return ctx.position.bias(q, k, k_pos, ctx)

    def mix(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
        """Return softmax(q k^T / sqrt(head_dim) + mask) v (eq. 1), (B, heads, Lq, head_dim)."""
        return ops.dense_attention(q, k, v, self.scale, mask)


def identity_like(v: mx.array) -> mx.array:
    """Return the values (B, heads, L, L) that say which of the L keys of v (B, heads, L, d) each one is."""
    return mx.broadcast_to(mx.eye(v.shape[2], dtype=v.dtype), (*v.shape[:3], v.shape[2]))


class GroupedAttention(Attention):
    """Grouped-query attention: n_heads / n_kv_heads query heads share each head of keys and values.

    GQA (Ainslie et al. 2023, arXiv 2305.13245, sec. 2.2); with n_kv_heads = 1 MQA (Shazeer 2019, arXiv 1911.02150).
    k, v (B, n_kv_heads, L, head_dim). Raises BadInput if n_kv_heads does not divide n_heads.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        if config.n_heads % config.n_kv_heads:
            raise BadInput(f"n_kv_heads = {config.n_kv_heads} does not divide n_heads = {config.n_heads}")
        width = config.n_kv_heads * self.head_dim
        self.k_proj = self.Linear(config.d_model, width)
        self.v_proj = self.Linear(config.d_model, width)

    def mix(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
        return ops.grouped_attention(q, k, v, self.scale, mask)


class FusedAttention(GroupedAttention):
    """GroupedAttention in one fused kernel where there is one (FlashAttention: Dao et al. 2022, arXiv 2205.14135).

    Equal to GroupedAttention up to rounding; see `ops.attention` for the devices.
    """

    def mix(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
        return ops.attention(q, k, v, self.scale, mask)


class QKNorm(Attention):
    """Queries and keys of each head are normalized before rotation (Henry et al. 2020, arXiv 2010.04245).

    By RMSNorm with a gain (head_dim,), as in Qwen3 (Yang et al. 2025, arXiv 2505.09388, sec. 2).
    """

    def build(self, config: Any) -> None:
        super().build(config)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

    def condition(self, q: mx.array, k: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array]:
        return super().condition(self.q_norm(q), self.k_norm(k), ctx)


class ValueEmbedding(Attention):
    """Value embeddings: v + E[token], with an embedding of its own in each layer (modded-nanogpt, Jordan et al. 2024).

    E (vocab_size, width of v). Derived from the value residual (Zhou et al. 2024, arXiv 2410.17897, eq. 5), which adds
    the first layer's values.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        self.value_embedding = nn.Embedding(config.vocab_size, self.v_proj.weight.shape[0])

    def project(self, x: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = super().project(x, ctx)
        return q, k, v + self.split(self.value_embedding(ctx.tokens))
