"""Variants whose schedule ends with the budget of a run: a recipe file in the cache folder, as for `--vary`."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from bench.compare.variants import Variant, write_recipe
from mlx_transformer.train import optim
from mlx_transformer.train.optim.schedules import Schedule
from mlx_transformer.utils.errors import BadInput


def ending_at(variant: Variant, size: str, tokens: int, decay: float | None = None) -> Variant:
    """Return the variant with its schedule stretched to end after so many tokens, and no early stopping.

    Warm-up and decay keep their shares of the schedule, and dynamic sparsity its share of the steps; decay: the share
    of the last tokens over which the learning rate decays instead. A schedule without an end stays as it is. Raises
    BadInput for a share of the decay that the schedule does not have.
    """
    recipe = variant.experiment.find_recipe(variant.recipe_name)[0].at(size)
    changes = list(_schedule(recipe.schedule, tokens, decay))
    if decay is not None and not any(one.startswith("decay_tokens") for one in changes):
        raise BadInput(f"--phases {variant.name}: expected a recipe with a decay at its end, such as that of phase 6")
    parts = [f"schedule=replace(recipe.schedule, {', '.join(changes)})"] if changes else []
    if isinstance(recipe.stop, optim.Plateau):
        parts.append("stop=replace(recipe.stop, patience=1_000_000)")
    if any(isinstance(group.optimizer, optim.RigL) for group in recipe.groups) and changes:
        parts.append(f"groups={_GROUPS.format(_factor(recipe.schedule, tokens), size)}")
    name = f"{size} {tokens}" + ("" if decay is None else f" {decay:g}")
    return replace(variant, recipe=write_recipe(variant, ",\n    ".join(parts), name))


# The numbers of steps of dynamic sparsity, by a factor.
_GROUPS = (
    "tuple(replace(one, optimizer=replace(one.optimizer, until=round({0!r} * one.optimizer.until)))"
    " if hasattr(one.optimizer, 'until') else one for one in recipe.at({1!r}).groups)"
)


def _factor(schedule: Schedule, tokens: int) -> float:
    return tokens / getattr(schedule, "total_tokens", tokens)


def _schedule(schedule: Schedule, tokens: int, decay: float | None) -> Iterator[str]:
    """Yield the changed horizons of a schedule as keyword arguments; none where it has no end."""
    values: dict[str, Any] = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
    if "total_tokens" not in values:
        return
    for name, value in values.items():
        if name == "decay_tokens" and decay is not None:
            yield f"{name}={round(decay * tokens)}"
        elif name.endswith("_tokens"):
            yield f"{name}={round(_factor(schedule, tokens) * value)}"
