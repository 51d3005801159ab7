"""Recipes of phase 2: each training idea added to phase 1, removed from phase 2 or added to it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlx_transformer.train import BySize, Recipe, optim
from phases.ablations import take

# fmt: off
BUDGET         = BySize(nano=2_000_000, small=5_000_000, base=20_000_000)  # of a comparison: bench.compare's default
TOTAL_TOKENS   = BySize(nano=1_200_000, small=3_000_000, base=12_000_000)  # of the cosine, as of phase 2's schedule
CYCLE_TOKENS   = BySize(nano=  200_000, small=  500_000, base= 2_000_000)  # of the first cosine before a restart
AVERAGE_TOKENS = BySize(nano=   40_000, small=  100_000, base=   400_000)  # the horizon of the averaged weights
AVERAGE_EVERY  = BySize(nano=    8_000, small=   20_000, base=   80_000)  # between two of the 5 averaged snapshots
RAMP_TOKENS    = BySize(nano=  200_000, small=  500_000, base= 2_000_000)  # until the batch has its full size
# fmt: on


def _with_decay(recipe: Recipe, name: str, weight_decay: float) -> Recipe:
    """Give one optimizer group another weight decay."""

    def changed(group: optim.Group) -> optim.Group:
        return replace(group, optimizer=replace(group.optimizer, weight_decay=weight_decay))

    return replace(recipe, groups=tuple(changed(group) if group.name == name else group for group in recipe.groups))


def _strong_decay(recipe: Recipe, source: Recipe) -> Recipe:
    matrices = next(group for group in source.groups if group.name == "matrices")
    return _with_decay(recipe, "matrices", matrices.optimizer.weight_decay)


def _small_batch(recipe: Recipe, source: Recipe) -> Recipe:
    """Take the batch, and the learning rates that were tuned with it."""
    rates = {group.name: group.lr_multiplier for group in source.groups}
    return take(recipe, source, "batch_tokens").with_rates(source.learning_rate, **rates)


def _one_rate(recipe: Recipe) -> Recipe:
    return recipe.with_rates(recipe.learning_rate, **{group.name: 1.0 for group in recipe.groups})


def _accumulate(recipe: Recipe) -> Recipe:
    doubled = BySize(**{size: 2 * tokens for size, tokens in vars(recipe.batch_tokens).items()})
    return replace(recipe, accumulate=2, batch_tokens=doubled)


def _set(**fields: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, **fields)


# How an idea of phase 2 is taken from one recipe (the second argument) into another one (the first).
CHOSEN: dict[str, Callable[[Recipe, Recipe], Recipe]] = {
    "small_batch": _small_batch,
    "linear": lambda recipe, source: take(recipe, source, "schedule"),
    "strong_decay": _strong_decay,
    "no_dropout": lambda recipe, source: take(recipe, source, "dropout"),
}
# Ideas that phase 2 leaves out. The warm-up of a schedule is set by `recipes`.
OTHERS: dict[str, Callable[[Recipe], Recipe]] = {
    "one_rate": _one_rate,  # as in 2017: embedding, head and matrices alike
    "accumulate": _accumulate,
    # Loshchilov & Hutter 2017, arXiv 1608.03983
    "cosine": _set(schedule=optim.Cosine(warmup_tokens=0, total_tokens=TOTAL_TOKENS)),
    "restarts": _set(schedule=optim.CosineRestarts(warmup_tokens=0, cycle_tokens=CYCLE_TOKENS, growth=2)),
    "constant": _set(schedule=optim.Constant(warmup_tokens=0)),
    "decay_everywhere": lambda recipe: _with_decay(recipe, "vectors", 0.01),
    "value_clip": _set(clip=optim.ByValue(max_value=0.01)),
    "agc": _set(clip=optim.AGC(ratio=0.1)),  # Brock et al. 2021, arXiv 2102.06171
    "zclip": _set(clip=optim.ZClip()),  # Kumar et al. 2025, arXiv 2504.02507
    "label_smoothing": _set(label_smoothing=0.1),  # Szegedy et al. 2016, arXiv 1512.00567, sec. 7
    "ema": _set(average=optim.EMA(horizon_tokens=AVERAGE_TOKENS)),  # Polyak & Juditsky 1992
    # Vaswani et al. 2017, sec. 6.1
    "checkpoint_average": _set(average=optim.CheckpointAverage(last=5, every_tokens=AVERAGE_EVERY)),
    # Smith et al. 2018, arXiv 1711.00489
    "batch_warmup": _set(batch_warmup=optim.BatchWarmup(tokens=RAMP_TOKENS, doublings=2)),
}


def recipes(recipe: Recipe, previous: Recipe) -> dict[str, Recipe]:
    """Return the named recipes of phase 2. Ablations warm up over as many steps as phase 1, whatever their batch."""

    def warmed_up(changed: Recipe) -> Recipe:
        batch, before = vars(changed.batch_tokens), vars(previous.batch_tokens)
        tokens = vars(previous.schedule.warmup_tokens)
        warmup = BySize(**{size: round(tokens[size] * batch[size] / before[size]) for size in tokens})
        return replace(changed, schedule=replace(changed.schedule, warmup_tokens=warmup))

    # The configuration of the project before this one: two accumulated batches of 256 x 128 at base. Its learning rate
    # and its warm-up are not known: those of phase 1 stand in.
    cosine = optim.Cosine(warmup_tokens=previous.schedule.warmup_tokens, total_tokens=BUDGET)
    found = {
        "original": replace(_accumulate(previous), label_smoothing=0.1, schedule=cosine),
        "fp16": replace(recipe, dtype="float16"),  # Micikevicius et al. 2018, arXiv 1710.03740
        "bf16": replace(recipe, dtype="bfloat16"),
    }
    found |= {f"phase_1_with_{name}": warmed_up(change(previous, recipe)) for name, change in CHOSEN.items()}
    found |= {f"phase_1_with_{name}": warmed_up(add(previous)) for name, add in OTHERS.items()}
    found |= {f"with_{name}": warmed_up(add(recipe)) for name, add in OTHERS.items()}
    found |= {f"without_{name}": warmed_up(change(recipe, previous)) for name, change in CHOSEN.items()}
    return found
