"""The encoder-decoder of Vaswani et al. 2017 (arXiv 1706.03762), made of the parts of a language model.

    source (B, S) -> Encoder -> memory (B, S, D) --+
                                                   | keys and values
    target (B, T) -> self-attention -> cross-attention -> feed-forward -> head -> logits (B, T, V)

A pair is one row of a batch (B, 2, n): the source in row 0, the target in row 1, both padded with PAD to n tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.block import Block, PostNormBlock, PreNormBlock
from mlx_transformer.nn.cache import EMPTY_POSITION, Cache, LayerCache
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.model import Model, Slot, class_for_layer
from mlx_transformer.nn.position import Position
from mlx_transformer.utils.errors import BadInput

PAD = -1  # where a sequence has no token


class CrossCache:
    """Caches of a block with cross-attention: `own` for its tokens, `memory` for those of an encoder's output.

    That of the memory is filled once and does not grow.
    """

    def __init__(self, own: LayerCache, memory: LayerCache) -> None:
        self.own, self.memory = own, memory

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The arrays of both."""
        both = (("own", self.own), ("memory", self.memory))
        return {f"{name}.{key}": held for name, cache in both for key, held in cache.arrays.items()}

    @arrays.setter
    def arrays(self, arrays: dict[str, mx.array]) -> None:
        for name, cache in (("own", self.own), ("memory", self.memory)):
            found = {key.removeprefix(f"{name}."): held for key, held in arrays.items() if key.startswith(f"{name}.")}
            cache.arrays = found

    @property
    def free_slots(self) -> int:
        """Those of `own`."""
        return self.own.free_slots

    @free_slots.setter
    def free_slots(self, count: int) -> None:
        self.own.free_slots = count

    def select(self, sequences: mx.array) -> None:
        """Keep the sequences of these batch indices (R,) int, in this order."""
        self.own.select(sequences)
        self.memory.select(sequences)

    def reserve(self, tokens: int) -> None:
        """Allocate slots for this many further tokens of the block's own."""
        self.own.reserve(tokens)

    def compact(self, tokens: int) -> None:
        """Free the slots of the block's own tokens that no sequence uses."""
        self.own.compact(tokens)

    def merged(self, others: Sequence[Any]) -> "CrossCache":
        """Return one cache with the sequences of all; memories of unequal length are padded."""
        own = self.own.merged([other.own for other in others])
        return CrossCache(own, self.memory.merged([other.memory for other in others]))


class CrossBlock(Block):
    """Block whose second part, of three, attends to the memory (sec. 3.1): put it before a class with a `join`.

    The memory has its positions already, so that cross-attention encodes none.
    """

    n_norms = 3

    def __init__(self, config: Config, mixer: nn.Module, ffn: nn.Module, make_norm: Callable, cross: nn.Module) -> None:
        super().__init__(config, mixer, ffn, make_norm)
        self.cross, self.no_position = cross, Position(config)

    def make_cache(self, batch: int) -> CrossCache:
        return CrossCache(self.mixer.make_cache(batch), self.cross.make_cache(batch))

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        own = replace(ctx, memory=None, memory_positions=None, cache=ctx.cache and ctx.cache.own)
        x = self.join(x, self.mixer, self.norms[0], own)
        x = self.join(x, self.cross, self.norms[1], self.across(ctx))
        return self.join(x, self.ffn, self.norms[2], own)

    def across(self, ctx: Ctx) -> Ctx:
        """Return the context of cross-attention."""
        return replace(ctx, position=self.no_position, causal=False, cache=ctx.cache and ctx.cache.memory)

    def read(self, ctx: Ctx) -> None:
        """Put keys and values of the memory into the cache."""
        assert ctx.memory is not None
        ctx = self.across(ctx)
        q, k, v = self.cross.project(ctx.memory, ctx)
        self.cross.recall(self.cross.condition(q, k, ctx)[1], v, ctx)


class CrossPostNormBlock(CrossBlock, PostNormBlock):
    """The decoder block of the paper."""


class CrossPreNormBlock(CrossBlock, PreNormBlock):
    """The decoder block with pre-norm."""


class Encoder(nn.Module):
    """Blocks in which every token attends to all of the source, and the model's embedding, shared (sec. 3.4)."""

    def __init__(self, config: Config, blocks: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.blocks, self.final_norm = blocks, norm
        self.build(config)

    def build(self, config: Config) -> None:
        """Make further parts; subclasses override this."""

    def table(self, embedding: nn.Embedding) -> nn.Embedding:
        """Return the embedding of the source's tokens; `embedding` is that of the target's."""
        return embedding


class SeparateEncoder(Encoder):
    """Encoder with an embedding of its own."""

    def build(self, config: Config) -> None:
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)

    def table(self, embedding: nn.Embedding) -> nn.Embedding:
        return self.embedding


class Translator(Model):
    """Encoder-decoder: pairs (B, 2, n) int32 -> logits (B, n, V) of the token after each one of the target.

    n_layers blocks in the encoder, and as many in the decoder. Tokens (B, L) are the target alone: of the source that
    the cache has read, or of none. Raises BadInput for a Mixer that cannot see all of a source.
    """

    parallel = True

    Encoder: Slot = Encoder
    EncoderBlock: Slot = PostNormBlock
    Block: Slot = CrossPostNormBlock
    Cross: Slot = Attention

    def build(self, config: Config) -> None:
        super().build(config)
        blocks = [
            class_for_layer(self.EncoderBlock, i)(*super(Translator, self).parts(i)) for i in range(config.n_layers)
        ]
        for block in blocks:
            _check_bidirectional(block.mixer)
        self.encoder = self.Encoder(config, blocks, self.make_final_norm())

    def make_cross(self, i: int) -> nn.Module:
        """Return the cross-attention of decoder block i."""
        return class_for_layer(self.Cross, i)(self.config, i)

    def parts(self, i: int) -> tuple[Any, ...]:
        """Return the constructor arguments of decoder block i."""
        return *super().parts(i), self.make_cross(i)

    def example(self, batch: int, length: int) -> mx.array:
        return mx.zeros((batch, 2, length + 1), mx.int32)

    def encode(self, source: mx.array) -> Ctx:
        """Encode sources (B, S): the context of their tokens, with the memory (B, S, D)."""
        own, positions = source >= 0, mx.arange(source.shape[1], dtype=mx.int32)
        ctx = Ctx(
            tokens=mx.maximum(source, 0),
            positions=positions,
            position=self.position,
            causal=False,
            mask=own[:, None, None],
        )
        x = self.dropout(ctx.position.at_input(self.encoder.table(self.embedding)(ctx.tokens), ctx))
        ctx = replace(ctx, x0=x)
        for depth, block in enumerate(self.encoder.blocks):
            x = self.run_block(block, x, ctx.at(depth))
        seen = mx.where(own, positions, EMPTY_POSITION)
        return replace(ctx, mask=None, memory=self.encoder.final_norm(x), memory_positions=seen)

    def read(self, source: mx.array, cache: Cache) -> None:
        """Encode sources (B, S) and put each block's keys and values of them into an empty cache."""
        ctx = replace(self.encode(source), cache=cache)
        for depth, block in enumerate(self.stack()):
            block.read(ctx.at(depth))

    def context(self, tokens: mx.array, cache: Cache | None = None) -> Ctx:
        if tokens.ndim == 3:
            source, tokens = tokens[:, 0], tokens[:, 1]
            if cache is None:
                return self._beside(self.encode(source), tokens)
            self.read(source, cache)
        ctx = super().context(mx.maximum(tokens, 0), cache)
        known = cache is not None and any(
            name.startswith("memory.") for name in cache.layers[0].arrays
        )  # else one hidden token is the source
        none = mx.zeros((tokens.shape[0], 0 if known else 1, self.config.d_model), self.embedding.weight.dtype)
        return replace(ctx, memory=none, memory_positions=mx.full(none.shape[:2], EMPTY_POSITION, mx.int32))

    def _beside(self, source: Ctx, tokens: mx.array) -> Ctx:
        """Return the context of the target's tokens (B, T) beside an encoded source."""
        taken = {name: getattr(source, name) for name in ("memory", "memory_positions", "auxiliary")}
        return replace(super().context(mx.maximum(tokens, 0)), **taken)

    def inputs(self, batch: mx.array) -> tuple[Ctx, mx.array]:
        return self._beside(self.encode(batch[:, 0]), batch[:, 1, :-1]), batch[:, 1, 1:]

    def token_loss(self, h: mx.array, targets: mx.array) -> mx.array:
        """Return the cross-entropy of each token in nats (B, L), 0 for padding."""
        return super().token_loss(h, mx.maximum(targets, 0)) * (targets >= 0)

    def objective(self, h: mx.array, targets: mx.array, ctx: Ctx) -> mx.array:
        """Return the mean over the tokens of the batch, padding left out."""
        return ops.mean_cross_entropy(
            h,
            self.head.matrix(self.embedding),
            mx.maximum(targets, 0),
            targets >= 0,
            softcap=self.head.softcap,
            label_smoothing=self.label_smoothing,
        )


def _check_bidirectional(mixer: nn.Module) -> None:
    kind: Any = type(mixer)
    if not (isinstance(mixer, Attention) and kind.visible is Attention.visible and kind.attend is Attention.attend):
        raise BadInput(
            f"{kind.__name__} in an encoder: it sees earlier tokens only, or near ones; give nn.Attention, or a "
            "subclass that keeps its `visible` and `attend`"
        )
