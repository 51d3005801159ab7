"""Phase 6, 2023-2025: the speed run. What reaches a loss soonest, after modded-nanogpt (Jordan et al. 2024).

The trunk is Llama with the KEPT ones of IDEAS in the model and the CHOSEN ones of TECHNIQUES in the training. In the
ablation `without_X` is the trunk minus X, `with_X` the trunk plus what is not in it, and `alone_X` phase 5 plus X,
where a model's idea is trained by the recipe `phase_5`, and a technique trains the branch `phase_5`.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx

import mlx_transformer as mt
from mlx_transformer.nn import init
from mlx_transformer.nn.attention import ValueEmbedding
from mlx_transformer.nn.block import MixedInputBlock
from mlx_transformer.nn.feedforward import ReLUSquaredFeedForward
from mlx_transformer.nn.head import CappedHead
from mlx_transformer.nn.model import Slot
from mlx_transformer.train.optim.groups import AdamW, Group, Paths, Vectors
from mlx_transformer.train.optim.muon import Muon
from mlx_transformer.train.optim.schedules import WSD, BatchWarmup
from mlx_transformer.train.recipe import BySize, Recipe
from mlx_transformer.utils.errors import BadInput
from phases import phase5

NAME = "speed_run"


class Config(phase5.Config):
    """The numbers of phase 5."""


class Valued(ValueEmbedding, phase5.Attention):
    """Llama's attention with a table of values."""


class Model(phase5.Model):
    """Llama, made for speed."""

    Config = Config
    Mixer: Slot = Valued
    FFN: Slot = ReLUSquaredFeedForward

    def init_weight(self, path: str, value: mx.array, key: mx.array) -> mx.array:
        if path.endswith(("o_proj.weight", "down_proj.weight", "head.weight")):
            return init.zeros(value, key)  # Zhang et al. 2019, arXiv 1901.09321; Yang et al. 2022, arXiv 2203.03466
        return super().init_weight(path, value, key)


class CappedConfig(Config):
    softcap: float = 15.0  # the bound on the logits

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.softcap > 0:
            raise BadInput(f"softcap = {self.softcap}: expected a number above 0")


Normed = phase5.Qwen3Attention


class NormedValued(ValueEmbedding, Normed):
    """Normed queries and keys, and a table of values."""


def leaf(**slots: Slot) -> type[Model]:
    """A branch: the trunk with these slots filled otherwise."""
    return type("Leaf", (Model,), slots)


LLAMA: dict[str, Slot] = {name: getattr(phase5.Model, name) for name in ("Mixer", "FFN", "init_weight")}
IDEAS: dict[str, tuple[dict[str, Slot], dict[str, Slot]]] = {  # the slots of the idea alone; of the trunk turned round
    "value_embeddings": ({"Mixer": Model.Mixer}, {"Mixer": phase5.Attention}),  # Zhou et al. 2024, arXiv 2410.17897
    "relu_squared": ({"FFN": Model.FFN}, {"FFN": phase5.FFN}),  # So et al. 2021, arXiv 2109.08668
    "zero_init": ({"init_weight": Model.init_weight}, {"init_weight": phase5.Model.init_weight}),
    "qk_norm": ({"Mixer": Normed}, {"Mixer": NormedValued}),  # Henry et al. 2020, arXiv 2010.04245
    "lambdas": ({"Block": MixedInputBlock},) * 2,  # modded-nanogpt, 2024
    "softcap": ({"Config": CappedConfig, "Head": CappedHead},) * 2,  # Gemma 2, arXiv 2408.00118
}
KEPT = ("value_embeddings", "relu_squared", "zero_init")  # the others cost more time than they save: RESULTS.md

_ADAM = AdamW(betas=(0.8, 0.95), eps=1e-10)  # of modded-nanogpt, Nov 2024, as are the rates but for the head's

TECHNIQUES: dict[str, dict[str, Any]] = {
    "muon": {  # Jordan et al. 2024; decoupled decay as in Liu et al. 2025, arXiv 2502.16982
        "learning_rate": BySize(nano=0.04, small=0.04, base=0.02),  # tune/phase6_*.json; base: modded-nanogpt's
        "groups": (
            Group(name="matrices", select=Paths(r".*_proj\.weight"), optimizer=Muon()),
            Group(
                name="embeddings",
                select=Paths(r"(.*\.)?(value_)?embedding\.weight"),
                optimizer=_ADAM,
                lr_multiplier=15.0,
            ),
            Group(name="head", select=Paths(r"head\.weight"), optimizer=_ADAM, lr_multiplier=0.4),
            Group(name="vectors", select=Vectors(), optimizer=_ADAM),
        ),
    },
    "short": {  # a straight decay over 70 % of a short run
        "schedule": WSD(
            warmup_tokens=0,
            decay_tokens=BySize(nano=280_000, small=700_000, base=2_800_000),
            total_tokens=BySize(nano=400_000, small=1_000_000, base=4_000_000),
        ),
    },
    "batch_warmup": {  # Smith et al. 2018, arXiv 1711.00489
        "batch_warmup": BatchWarmup(tokens=BySize(nano=30_000, small=150_000, base=600_000), doublings=2),
    },
}
CHOSEN = ("muon", "short")

RECIPE = replace(phase5.RECIPE, **{field: value for name in CHOSEN for field, value in TECHNIQUES[name].items()})
RECIPES: dict[str, Recipe] = {"phase_5": phase5.RECIPE}
RECIPES |= {f"alone_{name}": replace(phase5.RECIPE, **fields) for name, fields in TECHNIQUES.items()}
RECIPES |= {f"with_{name}": replace(RECIPE, **fields) for name, fields in TECHNIQUES.items() if name not in CHOSEN}
RECIPES |= {
    f"without_{name}": replace(RECIPE, **{field: getattr(phase5.RECIPE, field) for field in TECHNIQUES[name]})
    for name in CHOSEN
}
BRANCHES: dict[str, type[Model]] = {"phase_5": leaf(**LLAMA)}
BRANCHES |= {f"alone_{name}": leaf(**LLAMA | alone) for name, (alone, _) in IDEAS.items()}
BRANCHES["alternate_values"] = leaf(Mixer=(phase5.Attention, Valued))  # tables in every other layer alone
BRANCHES |= {f"{'without' if name in KEPT else 'with'}_{name}": leaf(**turned) for name, (_, turned) in IDEAS.items()}

mt.main(__name__)
