"""Phase 4, 2019-2023: efficiency. What cuts time or memory at equal loss: GPT-2 with fused, grouped attention.

The loss has gone through the head chunk by chunk since phase 1 (`ops/loss.py`): the logits are never whole in memory.
The head stays untied, since tying it did not pay in phase 3 (RESULTS.md): `tied` is a branch here too.
"""

from dataclasses import replace

import mlx_transformer as mt
from mlx_transformer.nn.attention import FusedAttention
from mlx_transformer.nn.head import TiedHead
from mlx_transformer.nn.model import Slot
from mlx_transformer.nn.moe import MixtureOfExperts, Switch
from mlx_transformer.nn.sparse import WindowAttention
from mlx_transformer.train.recipe import Recipe
from phases import phase3

NAME = "efficiency"


class Config(phase3.Config):
    """The numbers of phase 3, and how many heads of keys and values there are."""

    n_kv_heads: int = 0  # heads of keys and values; 0: half of n_heads, or the next smaller divisor

    def __post_init__(self) -> None:
        half = max(1, self.n_heads // 2)
        self.derive("n_kv_heads", next((n for n in range(half, 0, -1) if self.n_heads % n == 0), 1))
        super().__post_init__()


class Model(phase3.Model):
    """GPT-2 with grouped heads (Ainslie et al. 2023, arXiv 2305.13245), fused (Dao et al. 2022, arXiv 2205.14135)."""

    Config = Config
    Mixer: Slot = FusedAttention


def leaf(**slots: Slot) -> type[Model]:
    """A branch: the trunk with these slots filled otherwise."""
    return type("Leaf", (Model,), slots)


class WindowConfig(Config):
    window: int = 32  # tokens that a token sees, its own among them


class FusedWindow(WindowAttention, FusedAttention):
    """A window over grouped heads."""


class MoEConfig(Config):
    """A layer's experts are d_ff wide each."""

    n_experts: int = 8  # of a layer
    experts_per_token: int = 2  # that a token is sent to
    capacity_factor: float = 1.25  # seats of an expert in training, in fair shares (Switch, sec. 2.2)
    balance_weight: float = 0.01  # of the balance loss (Switch, sec. 2.2)
    router_z_weight: float = 0.001  # of the router's z-loss (Zoph et al. 2022, arXiv 2202.08906, sec. 3)


class SwitchConfig(MoEConfig):
    experts_per_token: int = 1  # that a token is sent to


class MoE(Model):
    """Experts in the place of every feed-forward part."""

    Config = MoEConfig
    FFN: Slot = MixtureOfExperts

    def count_parameters(self) -> dict[str, int]:
        counts = super().count_parameters()
        return counts | {"active": counts["total"] - sum(block.ffn.inactive_parameters() for block in self.blocks)}


class SwitchTransformer(MoE):
    """One expert for each token."""

    Config = SwitchConfig
    FFN = Switch


RECIPE = phase3.RECIPE  # its rates are the best here too: tune/phase4_nano.json, phase4_small.json
RECIPES: dict[str, Recipe] = {
    "checkpoint": replace(RECIPE, checkpoint="block"),  # Chen et al. 2016, arXiv 1604.06174
}
BRANCHES: dict[str, type[Model]] = {
    "tied": leaf(Head=TiedHead),  # Press & Wolf 2017, arXiv 1608.05859
    "window": leaf(Config=WindowConfig, Mixer=FusedWindow),  # Beltagy et al. 2020, arXiv 2004.05150; Mistral
    "moe": MoE,  # GLaM: Du et al. 2021, arXiv 2112.06905; Mixtral
    "switch": SwitchTransformer,  # Fedus et al. 2021, arXiv 2101.03961
}

mt.main(__name__)
