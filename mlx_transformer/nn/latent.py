"""Multi-head latent attention: a cache of one short vector per token instead of keys and values of every head."""

from typing import Any

import mlx.core as mx

from mlx_transformer import ops
from mlx_transformer.nn.attention import Attention, identity_like
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import Linear
from mlx_transformer.nn.moe import StackedLinear
from mlx_transformer.nn.norm import RMSNorm
from mlx_transformer.utils.errors import BadInput


class LatentAttention(Attention):
    """MLA: keys and values of all heads are linear in a latent c (DeepSeek-V2: arXiv 2405.04434, sec. 2.1).

        c = norm(W_DKV x)              (kv_rank,)        eq. 9; the norm is DeepSeek's code's
        k_h = [W_UK,h c; rope(W_KR x)]                   eq. 10, 15, 17; the rotary part is shared by all heads
        v_h = W_UV,h c                                   eq. 11
        q_h = [W_Q,h x; rope(W_QR,h x)]                  eq. 14, 16
        o_h = softmax(q_h k_h^T / sqrt(head_dim + rope_dim)) v_h

    The cache holds c and the rotary key: kv_rank + rope_dim numbers per token, whatever the number of heads. Decoding
    multiplies W_UK into the query and W_UV into the output (sec. 2.1.2), so that keys and values are never made: it is
    attention with one key head [c; rope(W_KR x)] and the value c. As in DeepSeek-V2-Lite, queries are not compressed.
    Raises BadInput for an odd rope_dim.
    """

    def build(self, config: Any) -> None:
        if config.rope_dim % 2:
            raise BadInput(f"rope_dim = {config.rope_dim}: rotary positions turn pairs, it must be even")
        heads, d = config.n_heads, config.d_model
        self.n_heads, self.head_dim, self.rope_dim = heads, config.head_dim, config.rope_dim
        self.scale = (config.head_dim + config.rope_dim) ** -0.5
        self.q_proj = Linear(d, heads * (config.head_dim + config.rope_dim))
        self.latent_proj = Linear(d, config.kv_rank)
        self.rope_proj = Linear(d, config.rope_dim)
        self.latent_norm = RMSNorm(config.kv_rank, config.norm_eps)
        self.k_up_proj = StackedLinear(heads, config.kv_rank, config.head_dim)
        self.v_up_proj = StackedLinear(heads, config.kv_rank, config.head_dim)
        self.o_proj = Linear(heads * config.head_dim, d)

    def project(self, x: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array, mx.array]:
        """Return q (B, H, L, head_dim + rope_dim), the rotary key (B, 1, L, rope_dim) and c (B, 1, L, kv_rank)."""
        q = self.q_proj(x).reshape(*x.shape[:2], self.n_heads, -1).swapaxes(1, 2)
        return q, self.rope_proj(x)[:, None], self.latent_norm(self.latent_proj(x))[:, None]

    def condition(self, q: mx.array, k: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array]:
        """Rotate the last rope_dim numbers of each query, and the key."""
        plain, rotary = mx.split(q, [self.head_dim], axis=-1)
        rotary, k = ctx.position.rotate(rotary, k, ctx)
        return mx.concatenate([plain, rotary], axis=-1), k

    def attend(self, q: mx.array, k: mx.array, v: mx.array, ctx: Ctx) -> mx.array:
        """Attend from q to rotary keys k and latents v; with a cache, without making keys and values."""
        k, c, k_pos = self.recall(k, v, ctx)
        mask = self.mask(q, k, k_pos, ctx)
        if ctx.cache is None:
            return self.mix(q, self.keys_of(k, c), self.v_up_proj(c, None), mask)
        plain, rotary = mx.split(q, [self.head_dim], axis=-1)
        q = mx.concatenate([plain @ self.k_up_proj.weight, rotary], axis=-1)
        o = ops.grouped_attention(q, mx.concatenate([c, k], axis=-1), c, self.scale, mask)
        return self.v_up_proj(o, None)

    def keys_of(self, k: mx.array, c: mx.array) -> mx.array:
        """Return the keys (B, H, L, head_dim + rope_dim) of rotary keys k (B, 1, L, rope_dim) and latents c."""
        k = mx.broadcast_to(k, (k.shape[0], self.n_heads, *k.shape[2:]))
        return mx.concatenate([self.k_up_proj(c, None), k], axis=-1)

    def weights_of(self, x: mx.array, ctx: Ctx) -> mx.array:
        q, k, c = self.project(x, ctx)
        q, k = self.condition(q, k, ctx)
        keys = self.keys_of(k, c)
        return self.mix(q, keys, identity_like(keys), self.mask(q, k, ctx.positions, ctx))
