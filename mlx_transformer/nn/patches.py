"""Patches of pictures beside tokens: any model with a linear map of their pixels (ViT)."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import mlx.core as mx
import numpy as np

from mlx_transformer.nn.cache import Cache
from mlx_transformer.nn.config import Hyperparameters
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import Linear
from mlx_transformer.nn.model import Model


class PatchNumbers(Hyperparameters):
    patch_size: int = 3  # pixels of a side of a patch
    patch_token: int = 1  # the token that stands for every patch


class Patched(Model):
    """A model that reads patches of pictures beside tokens (Dosovitskiy et al. 2020, arXiv 2010.11929, eq. 1).

    A token t >= vocab_size is the patch t - vocab_size, whose lower patch_size^2 bits say which pixels are colored and
    whose next three bits are their red, green and blue. Everything but the patch embedding sees `patch_token` in its
    place; the embedding of a patch is that of this token plus E p, p (3 patch_size^2,) the pixels, 0 or 1. Differs from
    the paper: the position encoding is the model's own, over the sequence of tokens and patches. A patch is no target.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        self.patch_proj = Linear(3 * config.patch_size**2, config.d_model)

    def context(self, tokens: mx.array, cache: Cache | None = None) -> Ctx:
        tokens = tokens.astype(mx.int32)  # sampled ones are unsigned, and the difference would wrap
        patches = mx.maximum(tokens - self.config.vocab_size, 0)  # 0, a patch without color, for a token
        numbers: Any = self.config
        known = mx.where(tokens < numbers.vocab_size, tokens, numbers.patch_token)
        return replace(super().context(known, cache), patches=patches)

    def prepare(self, train: np.ndarray, eos_id: int) -> np.ndarray:
        numbers: Any = self.config
        text = np.where(train < numbers.vocab_size, train, numbers.patch_token)
        prepared = super().prepare(text, eos_id)
        return train if prepared is text else prepared

    def inputs(self, batch: mx.array) -> tuple[Ctx, mx.array]:
        ctx, targets = super().inputs(batch)
        numbers: Any = self.config
        return ctx, mx.where(targets < numbers.vocab_size, targets, numbers.patch_token)

    def embed_tokens(self, ctx: Ctx) -> mx.array:
        x, numbers = super().embed_tokens(ctx), cast(PatchNumbers, self.config)
        assert ctx.patches is not None, "made by `context`"
        return x + self.patch_proj(pixels(ctx.patches, numbers.patch_size).astype(x.dtype))


def pixels(patches: mx.array, size: int) -> mx.array:
    """Return the pixels (..., 3 size^2) bool of numbered patches (...) int: red, then green, then blue."""
    bits = patches[..., None] >> mx.arange(size * size + 3)
    colored, color = mx.split(bits & 1, [size * size], axis=-1)
    return (color[..., :, None] * colored[..., None, :]).flatten(-2)


M = TypeVar("M", bound=Model)


@functools.cache
def with_patches(kind: type[M]) -> type[M]:
    """Return the same model with a patch embedding: always the same class for a class."""
    here = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    config = type("Config", (PatchNumbers, kind.Config), dict(here))
    return type(kind.__name__, (Patched, kind), {**here, "Config": config})


def class_of(kind: type[Model], config: Mapping[str, Any]) -> type[Model]:
    """Return the class of a model with this configuration: with a patch embedding where its numbers are in it."""
    return with_patches(kind) if "patch_size" in config else kind


def without_patches(kind: type[Model]) -> type[Model]:
    """Return the class that `with_patches` was given."""
    return kind.__mro__[2] if issubclass(kind, Patched) else kind
