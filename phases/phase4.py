"""Phase 4, 2019-2023: efficiency. GPT-2 with fused, grouped-query attention: less time or memory at equal loss.

Changes against phase 3, and what each is for:
- Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): half as many heads of keys and values, so half the
  cache of keys and values, and fewer parameters.
- Fused attention (Dao et al. 2022, arXiv 2205.14135): the L x L scores are never whole in memory where MLX has a
  kernel for it: on Metal, for heads of width 64 and more, without a gradient: never in training or at our three sizes.

The cross-entropy has been computed in chunks since phase 1 (`ops/loss.py`): the logits are never whole in memory. The
head stays untied, since tying costs loss in phase 3 (RESULTS.md).
"""

from dataclasses import replace

import mlx_transformer as mt
from mlx_transformer import nn
from mlx_transformer.train import ByWidth, Recipe
from phases import phase3
from phases.ablations import phase4 as ablations

NAME = "efficiency"

LEARNING_RATE = ByWidth(0.006, power=-1)  # the peak
EMBEDDING, HEAD_RATE = ByWidth(9.0, power=1), 12.0  # multiples of it


class Config(phase3.Config):
    """Configuration of phase 3, and the number of key and value heads."""

    n_kv_heads: int = 0  # heads of keys and values; 0: half of n_heads, or the next smaller divisor

    def __post_init__(self) -> None:
        half = max(1, self.n_heads // 2)
        self.derive("n_kv_heads", next((n for n in range(half, 0, -1) if self.n_heads % n == 0), 1))
        super().__post_init__()


class Model(phase3.Model):
    """GPT-2 with fused, grouped-query attention."""

    Config = Config
    Mixer: nn.Slot = nn.FusedAttention


RECIPE = phase3.RECIPE.with_rates(LEARNING_RATE, embedding=EMBEDDING, head=HEAD_RATE)
RECIPES: dict[str, Recipe] = {"checkpoint": replace(RECIPE, checkpoint="block")}  # Chen et al. 2016, arXiv 1604.06174
BRANCHES = ablations.branches(Model)

mt.main(__name__)
