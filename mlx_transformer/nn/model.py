"""Model: embed -> blocks -> head, and the loss. A phase sets slots and overrides hooks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map_with_path

from mlx_transformer import ops
from mlx_transformer.nn import config, init
from mlx_transformer.nn.cache import Cache, State
from mlx_transformer.nn.context import NO_TOKEN, Ctx, recent_tokens
from mlx_transformer.nn.dropout import Dropout
from mlx_transformer.nn.mixers.base import check_mixers
from mlx_transformer.nn.position import Position
from mlx_transformer.nn.recompute import checkpointed
from mlx_transformer.utils.trees import by_path

Slot = Any  # a class, or a tuple of classes that layers use cyclically


def class_for_layer(slot: Slot, i: int) -> Any:
    """Return the class of layer i: a tuple of n classes gives that of index i mod n."""
    return slot[i % len(slot)] if isinstance(slot, tuple) else slot


class Model(nn.Module):
    """Autoregressive language model: tokens (B, L) int32 -> logits (B, L, V).

    Slots hold classes. `Mixer`, `FFN` and `Block` may hold a tuple of classes, used cyclically over the layers.
    """

    Config: type[config.Config]
    Norm: Slot
    Position: Slot
    Head: Slot
    Mixer: Slot
    FFN: Slot
    Block: Slot

    label_smoothing: float = 0.0  # of the training loss only; set by the trainer from the Recipe
    parallel: bool = False  # whether a batch holds pairs of a source and its translation (nn.translator)
    n_recent: int = 0  # last tokens in ctx.recent, for a part that looks up n-grams
    masked: bool = False  # batches hold ~t where the loss does not count t; set by the trainer from the data
    in_parts: bool = False  # each of several ranks has some of the blocks, and computes in turn; set by train.pipeline
    checkpoint: str = "none"  # gradient checkpointing, none or block; set by the trainer from the Recipe

    def __init__(self, config: config.Config, seed: int = 0) -> None:
        """Build the parts, then initialize each parameter. Final: subclasses extend `build`.

        Raises BadInput for hyperparameters that a part does not accept or a position that a mixer cannot heed,
        ValueError for a parameter that several initialization rules match.
        """
        super().__init__()
        self.config = config
        self.build(config)
        check_mixers(self)

        def draw(path: str, value: mx.array) -> mx.array:
            key = init.path_key(seed, path)
            return self.init_weight(path, init.part_rule(self, path)(value, key), key)

        self.update(tree_map_with_path(draw, self.parameters()))

    # Factories: make the parts.

    def build(self, config: config.Config) -> None:
        """Make the parts; subclasses extend this by super().build(config)."""
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position = self.make_position()
        self.blocks = [self.make_block(i) for i in range(self.n_blocks(config))]
        self.final_norm = self.make_final_norm()
        self.head = self.Head(config)
        self.dropout = Dropout(config.dropout)

    @classmethod
    def n_blocks(cls, config: config.Config) -> int:
        """Return the number of blocks with weights of their own; `stack` may repeat them."""
        return config.n_layers

    def make_norm(self) -> nn.Module:
        """Return a norm over the residual stream."""
        return self.Norm(self.config.d_model, self.config.norm_eps)

    def make_final_norm(self) -> nn.Module:
        """Return the norm before the head: none here, since post-norm blocks end with one."""
        return nn.Identity()

    def make_position(self) -> Position:
        """Return the position encoding, one for all layers."""
        return self.Position(self.config)

    def make_mixer(self, i: int) -> nn.Module:
        """Return the token mixer of block i."""
        return class_for_layer(self.Mixer, i)(self.config, i)

    def make_ffn(self, i: int) -> nn.Module:
        """Return the feed-forward part of block i."""
        return class_for_layer(self.FFN, i)(self.config)

    def make_block(self, i: int) -> nn.Module:
        """Return block i, made of its parts."""
        return class_for_layer(self.Block, i)(*self.parts(i))

    def parts(self, i: int) -> tuple[config.Config, nn.Module, nn.Module, Callable[[], nn.Module]]:
        """Return the constructor arguments of block i: config, mixer, feed-forward part, norm factory."""
        return self.config, self.make_mixer(i), self.make_ffn(i), self.make_norm

    def init_weight(self, path: str, value: mx.array, key: mx.array) -> mx.array:
        """Return the initial value of one parameter: that of the phase's table if a rule matches, else `value`.

        value: set by the part, or drawn by its `init_rules`. key: random key derived from the seed and the path.
        """
        return init.rule_for(path)(value, key)

    def make_cache(self, batch: int) -> Cache:
        """Return an empty cache for decoding `batch` sequences: one per depth, then the last tokens if n_recent."""
        layers = [block.make_cache(batch) for block in self.stack()]
        return Cache([*layers, State(tokens=self._before(batch))] if self.n_recent else layers)

    def _before(self, batch: int) -> mx.array:
        """Return what stands for the n_recent - 1 tokens before the first one."""
        return mx.full((batch, self.n_recent - 1), NO_TOKEN, mx.int32)

    def example(self, batch: int, length: int) -> mx.array:
        """Return a batch of zeros, as `loss` takes it, for predicting `length` tokens of each sequence."""
        return mx.zeros((batch, length + 1), mx.int32)

    def count_parameters(self) -> dict[str, int]:
        """Return the counts `total`, `embedding` (input embedding) and `active` (used for one token)."""
        total = sum(value.size for value in by_path(self.parameters()).values())
        return {"total": total, "embedding": self.embedding.weight.size, "active": total}

    # Data beside the parameters: what a model takes from the training text.

    def prepare(self, train: np.ndarray, eos_id: int) -> np.ndarray:
        """Take from the training text (T,) what training needs, and return what batches are cut from.

        That is the text itself, or (T, C) int32: further numbers of each token, then the token, which `inputs` finds in
        the rows of a batch (B, C, L + 1). Called before the first step, in the time of training.
        """
        return train

    def tables(self) -> dict[str, mx.array]:
        """Return the arrays that `prepare` made for evaluation and decoding, to be saved with the weights."""
        return {}

    def load_tables(self, arrays: dict[str, mx.array]) -> None:
        """Set what `tables` returned. Raises BadInput for arrays that do not fit."""

    # Steps: compute the forward pass.

    def __call__(self, tokens: mx.array, cache: Cache | None = None) -> mx.array:
        """Return logits (B, L, V). With a cache, tokens continue the cached sequences and are appended to it."""
        ctx = self.context(tokens, cache)
        return self.predict(self._advance(ctx), ctx)

    def last_logits(self, tokens: mx.array, cache: Cache | None = None) -> mx.array:
        """Return the logits (B, V) after the last token, for decoding; cache as in `__call__`."""
        ctx = self.context(tokens, cache)
        h = self._advance(ctx)[:, -1:]
        return self.predict(h, replace(ctx, recent=None if ctx.recent is None else ctx.recent[:, -1:]))[:, 0]

    def last_hidden(self, tokens: mx.array, cache: Cache | None = None) -> mx.array:
        """Return the last hidden states (B, L, D); cache as in `__call__`."""
        return self._advance(self.context(tokens, cache))

    def _advance(self, ctx: Ctx) -> mx.array:
        """Return the last hidden states, and count the tokens as cached."""
        h = self.hidden(ctx)
        if ctx.cache is not None:
            ctx.cache.offset = ctx.cache.offset + ctx.tokens.shape[1]
        return h

    def context(self, tokens: mx.array, cache: Cache | None = None) -> Ctx:
        """Return the context passed to every block for these tokens (B, L)."""
        positions = mx.arange(tokens.shape[1], dtype=mx.int32)
        ctx = Ctx(tokens=tokens, positions=positions, position=self.position, recent=self._recent(tokens, cache))
        if cache is None:
            return ctx
        return replace(ctx, positions=cache.offset[..., None] + positions, cache=cache)

    def _recent(self, tokens: mx.array, cache: Cache | None) -> mx.array | None:
        """Return ctx.recent of these tokens, and keep the last of them in the cache."""
        if not self.n_recent:
            return None
        before = self._before(len(tokens)) if cache is None else cache.layers[-1].arrays["tokens"]
        if cache is not None:
            whole = mx.concatenate([before, tokens.astype(mx.int32)], axis=1)
            cache.layers[-1].arrays = {"tokens": whole[:, tokens.shape[1] :]}
        return recent_tokens(tokens, self.n_recent, before)

    def inputs(self, batch: mx.array) -> tuple[Ctx, mx.array]:
        """Split a batch (B, L + 1) into the context of its first L tokens and the targets (B, L) that follow them.

        In a masked batch a token t that is no target is stored as ~t = -1 - t, and ctx.scored is False there.
        """
        if not self.masked:
            return self.context(batch[:, :-1]), batch[:, 1:]
        tokens = mx.maximum(batch, ~batch)
        return replace(self.context(tokens[:, :-1]), scored=batch[:, 1:] >= 0), tokens[:, 1:]

    def hidden(self, ctx: Ctx) -> mx.array:
        """Return the last hidden states (B, L, D) of the context's tokens."""
        x = self.embed(ctx)
        return self.final_norm(self.run_blocks(x, replace(ctx, x0=x)))

    def embed(self, ctx: Ctx) -> mx.array:
        """Return the embeddings (B, L, D) of the context's tokens, with positions added if they enter at the input."""
        return self.dropout(ctx.position.at_input(self.embed_tokens(ctx), ctx))

    def embed_tokens(self, ctx: Ctx) -> mx.array:
        """Return the embeddings (B, L, D) of the context's tokens, without positions."""
        return self.embedding(ctx.tokens)

    def run_blocks(self, x: mx.array, ctx: Ctx) -> mx.array:
        """Apply all blocks to x (B, L, D)."""
        for depth, block in enumerate(self.stack()):
            x = self.run_block(block, x, ctx.at(depth))
        return x

    def run_block(self, block: nn.Module, x: mx.array, ctx: Ctx) -> mx.array:
        """Apply one block to x (B, L, D), with gradient checkpointing if it is on."""
        if self.training and self.checkpoint == "block":
            return checkpointed(block, x, ctx)
        return block(x, ctx)

    def stack(self) -> list[nn.Module]:
        """Return the blocks in order of execution; a block listed twice shares its weights, not its cache."""
        return self.blocks

    def unembed(self, h: mx.array) -> mx.array:
        """Return the logits (.., V) of hidden states (.., D)."""
        return self.head(h, self.embedding)

    def token_loss(self, h: mx.array, targets: mx.array) -> mx.array:
        """Return the cross-entropy of each token in nats (B, L), as evaluation sums it, in chunks of logits."""
        return ops.cross_entropy(h, self.head.matrix(self.embedding), targets, softcap=self.head.softcap)

    def predict(self, h: mx.array, ctx: Ctx) -> mx.array:
        """Return the logits (B, L, V) after the tokens of ctx, for decoding; h (B, L, D): their last hidden states."""
        return self.unembed(h)

    def evaluation_loss(self, h: mx.array, targets: mx.array, ctx: Ctx) -> mx.array:
        """Return the loss of each target in nats (B, L) under what `predict` predicts."""
        return self.token_loss(h, targets)

    def objective(self, h: mx.array, targets: mx.array, ctx: Ctx) -> mx.array:
        """Return the scalar training loss of h (B, L, D) and the scored targets (B, L), without auxiliary losses."""
        if not self.label_smoothing:
            return self.training_losses(h, targets, ctx)[0]
        return ops.mean_cross_entropy(
            h,
            self.head.matrix(self.embedding),
            targets,
            ctx.scored,
            softcap=self.head.softcap,
            label_smoothing=self.label_smoothing,
        )

    def training_losses(self, h: mx.array, targets: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array]:
        """Return the mean cross-entropy of the scored targets (B, L), and each one's in nats, without a gradient."""
        matrix = self.head.matrix(self.embedding)
        return ops.mean_and_token_losses(h, matrix, targets, ctx.scored, softcap=self.head.softcap)

    def loss(self, batch: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        """Return the training loss of a batch (B, L + 1), auxiliary losses included, and the scalars to log."""
        ctx, targets = self.inputs(batch)
        loss = self.objective(self.hidden(ctx), targets, ctx)
        extra, metrics = ctx.auxiliary_loss()
        return loss + extra, {"loss": loss, **metrics}


M = TypeVar("M", bound=Model)


def leaf(model: type[M], *mixins: type[config.Hyperparameters] | type[Model], **slots: Slot) -> type[M]:
    """Return a branch of `model`: a subclass with the given slots (class attributes).

    mixins: Config fields (direct subclasses of Hyperparameters), which override those of model.Config, and subclasses
    of Model that extend its methods. Example: `leaf(Model, RoPE, Position=RotaryPosition)`, RoPE declares rope_theta.
    Raises TypeError for a slot that the model does not have.
    """
    if unknown := [name for name in slots if not hasattr(model, name)]:
        raise TypeError(f"{model.__module__}.{model.__name__} has no slot '{unknown[0]}'")
    here = {"__module__": model.__module__}
    if numbers := [mixin for mixin in mixins if not issubclass(mixin, Model)]:
        slots["Config"] = type("Config", (*numbers, model.Config), dict(here))
    parts = [mixin for mixin in mixins if issubclass(mixin, Model)]
    return type("Leaf", (*parts, model), {**here, **slots})
