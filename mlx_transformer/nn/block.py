"""Blocks: wiring of norms, mixer, feed-forward part and residual stream."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.cache import LayerCache
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.dropout import Dropout

Part = Callable[[mx.array, Ctx], mx.array]
Norm = Callable[[mx.array], mx.array]


class Block(nn.Module):
    """Mixer, then feed-forward part, each added to the residual stream by `join`: x (B, L, D) -> (B, L, D).

    Subclasses define `join`, or override `__call__` for another wiring with `n_norms` norms.
    """

    n_norms = 2

    def __init__(self, config: Config, mixer: nn.Module, ffn: nn.Module, make_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.norms = [make_norm() for _ in range(self.n_norms)]
        self.dropout = Dropout(config.dropout)

    def make_cache(self, batch: int) -> LayerCache:
        """Return an empty cache of the mixer for decoding."""
        return self.mixer.make_cache(batch)

    def n_computed(self, length: int) -> int:
        """Return how many tokens of a sequence of `length` training computes."""
        return length

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        x = self.join(x, self.mixer, self.norms[0], ctx)
        return self.join(x, self.ffn, self.norms[1], ctx)

    def join(self, x: mx.array, part: Part, norm: Norm, ctx: Ctx) -> mx.array:
        """Return the stream x (B, L, D) with the output of one part added."""
        raise NotImplementedError("a subclass of Block defines `join`")


class PostNormBlock(Block):
    """Post-norm: norm(x + part(x)) (Vaswani et al. 2017, sec. 3.1; dropout as in sec. 5.4).

    x --+--> part -> dropout --(+)--> norm -->
        +-----------------------+
    """

    def join(self, x: mx.array, part: Part, norm: Norm, ctx: Ctx) -> mx.array:
        return norm(x + self.dropout(part(x, ctx)))


class PreNormBlock(Block):
    """Pre-norm: x + part(norm(x)) (Xiong et al. 2020, arXiv 2002.04745, fig. 1b; GPT-2).

    x --+--> norm -> part -> dropout --(+)-->
        +-------------------------------+

    The output of the last block is not normalized: the model needs a final norm.
    """

    def join(self, x: mx.array, part: Part, norm: Norm, ctx: Ctx) -> mx.array:
        return x + self.dropout(part(norm(x), ctx))


class MixedInputBlock(PreNormBlock):
    """PreNormBlock with input a x + b x0, x0 the embeddings; learned scalars a, b (1,), initially 1 and 0.

    modded-nanogpt (Jordan et al. 2024).
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.residual_lambda = mx.ones((1,))
        self.x0_lambda = mx.zeros((1,))

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        assert ctx.x0 is not None, "set by Model.hidden"
        return super().__call__(self.residual_lambda * x + self.x0_lambda * ctx.x0, ctx)
