"""Experiments: a phase of the ladder, found by its number, or a Python file of one's own with the same names."""

import importlib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_transformer.nn import config
from mlx_transformer.nn.model import Model
from mlx_transformer.run.own_code import ROOT, Code, code_of, is_own, load_code
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.utils.errors import BadInput

PHASES = ROOT / "phases"  # beside the package mlx_transformer, in a checkout and in site-packages


@dataclass(frozen=True, eq=False)
class Experiment:
    """The definitions of a module that is trained: Model, RECIPE, RECIPES, BRANCHES, NAME.

    phase: its number; for a file of one's own that of the phase that it builds on, or None.
    code: the file of one's own with the files that it imports; None for a phase.
    """

    module: ModuleType
    phase: int | None
    code: Code | None
    name: str
    command: str  # how a person starts it: "python -m phases.phase3", "python my_idea.py"
    model: type[Model]
    recipe: Recipe
    recipes: dict[str, Recipe]
    branches: dict[str, type[Model]]

    @classmethod
    def of_phase(cls, phase: object) -> "Experiment":
        """Return the phase with this number. Raises BadInput for an unknown one."""
        return cls.of_module(find_phase(phase))

    @classmethod
    def of_file(cls, path: str | Path) -> "Experiment":
        """Run a Python file and return its experiment. Raises BadInput where it defines nothing to train."""
        path = Path(path)
        if (number := _number_of(str(path))) is not None:
            return cls.of_phase(number)
        module, code = _load_code(path)
        return _from_code(module, code)

    @classmethod
    def of_module(cls, module: ModuleType) -> "Experiment":
        """Return the experiment of a module, such as `__main__`. Raises BadInput where it defines nothing to train."""
        number = _number_of(getattr(module, "__file__", None))
        if number is None:
            return _from_code(module, code_of(module))
        sys.modules.setdefault(f"phases.phase{number}", module)  # a phase that runs as `__main__` is not imported again
        return cls(
            module=module,
            phase=number,
            code=None,
            name=module.NAME,
            command=f"python -m phases.phase{number}",
            model=module.Model,
            recipe=module.RECIPE,
            recipes=module.RECIPES,
            branches=module.BRANCHES,
        )

    def __str__(self) -> str:
        return f"phase {self.phase}" if self.code is None else self.code.path.name

    def find_branch(self, branch: object) -> type[Model]:
        """Return its model, or the model of a branch. Raises BadInput for an unknown one."""
        if branch is None:
            return self.model
        if not isinstance(branch, str) or branch not in self.branches:
            raise BadInput(f"branch '{branch}' is unknown in {self}: it has {_listed(self.branches)}")
        return self.branches[branch]

    def find_recipe(self, name: str | None, branch: str | None = None) -> tuple[Recipe, Code | None]:
        """Return its recipe, or a named one; "FILE.py:NAME" runs a file and returns the recipe with the file.

        A branch with a recipe of its own name is trained by that one unless another is named. Raises BadInput for an
        unknown one.
        """
        if name is None:
            return self.recipes.get(branch or "", self.recipe), None
        if name in self.recipes:
            return self.recipes[name], None
        if (named := split_recipe(name)) is not None:
            module, code = _load_code(named[0])
            return recipe_of(module, named[1]), code
        if self.code is not None:
            return recipe_of(self.module, name), None
        known = ", ".join(sorted(self.recipes)) or "none besides its own"
        raise BadInput(f"recipe '{name}' is unknown in {self}: it has {known}")


def find_phase(phase: object) -> ModuleType:
    """Import phases.phase<n> of this project by its file, so that another `phases` on sys.path does not matter.

    Raises BadInput for an unknown number, and where another module `phases` is imported already.
    """
    numbers = (_number_of(str(path)) for path in PHASES.glob("phase*.py"))
    present = sorted(number for number in numbers if number is not None)
    if not present:
        raise BadInput(
            f"'{PHASES}' holds no phase of mlx-transformer: another package 'phases' has taken its place; "
            "install mlx-transformer again, in an environment without that package"
        )
    if isinstance(phase, bool) or not isinstance(phase, int) or phase not in present:
        raise BadInput(f"phase {phase!r} is unknown: present are {', '.join(map(str, present))}")
    _import_phases()
    return importlib.import_module(f"phases.phase{phase}")


def _import_phases() -> None:
    """Put our package `phases` into sys.modules. Raises BadInput where another module has its name.

    Its __init__.py is not run: it only prepares the runtime, and may be that of another package installed over ours.
    """
    file = PHASES / "__init__.py"
    if (other := sys.modules.get("phases")) is not None:
        place = getattr(other, "__file__", None) or next(iter(getattr(other, "__path__", ["?"])))
        if Path(place).resolve() not in (file, PHASES):
            raise BadInput(f"another module 'phases' is imported already, from '{place}': expected '{file}'")
        return
    spec = importlib.util.spec_from_file_location("phases", file, submodule_search_locations=[str(PHASES)])
    assert spec is not None
    sys.modules["phases"] = importlib.util.module_from_spec(spec)


def _load_code(path: Path) -> tuple[ModuleType, Code]:
    """Run a Python file, which finds our package `phases` even if another one lies beside it."""
    _import_phases()
    return load_code(path)


def find_branch(module: ModuleType, branch: object) -> type[Model]:
    """Return a module's Model, or the model of a branch. Raises BadInput for an unknown branch."""
    return Experiment.of_module(module).find_branch(branch)


def find_experiment(kind: type[Model]) -> tuple[Experiment, str | None]:
    """Find the experiment that defines a model's class, and the branch; None: the class is its Model.

    Raises BadInput for a class that no file defines as Model or in BRANCHES.
    """
    numbers = (_number_of(str(path)) for path in sorted(PHASES.glob("phase*.py")))
    own = [module for name, module in sys.modules.items() if name in (kind.__module__, "__main__") or is_own(name)]
    for module in (*(find_phase(number) for number in numbers if number is not None), *own):
        named = {None: getattr(module, "Model", None), **getattr(module, "BRANCHES", {})}
        for branch, known in named.items():
            if known is kind:
                return Experiment.of_module(module), branch
    raise BadInput(
        f"class {kind.__name__} of {kind.__module__} cannot be found again by load: "
        "expected a Python file that defines it as Model or in BRANCHES"
    )


def read_variant(text: str) -> tuple[Experiment, str | None, str | None]:
    """Read what a command line names: the experiment, a branch or None, a recipe or None for its own.

    "3", "3/rope", "2:original", "5:my_idea.py:NAME" (a recipe from a file), "my_idea.py", "my_idea.py/BRANCH:RECIPE".
    Runs the files. Raises BadInput for what is not there.
    """
    found = re.fullmatch(r"([0-9]{1,9}|.+?\.py)(?:/([^:]+))?(?::(.+))?", text, re.DOTALL)
    if found is None:
        raise BadInput(f"'{text}' is no phase and no file: expected 2, 3/BRANCH, 2:RECIPE, my_idea.py or the like")
    place, branch, recipe = found.groups()
    experiment = Experiment.of_phase(int(place)) if place.isdigit() else Experiment.of_file(place)
    experiment.find_branch(branch)
    experiment.find_recipe(recipe)
    return experiment, branch, recipe


def split_recipe(text: str) -> tuple[Path, str] | None:
    """Split "ideas/mine.py:fast" into file and name; None for a name alone."""
    found = re.fullmatch(r"(.+\.py):(.+)", text, re.DOTALL)
    return (Path(found[1]), found[2]) if found else None


def recipe_of(module: ModuleType, name: str) -> Recipe:
    """Return RECIPES[name] of a module, or its Recipe of that name. Raises BadInput for an unknown one."""
    recipes = getattr(module, "RECIPES", {})
    found = recipes.get(name, getattr(module, name, None))
    if not isinstance(found, Recipe):
        known = {*recipes, *(key for key, value in vars(module).items() if isinstance(value, Recipe))}
        raise BadInput(f"recipe '{name}' is unknown in '{module.__file__}': it has {_listed(known)}")
    return found


def _from_code(module: ModuleType, code: Code) -> Experiment:
    """Return the experiment of a file of one's own; the phase that it builds on supplies what it does not define."""
    own = vars(module)
    kind, numbers = own.get("Model"), own.get("Config")
    for name, value, parent in (("Model", kind, Model), ("Config", numbers, config.Config)):
        if value is not None and not (isinstance(value, type) and issubclass(value, parent)):
            raise BadInput(f"{name} in '{code.path}' is {value!r}: expected a subclass of {parent.__module__}.{name}")
    phase = _phase_below(module)
    base = None if phase is None else find_phase(phase)
    if kind is None:
        if base is None:
            raise BadInput(f"'{code.path}' has no Model: expected a class Model, or an import of a phase to build on")
        kind = base.Model
    if numbers is not None and not issubclass(kind.Config, numbers):
        if kind.__module__ == module.__name__:
            kind.Config = numbers  # inherited by its branches
        else:
            kind = type("Model", (kind,), {"Config": numbers, "__module__": module.__name__, "__doc__": kind.__doc__})
            own["Model"] = kind  # the same class on the next call
    recipe = own.get("RECIPE", getattr(base, "RECIPE", None))
    if not isinstance(recipe, Recipe):
        raise BadInput(f"'{code.path}' has no RECIPE, and builds on no phase that has one: expected a Recipe")
    inherited = base.BRANCHES if base is not None and kind is base.Model else {}
    branches, recipes = own.get("BRANCHES", inherited), {**getattr(base, "RECIPES", {}), **own.get("RECIPES", {})}
    if bad := [name for name, one in branches.items() if not (isinstance(one, type) and issubclass(one, Model))]:
        raise BadInput(f"BRANCHES['{bad[0]}'] in '{code.path}' is no subclass of {Model.__module__}.Model")
    if bad := [name for name, one in recipes.items() if not isinstance(one, Recipe)]:
        raise BadInput(f"RECIPES['{bad[0]}'] in '{code.path}' is no Recipe")
    return Experiment(
        module=module,
        phase=phase,
        code=code,
        name=own.get("NAME", code.path.stem),
        command=f"python {shlex.quote(_shown(code.path))}",
        model=kind,
        recipe=recipe,
        recipes=recipes,
        branches=branches,
    )


def _phase_below(module: ModuleType) -> int | None:
    """Return the number of the phase that a module's Model derives from, else of the newest phase that it imports."""
    kind = vars(module).get("Model")
    if isinstance(kind, type):
        numbers = (_number_of_class(ancestor) for ancestor in kind.__mro__)
        return next((number for number in numbers if number is not None), None)
    return max(_imported_phases(module), default=None)


def _imported_phases(module: ModuleType) -> Iterator[int]:
    for value in vars(module).values():
        kinds = value.__mro__ if isinstance(value, type) else ()
        numbers = [_number_of(getattr(value, "__file__", None))] if isinstance(value, ModuleType) else []
        for number in (*numbers, *map(_number_of_class, kinds)):
            if number is not None:
                yield number


def _number_of_class(kind: type) -> int | None:
    return _number_of(getattr(sys.modules.get(kind.__module__), "__file__", None))


def _number_of(file: Any) -> int | None:
    """Return the number of the phase that a file defines, or None."""
    if not isinstance(file, str):
        return None
    path = Path(file).resolve()
    found = re.fullmatch(r"phase(\d+)\.py", path.name)
    return int(found[1]) if found and path.parent == PHASES else None


def _shown(path: Path) -> str:
    """Return a path relative to the working folder if it is inside."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
