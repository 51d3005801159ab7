"""Phase 1, 2017: "Attention Is All You Need" (Vaswani et al., arXiv 1706.03762), as a decoder-only language model.

The paper's parts: multi-head scaled dot-product attention, ReLU feed-forward, LayerNorm after the residual sum,
sinusoidal positions, dropout; Adam with warm-up and inverse square-root decay. The paper translates; a language model
is its decoder alone, without the encoder and without cross-attention. The decay of matrices is of 2017 too (AdamW).
"""

from dataclasses import replace

import mlx_transformer as mt
from mlx_transformer.nn import config, model
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.block import PostNormBlock
from mlx_transformer.nn.feedforward import FeedForward
from mlx_transformer.nn.head import Head
from mlx_transformer.nn.model import Slot
from mlx_transformer.nn.norm import LayerNorm
from mlx_transformer.nn.position import SinusoidalPosition
from mlx_transformer.train.optim.clip import GlobalNorm
from mlx_transformer.train.optim.groups import AdamW, Group, Matrices, Vectors
from mlx_transformer.train.optim.schedules import InverseSqrt
from mlx_transformer.train.optim.stopping import Plateau
from mlx_transformer.train.recipe import BySize, Recipe

NAME = "attention_is_all_you_need"


class Config(config.Config):
    """The numbers of phase 1: those of every phase."""


class Model(model.Model):
    """The Transformer decoder of 2017."""

    Config = Config
    Norm: Slot = LayerNorm
    Position: Slot = SinusoidalPosition
    Head: Slot = Head
    Mixer: Slot = Attention
    FFN: Slot = FeedForward
    Block: Slot = PostNormBlock


_ADAM = AdamW(betas=(0.9, 0.98), eps=1e-9)  # sec. 5.3

RECIPE = Recipe(
    batch_tokens=BySize(nano=2_048, small=8_192, base=32_768),  # the paper's ~25,000 (sec. 5.1), scaled with size
    learning_rate=BySize(nano=1.6e-2, small=8e-3, base=4e-3),  # tune/phase1_nano.json, phase1_small.json; base: a guess
    # 120 steps, 50 for two layers: after 50 a rate above 0.004 is lost at small (tune/phase1_small_short_warmup.json)
    schedule=InverseSqrt(warmup_tokens=BySize(nano=100_000, small=1_000_000, base=4_000_000)),
    groups=(
        Group(name="matrices", select=Matrices(), optimizer=replace(_ADAM, weight_decay=0.01)),
        Group(name="vectors", select=Vectors(), optimizer=_ADAM),
    ),
    clip=GlobalNorm(max_norm=1.0),
    stop=Plateau(patience=5, min_improvement=0.001),
    eval_tokens=BySize(nano=100_000, small=250_000, base=1_000_000),
)
RECIPES: dict[str, Recipe] = {}
BRANCHES: dict[str, type[Model]] = {}

mt.main(__name__)
