"""Sparse attention: windows, global tokens, blocks with summaries; less than L^2 time and memory."""

from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.cache import EMPTY_POSITION, KVCache, LayerCache, SummaryCache, WindowCache
from mlx_transformer.nn.context import Ctx
from mlx_transformer.utils.errors import BadInput

MAX_WINDOW = 2**20  # tokens
_WIDE = 4096  # tokens; for a wider window than this and seq_len, a cache that grows is cheaper than a full window


class WindowAttention(Attention):
    """Sliding window: a token attends to the last `window` positions, itself included (Mistral 7B: Jiang et al. 2023).

    arXiv 2310.06825, sec. 2. Queries are processed in blocks of one window, each against the keys of its own and the
    previous block: time and memory of L tokens are O(2 window L). Decoding uses a rolling cache of constant size.
    Raises BadInput for a window above MAX_WINDOW.
    """

    n_global = 0  # global tokens at the start of a sequence, for LongformerAttention
    field = "window"  # the hyperparameter that is the window

    def build(self, config: Any) -> None:
        super().build(config)
        self.window, self.seq_len = getattr(config, self.field), config.seq_len
        if self.window > MAX_WINDOW:
            raise BadInput(f"{self.field} = {self.window}: expected at most {MAX_WINDOW:,}, which the cache allocates")

    def make_cache(self, batch: int) -> LayerCache:
        """Return a rolling cache, or one that grows if the window is much wider than the sequences."""
        wide = self.window > max(self.seq_len, _WIDE)
        return KVCache() if wide else WindowCache(self.window, self.n_global)

    def n_keys(self, length: int) -> int:
        return length if length <= self.window else self.n_global + 2 * self.window

    def visible(self, q_pos: mx.array, k_pos: mx.array) -> mx.array:
        q_pos, k_pos = q_pos[..., :, None], k_pos[..., None, :]
        return (k_pos <= q_pos) & ((k_pos > q_pos - self.window) | (k_pos < self.n_global))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, ctx: Ctx) -> mx.array:
        """Attend block by block, with blocks as batch entries. Raises ValueError for a ctx.mask: not implemented."""
        if ctx.mask is not None:
            raise ValueError("window attention does not support ctx.mask")
        batch, _, length, _ = q.shape
        if isinstance(ctx.cache, KVCache) or (ctx.cache is None and length <= self.window):
            return super().attend(q, k, v, ctx)
        size = min(length, self.window)
        cache = WindowCache(self.window, self.n_global) if ctx.cache is None else ctx.cache
        k, v, k_pos = cache.update(k, v, ctx.positions)
        q_pos = mx.broadcast_to(ctx.positions, (batch, length))
        q_ctx = replace(ctx, positions=_as_batch(_blocks(q_pos[:, None, :, None], size, 0))[:, 0, :, 0])
        n_global = k.shape[2] - self.window - length
        k_pos = self._block_keys(k_pos[:, None, :, None], n_global, size, EMPTY_POSITION)[:, 0, :, 0]
        q, k, v = _as_batch(_blocks(q, size, 0)), *(self._block_keys(x, n_global, size, 0) for x in (k, v))
        o = self.mix(q, k, v, self.mask(q, k, k_pos, q_ctx))
        return mx.unflatten(o, 0, (batch, -1)).swapaxes(1, 2).flatten(2, 3)[:, :, :length]

    def _block_keys(self, x: mx.array, n_global: int, size: int, filler: int) -> mx.array:
        """Return the keys of each block, (B * blocks, H, n_global + window + size, d).

        x: (B, H, n_global + window + L, d), keys, values or positions.
        """
        first, rest = mx.split(x, [n_global], axis=2)
        own = _blocks(rest[:, :, self.window :], size, filler)
        count = own.shape[2]  # above 1 only if size == window
        before = _blocks(rest[:, :, : count * self.window], self.window, filler)
        first = mx.broadcast_to(first[:, :, None], (*own.shape[:3], *first.shape[2:]))
        return _as_batch(mx.concatenate([first, before, own], axis=3))


class LongformerAttention(WindowAttention):
    """Sliding window with global tokens, to which all later tokens attend (Beltagy et al. 2020, sec. 3.1).

    arXiv 2004.05150. The first `n_global` tokens of a sequence are global. Differs from the paper: no dilation, and no
    separate projections for global tokens, which attend to nothing more in a causal model. Raises BadInput for n_global
    above seq_len.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        if config.n_global > config.seq_len:
            raise BadInput(f"n_global = {config.n_global}: expected at most seq_len = {config.seq_len}")
        self.n_global = config.n_global


class SparseAttention(WindowAttention):
    """Blocks of `stride` tokens, and summaries of earlier blocks (Sparse Transformer: Child et al. 2019, sec. 4.3).

    arXiv 1904.10509, the fixed pattern: a token attends to the tokens of its own block up to itself, and to the last
    `n_summary` tokens of each earlier block, in one softmax ("merged head", eq. 8). A query has stride + n_summary *
    L / stride keys: with stride ~ sqrt(n_summary * L) time and memory are O(L^1.5). Decoding keeps one block and the
    summaries. Differs from the paper: the same pattern in all heads and layers. Raises BadInput for n_summary above
    stride.
    """

    field = "stride"

    def build(self, config: Any) -> None:
        super().build(config)
        if config.n_summary > config.stride:
            raise BadInput(f"n_summary = {config.n_summary}: expected at most stride = {config.stride}, the block")
        self.n_summary = config.n_summary

    def make_cache(self, batch: int) -> LayerCache:
        """Return a cache of one block and the summaries, or of everything if the block is much wider than the text."""
        cache = super().make_cache(batch)
        return cache if isinstance(cache, KVCache) else SummaryCache(self.window, self.n_summary)

    def n_keys(self, length: int) -> int:
        return length if length <= self.window else self.window + self.n_summary * -(-length // self.window)

    def visible(self, q_pos: mx.array, k_pos: mx.array) -> mx.array:
        q_pos, k_pos = q_pos[..., :, None], k_pos[..., None, :]
        same_block = q_pos // self.window == k_pos // self.window
        return (k_pos <= q_pos) & (same_block | self.is_summary(k_pos))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, ctx: Ctx) -> mx.array:
        """Attend block by block; without a cache, blocks begin at position 0, and no earlier block is copied."""
        batch, _, length, _ = q.shape
        if ctx.mask is not None or ctx.cache is not None or length <= self.window:
            return super().attend(q, k, v, ctx)
        positions = mx.broadcast_to(ctx.positions, (batch, length))[:, None, :, None]
        q_ctx = replace(ctx, positions=_as_batch(_blocks(positions, self.window, 0))[:, 0, :, 0])
        own = _blocks(positions, self.window, EMPTY_POSITION)
        k_pos = self._with_summaries(own, mx.where(self.is_summary(own), EMPTY_POSITION, own))[:, 0, :, 0]
        k, v = (self._with_summaries(own, own) for own in (_blocks(x, self.window, 0) for x in (k, v)))
        q = _as_batch(_blocks(q, self.window, 0))
        o = self.mix(q, k, v, self.mask(q, k, k_pos, q_ctx))
        return mx.unflatten(o, 0, (batch, -1)).swapaxes(1, 2).flatten(2, 3)[:, :, :length]

    def is_summary(self, positions: mx.array) -> mx.array:
        """Return which positions are among the last n_summary of their block."""
        return positions % self.window >= self.window - self.n_summary

    def _with_summaries(self, blocks: mx.array, own: mx.array) -> mx.array:
        """Return the summaries of all blocks, then each block's own tokens: (B * blocks, H, n + stride, d).

        blocks, own: (B, H, blocks, stride, d).
        """
        summaries = blocks[:, :, :, -self.n_summary :].flatten(2, 3)[:, :, None]
        summaries = mx.broadcast_to(summaries, (*own.shape[:3], *summaries.shape[3:]))
        return _as_batch(mx.concatenate([summaries, own], axis=3))


def _blocks(x: mx.array, size: int, filler: int) -> mx.array:
    """(B, H, L, d) -> (B, H, blocks, size, d), padded with `filler`."""
    x = mx.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % size), (0, 0)], constant_values=mx.array(filler, x.dtype))
    return mx.unflatten(x, 2, (-1, size))


def _as_batch(x: mx.array) -> mx.array:
    """(B, H, blocks, size, d) -> (B * blocks, H, size, d)."""
    return x.swapaxes(1, 2).flatten(0, 1)
