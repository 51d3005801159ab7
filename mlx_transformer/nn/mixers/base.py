"""RecurrentMixer: the base class of mixers with a state of constant size."""

from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.cache import State
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.position import Position
from mlx_transformer.utils.errors import BadInput


class RecurrentMixer(nn.Module):
    """A mixer that knows the past by a state of constant size: x (B, L, D) -> (B, L, D).

    A subclass makes its parts in `build`, its state in `initial_state`, and computes in `advance`. There are no scores
    between tokens, hence no place for a position's bias or for ctx.mask: both raise BadInput, when a model is built.
    """

    def __init__(self, config: Any, layer: int) -> None:
        nn.Module.__init__(self)  # not super(): a subclass may be an Attention too, for its projections
        self.layer = layer  # index of the block
        self.build(config)

    def build(self, config: Any) -> None:
        """Make the parts; subclasses override this."""

    def initial_state(self, batch: int) -> dict[str, mx.array]:
        """Return the state before the first token: float32 arrays by name, whose first axis is the batch."""
        raise NotImplementedError("a subclass of RecurrentMixer defines `initial_state`")

    def advance(self, x: mx.array, ctx: Ctx, state: dict[str, mx.array] | None) -> tuple[mx.array, dict[str, mx.array]]:
        """Return the outputs (B, L, D) of x (B, L, D) and the state after it. state None: the initial one."""
        raise NotImplementedError("a subclass of RecurrentMixer defines `advance`")

    def make_cache(self, batch: int) -> State:
        """Return the state of `batch` sequences for decoding."""
        return State(**self.initial_state(batch))

    def weights_of(self, x: mx.array, ctx: Ctx) -> None:
        """Return None: a state has no weights over tokens."""

    def n_kept(self, length: int, keeps_scores: bool) -> int:
        """Return about how many numbers training keeps of one sequence of `length` tokens; subclasses override this.

        keeps_scores: as `ops.keeps_scores`, which matrices of pairs of tokens within a chunk do not heed.
        """
        return 0

    def n_shared(self, length: int) -> int:
        """Return about how many numbers training keeps once for all sequences, beside the weights."""
        return 0

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        self.check(ctx)
        y, state = self.advance(x, ctx, None if ctx.cache is None else ctx.cache.arrays)
        if ctx.cache is not None:
            ctx.cache.arrays = {name: held.astype(mx.float32) for name, held in state.items()}
        return y.astype(x.dtype)

    def check(self, ctx: Ctx) -> None:
        """Raise BadInput for a position with a bias, or a mask."""
        name = type(self).__name__
        position: Any = type(ctx.position)
        if position.bias is not Position.bias:
            raise BadInput(
                f"{name} has no scores to which the bias of {position.__name__} could be added: choose another "
                "Position, or a Mixer that is attention"
            )
        if ctx.mask is not None:
            raise BadInput(f"{name} has no scores that ctx.mask could hide: choose a Mixer that is attention")


def check_mixers(model: Any) -> None:
    """Raise BadInput, as RecurrentMixer.check does, for a mixer of a model that cannot heed its position or mask."""
    parts = [part for part in model.modules() if isinstance(part, RecurrentMixer)]
    if parts:
        ctx = model.context(mx.zeros((1, 1), mx.int32))
        for part in parts:
            part.check(ctx)
