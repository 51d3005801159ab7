"""Phase 2, 2016-2019: the same model, trained better: smaller batches, a straight decay, no dropout.

Every training idea of those years is a value of the Recipe, whichever phase trains. `TECHNIQUES` lists those that are
judged here: `with_X` among the recipes is phase 1's plus X, `without_X` this phase's minus X (where it has X), and
X by itself this phase's plus X (where it has not).
"""

from dataclasses import replace
from typing import Any

from mlx_transformer.optim.average import EMA
from mlx_transformer.optim.clip import AGC, ByValue, ZClip
from mlx_transformer.optim.groups import Group
from mlx_transformer.optim.schedules import BatchWarmup, Constant, Cosine, CosineRestarts, Linear
from mlx_transformer.recipe import BySize, Recipe
from phases import phase1

NAME = "training_improvements"


class Config(phase1.Config):
    """The numbers of phase 1."""


class Model(phase1.Model):
    """The Transformer decoder of 2017, unchanged."""

    Config = Config


_BUDGET = BySize(nano=2_000_000, small=5_000_000, base=20_000_000)  # tokens of the bench
_MATRICES, _VECTORS = phase1.RECIPE.groups


def _decayed(group: Group, weight_decay: float) -> Group:
    return replace(group, optimizer=replace(group.optimizer, weight_decay=weight_decay))


def _tokens(of: BySize, share: float) -> BySize:
    return BySize(**{size: round(share * tokens) for size, tokens in vars(of).items()})


def _trained(recipe: Recipe, fields: dict[str, Any]) -> Recipe:
    """The recipe with some fields replaced; it warms up over as many steps as phase 1, whatever its batch."""
    recipe, first = replace(recipe, **fields), phase1.RECIPE
    now, then = vars(recipe.batch_tokens), vars(first.batch_tokens)
    warmup = {
        size: round(tokens * now[size] / then[size]) for size, tokens in vars(first.schedule.warmup_tokens).items()
    }
    return replace(recipe, schedule=replace(recipe.schedule, warmup_tokens=BySize(**warmup)))


TECHNIQUES: dict[str, dict[str, Any]] = {
    "small_batch": {
        "batch_tokens": BySize(nano=1_024, small=2_048, base=8_192),
        "learning_rate": BySize(nano=6e-3, small=3e-3, base=1.5e-3),  # nano: tune/phase2_nano.json
    },
    "linear": {"schedule": Linear(warmup_tokens=0, total_tokens=_tokens(_BUDGET, 0.5))},
    "no_dropout": {"dropout": 0.0},
    "cosine": {"schedule": Cosine(warmup_tokens=0, total_tokens=_tokens(_BUDGET, 0.5))},
    "restarts": {"schedule": CosineRestarts(warmup_tokens=0, cycle_tokens=_tokens(_BUDGET, 0.1), growth=2)},
    "constant": {"schedule": Constant(warmup_tokens=0)},
    "no_decay": {"groups": (_decayed(_MATRICES, 0.0), _VECTORS)},
    "strong_decay": {"groups": (_decayed(_MATRICES, 0.1), _VECTORS)},
    "decay_everywhere": {"groups": (_MATRICES, _decayed(_VECTORS, _MATRICES.optimizer.weight_decay))},
    "value_clip": {"clip": ByValue(max_value=0.01)},
    "agc": {"clip": AGC(ratio=0.1)},
    "zclip": {"clip": ZClip()},
    "label_smoothing": {"label_smoothing": 0.1},
    "ema": {"average": EMA(horizon_tokens=_tokens(_BUDGET, 0.02))},
    "batch_warmup": {"batch_warmup": BatchWarmup(tokens=_tokens(_BUDGET, 0.1), doublings=2)},
}
CHOSEN = ("small_batch", "linear", "no_dropout")

RECIPE = _trained(phase1.RECIPE, {field: value for name in CHOSEN for field, value in TECHNIQUES[name].items()})


def _accumulated(recipe: Recipe) -> Recipe:
    """Two batches to a step, one after the other."""
    return replace(recipe, accumulate=2, batch_tokens=_tokens(recipe.batch_tokens, 2))


RECIPES: dict[str, Recipe] = {
    # All that the project before this one switched on at once: two batches of 256 x 128 to a step (at base; smaller
    # sizes as phase 1's batch is smaller there), at phase 1's rate and warm-up, since its own are not known.
    "original": replace(
        _accumulated(phase1.RECIPE),
        label_smoothing=0.1,
        schedule=Cosine(warmup_tokens=phase1.RECIPE.schedule.warmup_tokens, total_tokens=_BUDGET),
    ),
    "accumulate": _accumulated(RECIPE),
    "with_accumulate": _accumulated(phase1.RECIPE),
    "fp16": replace(RECIPE, dtype="float16"),
    "bf16": replace(RECIPE, dtype="bfloat16"),
}
RECIPES |= {f"with_{name}": _trained(phase1.RECIPE, fields) for name, fields in TECHNIQUES.items()}
RECIPES |= {name: _trained(RECIPE, fields) for name, fields in TECHNIQUES.items() if name not in CHOSEN}
RECIPES |= {
    f"without_{name}": _trained(RECIPE, {field: getattr(phase1.RECIPE, field) for field in TECHNIQUES[name]})
    for name in CHOSEN
}
BRANCHES: dict[str, type[Model]] = {}

if __name__ == "__main__":
    from mlx_transformer.run import main

    main(2)
