"""Attention whose cost grows linearly with length."""

from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.cache import EMPTY_POSITION, KVCache, LayerCache, WindowCache
from mlx_transformer.nn.context import Ctx
from mlx_transformer.utils.errors import BadInput

MAX_WINDOW = 2**20  # tokens of a window
_WIDE = 4096  # slots, beyond which holding them all for a short row costs more than growing


class WindowAttention(Attention):
    """A token sees the last `window` positions, its own among them (Mistral 7B: Jiang et al. 2023, arXiv 2310.06825).

    Queries are taken in blocks of one window: a block sees its own keys and those of the block before, so that time and
    memory of L tokens are O(2 window L), and a decoding step's do not grow: the cache rolls. Raises BadInput for a
    window wider than MAX_WINDOW.
    """

    n_global = 0  # first tokens of a row that all later ones see: a variant's number

    def build(self, config: Any) -> None:
        super().build(config)
        if config.window > MAX_WINDOW:
            raise BadInput(f"window = {config.window}: expected at most {MAX_WINDOW:,}, as the cache has so many slots")
        self.window, self.seq_len = config.window, config.seq_len

    def make_cache(self, batch: int) -> LayerCache:
        """One that rolls; behind a wide window, of which a row fills a part, one that grows with the row."""
        wide = self.window > max(self.seq_len, _WIDE)
        return KVCache() if wide else WindowCache(self.window, self.n_global)

    def n_keys(self, length: int) -> int:
        return length if length <= self.window else self.n_global + 2 * self.window

    def visible(self, q_pos: mx.array, k_pos: mx.array) -> mx.array:
        q_pos, k_pos = q_pos[..., :, None], k_pos[..., None, :]
        return (k_pos <= q_pos) & ((k_pos > q_pos - self.window) | (k_pos < self.n_global))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, ctx: Ctx) -> mx.array:
        """Block by block, each as a row of its own. Raises ValueError where ctx.mask would limit whole rows."""
        if ctx.mask is not None:
            raise ValueError("attention in blocks knows no ctx.mask")
        batch, _, length, _ = q.shape
        if isinstance(ctx.cache, KVCache) or (ctx.cache is None and length <= self.window):
            return super().attend(q, k, v, ctx)
        size = min(length, self.window)
        cache = WindowCache(self.window, self.n_global) if ctx.cache is None else ctx.cache
        k, v, k_pos = cache.update(k, v, ctx.positions)
        q_pos = mx.broadcast_to(ctx.positions, (batch, length))
        here = replace(ctx, positions=_as_rows(_blocks(q_pos[:, None, :, None], size, 0))[:, 0, :, 0])
        k_pos = self._seen(k_pos[:, None, :, None], size, EMPTY_POSITION)[:, 0, :, 0]
        q, k, v = _as_rows(_blocks(q, size, 0)), self._seen(k, size, 0), self._seen(v, size, 0)
        o = self.mix(q, k, v, self.mask(q, k, k_pos, here))
        return mx.unflatten(o, 0, (batch, -1)).swapaxes(1, 2).flatten(2, 3)[:, :, :length]

    def _seen(self, x: mx.array, size: int, filler: int) -> mx.array:
        """Of (B, H, n_global + window + L, d) what each block sees: (B * blocks, H, n_global + window + size, d)."""
        first, rest = mx.split(x, [self.n_global], axis=2)
        own = _blocks(rest[:, :, self.window :], size, filler)
        count = own.shape[2]  # above 1 only where size is the window
        before = _blocks(rest[:, :, : count * self.window], self.window, filler)
        first = mx.broadcast_to(first[:, :, None], (*own.shape[:3], *first.shape[2:]))
        return _as_rows(mx.concatenate([first, before, own], axis=3))


class LongformerAttention(WindowAttention):
    """A window, and a few tokens that all later ones see (Beltagy et al. 2020, arXiv 2004.05150, sec. 3.1).

    Global are the first `n_global` tokens of a row. Differs from the paper: no dilation, and no projections of their
    own for global tokens, which in a causal model see nothing more. Raises BadInput for more of them than a row has.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        if config.n_global > config.seq_len:
            raise BadInput(f"n_global = {config.n_global}: expected at most seq_len = {config.seq_len}, a row's tokens")
        self.n_global = config.n_global


def _blocks(x: mx.array, size: int, filler: int) -> mx.array:
    """(B, H, L, d) -> (B, H, blocks, size, d), the last block filled up."""
    x = mx.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % size), (0, 0)], constant_values=mx.array(filler, x.dtype))
    return mx.unflatten(x, 2, (-1, size))


def _as_rows(x: mx.array) -> mx.array:
    """(B, H, blocks, size, d) -> (B * blocks, H, size, d)."""
    return x.swapaxes(1, 2).flatten(0, 1)
