"""Phase 2, 2016-2019: the same model, trained better: more steps, a rate for each layer, a strong decay of weights.

Every training idea of those years is a value of the Recipe, whichever phase trains. `TECHNIQUES` lists those that are
judged here: `alone_X` among the recipes is phase 1's plus X, `without_X` this phase's minus X (where it has X), and
`with_X` this phase's plus X (where it has not).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

import mlx_transformer as mt
from mlx_transformer.train.optim.average import EMA
from mlx_transformer.train.optim.clip import AGC, ByValue, ZClip
from mlx_transformer.train.optim.groups import Group, Matrices, Paths
from mlx_transformer.train.optim.schedules import BatchWarmup, Constant, Cosine, CosineRestarts, Linear
from mlx_transformer.train.recipe import BySize, Recipe
from phases import phase1

NAME = "training_improvements"


class Config(phase1.Config):
    """The numbers of phase 1."""


class Model(phase1.Model):
    """The Transformer decoder of 2017, unchanged."""

    Config = Config


_BUDGET = BySize(nano=2_000_000, small=5_000_000, base=20_000_000)  # tokens of the bench
_HEAD = Paths(r"head\.weight")
_TABLES = Paths(r"(embedding|position)\.weight|.*\.relative_(keys|values)")  # of pieces, positions and distances


@dataclass(frozen=True)
class Inner(Matrices):
    """Every matrix between the tables at the input and the head."""

    def __call__(self, path: str, parameter: mx.array) -> bool:
        return super().__call__(path, parameter) and not (_TABLES(path, parameter) or _HEAD(path, parameter))


def _tokens(of: BySize, share: float) -> BySize:
    return BySize(**{size: round(share * tokens) for size, tokens in vars(of).items()})


Technique = Callable[[Recipe], Recipe]


def _setting(**fields: Any) -> Technique:
    return lambda recipe: replace(recipe, **fields)


def _decaying(weight_decay: float, name: str) -> Technique:
    """Another decay of the group with this name."""

    def decayed(group: Group) -> Group:
        return replace(group, optimizer=replace(group.optimizer, weight_decay=weight_decay))

    return lambda recipe: replace(
        recipe, groups=tuple(decayed(group) if group.name == name else group for group in recipe.groups)
    )


def _layer_rates(recipe: Recipe) -> Recipe:
    """A rate for each kind of layer (Howard & Ruder 2018, arXiv 1801.06146, sec. 3.2), the decay of ends as before."""
    (first, _), (matrices, vectors) = phase1.RECIPE.groups, recipe.groups
    embedding = replace(first, name="embedding", select=_TABLES, lr_multiplier=3.0)
    head = replace(first, name="head", select=_HEAD, lr_multiplier=12.0, optional=True)
    return replace(
        recipe, groups=(replace(matrices, select=Inner()), embedding, head, replace(vectors, lr_multiplier=3.0))
    )


def _accumulated(recipe: Recipe) -> Recipe:
    """Two batches to a step, one after the other."""
    return replace(recipe, accumulate=2, batch_tokens=_tokens(recipe.batch_tokens, 2))


TECHNIQUES: dict[str, Technique] = {
    "small_batch": _setting(
        batch_tokens=BySize(nano=1_024, small=2_048, base=8_192),
        learning_rate=BySize(nano=4e-3, small=3e-3, base=1.5e-3),  # tune/phase2_nano.json, phase2_small.json
    ),
    "layer_rates": _layer_rates,
    "linear": _setting(schedule=Linear(warmup_tokens=0, total_tokens=_tokens(_BUDGET, 0.48))),
    "no_dropout": _setting(dropout=0.0),
    "accumulate": _accumulated,
    "cosine": _setting(schedule=Cosine(warmup_tokens=0, total_tokens=_tokens(_BUDGET, 0.48))),
    "restarts": _setting(schedule=CosineRestarts(warmup_tokens=0, cycle_tokens=_tokens(_BUDGET, 0.1), growth=2)),
    "constant": _setting(schedule=Constant(warmup_tokens=0)),
    "strong_decay": _decaying(0.5, "matrices"),
    "decay_everywhere": _decaying(0.01, "vectors"),
    "value_clip": _setting(clip=ByValue(max_value=0.01)),
    "agc": _setting(clip=AGC(ratio=0.1)),
    "zclip": _setting(clip=ZClip()),
    "label_smoothing": _setting(label_smoothing=0.1),
    "ema": _setting(average=EMA(horizon_tokens=_tokens(_BUDGET, 0.02))),
    "batch_warmup": _setting(batch_warmup=BatchWarmup(tokens=_tokens(_BUDGET, 0.1), doublings=2)),
}
CHOSEN = ("small_batch", "layer_rates", "strong_decay", "linear", "no_dropout")


def _by(names: Iterable[str]) -> Recipe:
    """Phase 1's recipe with these techniques; it warms up over as many steps, whatever its batch."""
    first = recipe = phase1.RECIPE
    for name in names:
        recipe = TECHNIQUES[name](recipe)
    now, then = vars(recipe.batch_tokens), vars(first.batch_tokens)
    warmup = {
        size: round(tokens * now[size] / then[size]) for size, tokens in vars(first.schedule.warmup_tokens).items()
    }
    return replace(recipe, schedule=replace(recipe.schedule, warmup_tokens=BySize(**warmup)))


RECIPE = _by(CHOSEN)
RECIPES: dict[str, Recipe] = {
    # All that the project before this one switched on at once: two batches of 256 x 128 to a step (at base; smaller
    # sizes as phase 1's batch is smaller there), at phase 1's rate and warm-up, since its own are not known.
    "original": replace(
        _accumulated(phase1.RECIPE),
        label_smoothing=0.1,
        schedule=Cosine(warmup_tokens=phase1.RECIPE.schedule.warmup_tokens, total_tokens=_BUDGET),
    ),
    "fp16": replace(RECIPE, dtype="float16"),
    "bf16": replace(RECIPE, dtype="bfloat16"),
}
RECIPES |= {f"alone_{name}": _by([name]) for name in TECHNIQUES}
RECIPES |= {f"with_{name}": _by([*CHOSEN, name]) for name in TECHNIQUES if name not in CHOSEN}
RECIPES |= {f"without_{name}": _by(other for other in CHOSEN if other != name) for name in CHOSEN}
BRANCHES: dict[str, type[Model]] = {}

mt.main(__name__)
