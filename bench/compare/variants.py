"""Variants: a phase, a branch, a recipe, somebody's own file, or one of them with a number changed."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from mlx_transformer.backend import cache_dir, device_info
from mlx_transformer.run.ladder import Experiment, read_variant, split_recipe
from mlx_transformer.run.own_code import record
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import atomic_write

BACKENDS = ("mlx", "torch", "torch-compile")
DEFAULT = "default"  # the phase's own RECIPE
_FLAGS = ("learning_rate", "batch_size")  # numbers of the recipe that a training command has flags for
_INCOMPARABLE = ("vocab_size", "seq_len")  # they change what the loss is measured on


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model and a recipe to train, and the backend.

    phase: that of the ladder, or the one that the own file builds on, if any. recipe: a name, or "FILE.py:NAME".
    change: a number of the configuration or the recipe, and its value. copy: counts equal variants, each run anew.
    """

    phase: int | None = None
    file: Path | None = None
    branch: str | None = None
    recipe: str = DEFAULT
    change: tuple[str, float] | None = None
    backend: str = "mlx"
    copy: int = 1

    @classmethod
    def read(cls, text: str) -> "Variant":
        """Read "2", "3/rope", "2:original", "my_idea.py/BRANCH" or "5:my_idea.py:NAME" (a recipe out of a file).

        Raises BadInput for what is not there.
        """
        try:
            experiment, branch, recipe = read_variant(text)
        except BadInput as error:
            raise BadInput(f"--phases '{text}': {error}") from None
        if experiment.find_branch(branch).parallel:
            raise BadInput(f"--phases '{text}': it translates pairs, and a comparison trains all on one text")
        if (named := split_recipe(recipe or "")) is not None:
            recipe = f"{named[0].resolve()}:{named[1]}"
        file = experiment.code.path if experiment.code else None
        return cls(phase=experiment.phase, file=file, branch=branch, recipe=recipe or DEFAULT)

    @property
    def experiment(self) -> Experiment:
        """The module that defines it, loaded once."""
        return Experiment.of_phase(self.phase) if self.file is None else _load(self.file)

    @property
    def recipe_name(self) -> str | None:
        """The recipe as a training command names it; None for the default."""
        return None if self.recipe == DEFAULT else self.recipe

    @property
    def adds_to_previous(self) -> bool:
        """Whether it is the previous phase plus one idea, `phase_<n-1>_with_X`."""
        added = f"phase_{(self.phase or 0) - 1}_with_"
        return any(name.startswith(added) for name in (self.branch or "", self.recipe))

    @property
    def base_name(self) -> str:
        """Its name without change, copy and backend: "phase 3/rope:original", "my_idea.py"."""
        place = f"phase {self.phase}" if self.file is None else self.file.name
        return f"{place}{f'/{self.branch}' if self.branch else ''}{_recipe_suffix(self.recipe)}"

    @property
    def name(self) -> str:
        """ "phase 3/rope:original (d_ff=128) #2 · torch": what differs from a phase's own model in MLX."""
        change = f" ({self.change[0]}={self.change[1]:g})" if self.change else ""
        copy = f" #{self.copy}" if self.copy > 1 else ""
        backend = f" · {self.backend}" if self.backend != "mlx" else ""
        return f"{self.base_name}{change}{copy}{backend}"

    def describe(self) -> dict[str, Any]:
        """Describe it as a row of compare.json does. code: of the own file with the model, else with the recipe."""
        code = self.experiment.code or self.experiment.find_recipe(self.recipe_name)[1]
        return {
            "name": self.name,
            "phase": self.phase,
            "code": record(code),
            "branch": self.branch,
            "recipe": _recipe_suffix(self.recipe).removeprefix(":") or DEFAULT,
            "backend": self.backend,
        }


def _recipe_suffix(recipe: str) -> str:
    named = split_recipe(recipe)
    shown = recipe if named is None else f"{named[0].name}:{named[1]}"
    return "" if recipe == DEFAULT else f":{shown}"


_load = functools.cache(Experiment.of_file)


def read_variants(texts: Sequence[str]) -> list[Variant]:
    """Read --phases: the baseline first, which is the lowest phase's own model, then the others in their order.

    Equal ones are numbered. Raises BadInput for what is not there, and for two files of one name.
    """
    variants = [Variant.read(text) for text in texts]
    files = {variant.base_name: variant.file for variant in variants}
    if clash := [variant.base_name for variant in variants if files[variant.base_name] != variant.file]:
        raise BadInput(f"--phases: two files are called {clash[0]}; rename one, since the tables name them so")
    numbered = [replace(variant, copy=1 + variants[:i].count(variant)) for i, variant in enumerate(variants)]
    baseline = min(numbered, key=_rank)
    return sorted(numbered, key=lambda variant: variant != baseline)


def _rank(variant: Variant) -> tuple[Any, ...]:
    phase = math.inf if variant.phase is None else variant.phase
    return phase, variant.file is not None, variant.branch is not None, variant.recipe != DEFAULT, variant.copy


def ablation(phase: Variant, say: Callable[[str], None]) -> list[Variant]:
    """Return the phase, each branch and each recipe; before them the previous phase, where an idea adds to it."""
    experiment, previous = phase.experiment, f"phase_{(phase.phase or 0) - 1}"
    translators = {name for name, kind in experiment.branches.items() if kind.parallel}
    ideas = [replace(phase, branch=name) for name in experiment.branches if name not in {previous, *translators}]
    recipes = [name for name in experiment.recipes if name not in {previous, *translators}]
    ideas += [replace(phase, recipe=name) for name in recipes if not _emulated(name, experiment, say)]
    if not ideas:
        raise BadInput(f"{phase.name} has no branch or recipe to ablate: give --phases with another")
    first = [Variant(phase=(phase.phase or 0) - 1)] if any(idea.adds_to_previous for idea in ideas) else []
    return [*first, phase, *(_as_previous(idea, experiment, previous) for idea in ideas)]


def _emulated(recipe: str, experiment: Experiment, say: Callable[[str], None]) -> bool:
    """Whether a recipe computes in half precision on a CPU, in software: its times would say nothing."""
    dtype = experiment.recipes[recipe].dtype
    emulated = device_info().backend == "cpu" and dtype != "float32"
    if emulated:
        say(f"left out on a CPU, which computes {dtype} in software: recipe {recipe}")
    return emulated


def _as_previous(idea: Variant, experiment: Experiment, previous: str) -> Variant:
    """Complete an idea that adds to the previous phase by that phase's recipe or branch, where this one keeps it."""
    if not idea.adds_to_previous:
        return idea
    if idea.branch is None and previous in experiment.branches:
        return replace(idea, branch=previous)
    return replace(idea, recipe=previous) if idea.recipe == DEFAULT and previous in experiment.recipes else idea


def read_vary(text: str, variant: Variant) -> tuple[str, list[float]]:
    """Read --vary, "d_ff=128,256": a number of the configuration or the recipe, and at least two values of it.

    Raises BadInput in one sentence for a name that the variant does not have, and for values that it cannot have.
    """
    name, _, values = text.partition("=")
    found = [_number(word) for word in values.split(",")]
    if not re.fullmatch(r"[a-z_][\w.]*", name) or None in found or len(set(found)) < 2:
        raise BadInput(f"--vary {text!r}: expected NAME=VALUE,VALUE,... with different numbers, such as d_ff=128,256")
    config, recipe = variant.experiment.find_branch(variant.branch).Config, _recipe_numbers(variant)
    whole = {field.name: field.type in (int, "int") for field in fields(config)}
    if name in _INCOMPARABLE:
        raise BadInput(f"--vary {name}: it changes what the loss is measured on, so that losses would not compare")
    known = [
        *(key for key in whole if key not in _INCOMPARABLE),
        *_FLAGS,
        *(key for key in recipe if key not in _FLAGS),
    ]
    if name not in known:
        raise BadInput(f"--vary {name}: expected one of {', '.join(dict.fromkeys(known))}")
    if whole.get(name, name == "batch_size") and not all(isinstance(value, int) and value > 0 for value in found):
        raise BadInput(f"--vary {text}: expected whole numbers of at least 1")
    return name, list(dict.fromkeys(value for value in found if value is not None))


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return int(word) if re.fullmatch(r"\s*\d{1,9}\s*", word) else value


def _recipe_numbers(variant: Variant) -> dict[str, Any]:
    """The numbers of the recipe by name, those of its parts as part.name; a number may still be a BySize."""
    recipe = variant.experiment.find_recipe(variant.recipe_name)[0].at("base")  # the sizes have the same names
    numbers = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    for part, value in list(numbers.items()):
        if is_dataclass(value):
            numbers |= {f"{part}.{field.name}": getattr(value, field.name) for field in fields(value)}
    return {key: value for key, value in numbers.items() if type(value) in (int, float)}


def own_value(name: str, config: Any, recipe: Recipe) -> float:
    """Return the value that a number has in a run's configuration and recipe."""
    if name == "batch_size":
        return recipe.batch_size(config.seq_len)
    if hasattr(config, name):
        return getattr(config, name)
    value: Any = recipe
    for part in name.split("."):
        value = getattr(value, part)
    return value


def settings_of(change: tuple[str, float], variant: Variant) -> dict[str, Any]:
    """Return the settings of a training command for a change of a variant.

    A number of the recipe without a flag needs a recipe file, which is written to the cache folder.
    """
    name, value = change
    config = variant.experiment.find_branch(variant.branch).Config
    if name in (*_FLAGS, *(field.name for field in fields(config))):
        return {name: value}
    part, _, number = name.partition(".")
    changed = f"{part}=replace(recipe.{part}, {number}={value!r})" if number else f"{name}={value!r}"
    return {"recipe": write_recipe(variant, changed, f"{name}={value!r}")}


def write_recipe(variant: Variant, changed: str, name: str) -> str:
    """Write a file with the variant's recipe changed, such as by "clip=None", to the cache; returns "FILE.py:CHANGED".

    name: of the change, for the file's name.
    """
    place = variant.phase if variant.file is None else variant.file
    text = f"{place}{'' if variant.recipe == DEFAULT else f':{variant.recipe}'}"
    source = (
        "from dataclasses import replace\n\nfrom mlx_transformer.run.ladder import read_variant\n\n"
        f"experiment, _, name = read_variant({text!r})\n"
        f"recipe = experiment.find_recipe(name)[0]\nCHANGED = replace(\n    recipe,\n    {changed},\n)\n"
    )
    folder = cache_dir() / "recipes"
    folder.mkdir(exist_ok=True)
    path = folder / (re.sub(r"[^\w.=-]+", "_", f"{text}_{name}") + ".py")
    atomic_write(path, source)
    return f"{path}:CHANGED"
