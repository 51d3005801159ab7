"""Mixture of Depths: blocks that compute some of the tokens, and pass the others on as they are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.block import Block
from mlx_transformer.nn.cache import EMPTY_POSITION, KVCache
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import Linear
from mlx_transformer.utils.errors import BadInput


class MixtureOfDepths(Block):
    """Block of the tokens that a router chooses: x + g (block(x) - x) for those, x for the others (B, L, D).

    Raposo et al. 2024, arXiv 2404.02258, sec. 3. r = w x, a number for each token. Training computes the depth_capacity
    * L tokens with the largest r of each sequence, which depends on later tokens. Evaluation and decoding compute those
    with r >= 0, a choice that each token makes alone (sec. 3.5, the first method): an auxiliary loss, the binary
    cross-entropy of r as the logit of the choice, centers r there. Keys of other tokens are hidden from all.

    Differs from the paper: g = 2 sigmoid(r), not r, which is 1 where the router is 0. Evaluation computes every token
    and keeps what was chosen: its cost is that of the block itself. To be combined with a block, as its first base
    class. Raises BadInput for a mixer that is not attention with a KVCache, since only there a token can be hidden, and
    for a depth_capacity that is not in (0, 1].
    """

    def __init__(self, config: Any, mixer: nn.Module, ffn: nn.Module, make_norm: Callable[[], nn.Module]) -> None:
        super().__init__(config, mixer, ffn, make_norm)
        if not isinstance(mixer, Attention) or not isinstance(mixer.make_cache(1), KVCache):
            raise BadInput(
                f"{type(mixer).__name__} cannot hide the tokens that a Mixture of Depths leaves out: choose a Mixer "
                "that is attention over all tokens"
            )
        if not 0 < config.depth_capacity <= 1:
            raise BadInput(f"depth_capacity = {config.depth_capacity}: expected a number above 0, up to 1")
        self.capacity, self.router_weight = config.depth_capacity, config.depth_router_weight
        self.router_proj = Linear(config.d_model, 1)

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        scores = self.router_proj(x.astype(mx.float32))[..., 0]
        gates = (2 * ops.sigmoid(scores)).astype(x.dtype)[..., None]
        if not self.training:
            chosen = scores >= 0
            positions = mx.where(chosen, ctx.positions, EMPTY_POSITION)
            change = super().__call__(x, replace(ctx, positions=positions)) - x
            return x + mx.where(chosen[..., None], gates * change, mx.zeros((), x.dtype))
        chosen = self.choose(scores)
        self.record(scores, chosen, ctx)
        some = ops.take_tokens(x, chosen)
        change = super().__call__(some, ctx.take(chosen)) - some
        return x + ops.put_tokens(ops.take_tokens(gates, chosen) * change, chosen, x.shape[1])

    def choose(self, scores: mx.array) -> mx.array:
        """Return the indices (B, k), ascending, of the largest scores (B, L) of each sequence."""
        k = self.n_computed(scores.shape[1])
        return mx.sort(mx.argsort(-mx.stop_gradient(scores), axis=-1)[:, :k], axis=-1)

    def n_computed(self, length: int) -> int:
        return max(1, round(self.capacity * length))

    def record(self, scores: mx.array, chosen: mx.array, ctx: Ctx) -> None:
        """Record the router's loss, and the share of tokens that evaluation would choose as training did."""
        among = (chosen[..., None] == mx.arange(scores.shape[1])).any(axis=1)
        loss = (mx.logaddexp(0, scores) - mx.where(among, scores, 0)).mean()
        ctx.record("depth_router", loss, self.router_weight)
        ctx.record("depth_agreement", ((scores >= 0) == among).mean())
