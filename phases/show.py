"""Show what a phase is made of: `python -m phases.show 3/rope`; or how two models differ: `--diff 2 3`.

Takes phases, branches, recipes and somebody's own files, written as for bench.compare: 3, 3/rope, 2:original,
my_idea.py.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import tyro
from rich.table import Table
from tyro.constructors import PrimitiveConstructorSpec

from mlx_transformer import nn
from mlx_transformer.nn.config import SIZES
from mlx_transformer.run.flags import Size, Text, parse
from mlx_transformer.run.ladder import Experiment, find_phase, read_variant
from mlx_transformer.train import Recipe
from mlx_transformer.train.optim.groups import assign
from mlx_transformer.utils.errors import BadInput, exit_cleanly
from mlx_transformer.utils.terminal import Terminal
from mlx_transformer.utils.trees import by_path, flatten_settings

SLOTS = tuple(name for name in nn.Model.__annotations__ if name not in vars(nn.Model))
HOOKS = tuple(name for name, value in vars(nn.Model).items() if callable(value) and not name.startswith("_"))
_OUTSIDE = ("seq_len",)  # used by batches and decoding, whatever the model
_PIPE_WIDTH = 160  # characters, where the output is no terminal

Cells = tuple[str, ...]
Sections = dict[str, dict[str, Cells]]  # title -> row -> cells
_HEADS = {
    "slots": ("slot", "class", "from"),
    "hooks": ("hook", "from"),
    "configuration": ("field", "value", "from", "used by the model"),
    "recipe": ("field", "value", "from"),
    "parameters": ("parameter", "shape", "tensors", "size", "initialization", "optimizer group"),
}
_COMPARED = {"slots": 1, "hooks": 1, "configuration": 1, "recipe": 1, "parameters": 5}  # leading cells of a row


@dataclass(frozen=True)
class Variant:
    """A phase or somebody's own file, with a branch and a recipe of it."""

    experiment: Experiment
    branch: str | None = None
    recipe_name: str | None = None

    @classmethod
    def read(cls, text: str) -> "Variant":
        """Read "3", "3/rope", "2:original" or "my_idea.py". Raises BadInput for what is not there."""
        return cls(*read_variant(text))

    @property
    def kind(self) -> type[nn.Model]:
        """The class of the model."""
        return self.experiment.find_branch(self.branch)

    def recipe(self, size: str) -> Recipe:
        """Return the recipe for a model size."""
        return self.experiment.find_recipe(self.recipe_name, self.branch)[0].at(size)

    def __str__(self) -> str:
        branch, recipe = self.branch and f"/{self.branch}", self.recipe_name and f":{self.recipe_name}"
        return f"{self.experiment}{branch or ''}{recipe or ''}"

    def owner(self, kind: type, name: str) -> str:
        """Name what supplies an attribute of the model's class or of its Config: a phase, a file or this branch."""
        place = next(ancestor for ancestor in kind.__mro__ if name in vars(ancestor))
        if place in (nn.Model, nn.Config):
            return f"{place.__module__.rpartition('.')[2]}.py"
        model = self.experiment.model
        if place not in model.__mro__ and place not in model.Config.__mro__:
            return f"branch {self.branch}"
        if phase := re.fullmatch(r"phases\.phase(\d)", place.__module__):
            return f"phase {phase[1]}"
        return str(self.experiment) if place.__module__ == self.experiment.module.__name__ else place.__name__


def describe(variant: Variant, size: str) -> Sections:
    """Describe every slot, hook, configuration field, recipe field and parameter, for one model size."""
    config = variant.kind.Config(**SIZES[size])
    return {
        "slots": {
            name: (_names(getattr(variant.kind, name)), variant.owner(variant.kind, name))
            for name in _slots(variant.kind)
        },
        "hooks": {name: (variant.owner(variant.kind, name),) for name in HOOKS},
        "configuration": dict(_configuration(variant, config)),
        "recipe": dict(_recipe(variant, size)),
        "parameters": _parameters(variant, config, size),
    }


def _slots(kind: type[nn.Model]) -> list[str]:
    """Name the slots of a model: those of every one, then those of a Model in nn that it derives from."""
    bases = [
        base for base in kind.__mro__ if base.__module__.startswith("mlx_transformer.nn.") and base is not nn.Model
    ]
    further = (name for base in bases for name in vars(base).get("__annotations__", {}) if name[0].isupper())
    return list(dict.fromkeys([*SLOTS, *further]))


def _names(slot: nn.Slot) -> str:
    """Name a slot's class as file.Class; the classes, where layers take different ones."""
    kinds = slot if isinstance(slot, tuple) else (slot,)
    return ", ".join(f"{_file_of(kind)}.{kind.__name__}" for kind in kinds)


def _file_of(kind: type) -> str:
    """Name the file of a class, without .py: a module of somebody's own has a name that says nothing."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return Path(file).stem if file else kind.__module__.rpartition(".")[2]


def _configuration(variant: Variant, config: nn.Config) -> Iterator[tuple[str, Cells]]:
    used = fields_used(variant.kind)
    for name, value in config.to_dict().items():
        use = "yes" if name in used else "by training and decoding" if name in _OUTSIDE else "UNUSED"
        yield name, (str(value), variant.owner(type(config), name), use)


def fields_used(kind: type[nn.Model]) -> set[str]:
    """Return the Config fields that a nano model reads while it is built, computes a loss and decodes a token.

    Measured by running it: a field that is read and then ignored counts. Making or copying a Config reads nothing.
    """
    found: set[str] = set()
    names = {field.name for field in fields(kind.Config)}

    class Watched(kind.Config):  # type: ignore[name-defined]
        def __post_init__(self) -> None:
            before = set(found)
            super().__post_init__()
            found.intersection_update(before)

        def __getattribute__(self, name: str) -> Any:
            if name in names and sys._getframe(1).f_globals.get("__name__") != "dataclasses":
                found.add(name)
            return super().__getattribute__(name)

    net = kind(Watched(**SIZES["nano"]))
    net.loss(net.example(1, 8))
    net.eval()
    net(mx.zeros((1, 1), mx.int32), net.make_cache(1))
    return found


def _recipe(variant: Variant, size: str) -> Iterator[tuple[str, Cells]]:
    """Give each field with the earliest phase from which on it has had this value."""
    experiment = variant.experiment
    own = variant.recipe_name or (variant.branch if variant.branch in experiment.recipes else None)
    name = str(experiment) if own is None else f"recipe {own}"
    recipes = {name: variant.recipe(size)}
    recipes |= {f"phase {n}": find_phase(n).RECIPE.at(size) for n in range(experiment.phase or 0, 0, -1)}
    sources, chain = list(recipes), [_fields(recipe) for recipe in recipes.values()]
    for name, value in chain[0].items():
        changed = next((i for i, earlier in enumerate(chain) if earlier.get(name) != value), len(chain))
        yield name, (str(value), sources[changed - 1])


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {path: value for path, value in flatten_settings(recipe.to_dict()) if path != "kind"}


def _parameters(variant: Variant, config: nn.Config, size: str) -> dict[str, Cells]:
    """Describe the layers' parameters of one name and shape together; those of different shapes by the first's path."""
    model = variant.kind(config)
    parameters = by_path(model.parameters())
    groups = assign(variant.recipe(size).groups, parameters)
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for path, value in parameters.items():
        alike.setdefault((re.sub(r"\bblocks\.\d+\.", "blocks.*.", path), value.shape), []).append(path)
    patterns = Counter(pattern for pattern, _ in alike)
    rows: dict[str, Cells] = {}
    for (pattern, shape), paths in alike.items():
        group = next(name for name, owned in groups.items() if paths[0] in owned)
        total = f"{sum(parameters[path].size for path in paths):,}"
        row = pattern if patterns[pattern] == 1 else paths[0]
        rows[row] = (str(shape), str(len(paths)), total, _initial(parameters[paths[0]]), group)
    return rows | {"total": ("", str(len(parameters)), f"{model.count_parameters()['total']:,}", "", "")}


def _initial(value: mx.array) -> str:
    """Describe a parameter's initialization as measured: a constant, or the standard deviation."""
    low, high = value.min().item(), value.max().item()
    return f"{low:g}" if low == high else f"sd {mx.sqrt(mx.var(value)).item():.3g}"


def difference(a: Sections, b: Sections) -> Iterator[tuple[str, str, str, str]]:
    """Give (section, row, in a, in b) for every row that differs; a missing row is empty."""
    for title, count in _COMPARED.items():
        for row in {**a[title], **b[title]}:
            before, after = (", ".join(filter(None, side[title].get(row, ())[:count])) for side in (a, b))
            if before != after:
                yield title, row, before, after


def _show(variant: Variant, size: str, terminal: Terminal) -> None:
    sections = describe(variant, size)  # raises BadInput, before anything is printed
    if title := (variant.experiment.module.__doc__ or "").strip():
        terminal.print(title.splitlines()[0], markup=False)
    for title, rows in sections.items():
        table = Table(*_HEADS[title], title=f"{variant}, {size}: {title}", title_justify="left")
        for name, cells in rows.items():
            style = "red" if "UNUSED" in cells else "dim" if cells[-1] == "model.py" else ""
            table.add_row(name, *cells, style=style)
        terminal.print(table)


def _show_difference(a: Variant, b: Variant, size: str, terminal: Terminal) -> None:
    table = Table("", "row", str(a), str(b), title=f"{a} -> {b}, {size}", title_justify="left")
    before = ""
    for title, *cells in difference(describe(a, size), describe(b, size)):
        table.add_row("" if title == before else title, *cells)
        before = title
    terminal.print(table if before else f"{a} and {b} are the same")


_PAIR = PrimitiveConstructorSpec(
    nargs=2,
    metavar="A B",
    instance_from_str=tuple,
    is_instance=lambda value: True,
    str_from_instance=lambda value: [str(item) for item in value or ()],
)


@dataclass
class Flags:
    """Show which phase supplies each slot, hook and field of a model, and its parameters; or how two models differ."""

    variant: Annotated[Text, tyro.conf.Positional] = None
    """a phase, 3, a branch, 3/rope, a recipe, 2:original, or your own file, my_idea.py"""
    branch: Text = None
    """a branch of the phase or file"""
    diff: Annotated[tuple[str, str] | None, _PAIR, tyro.conf.arg(help_behavior_hint="")] = None
    """show how two models differ: --diff 2 3, --diff 3 3/rope, --diff 5 my_idea.py"""
    size: Size = None
    """nano, small, or base (default: base)"""


def main() -> None:
    """Run the command line."""
    flags = parse(Flags, "python -m phases.show")
    if (flags.variant is None) == (flags.diff is None) or (flags.diff and flags.branch):
        raise BadInput("expected: python -m phases.show PHASE [--branch NAME], or python -m phases.show --diff A B")
    size = "base" if flags.size in (None, "auto") else str(flags.size)
    terminal = Terminal()
    if not terminal.is_terminal:
        terminal.width = _PIPE_WIDTH
    if flags.diff:
        _show_difference(Variant.read(flags.diff[0]), Variant.read(flags.diff[1]), size, terminal)
        return
    variant = Variant.read(str(flags.variant))
    if flags.branch is not None:
        variant = replace(variant, branch=flags.branch)
    _show(variant, size, terminal)


if __name__ == "__main__":
    exit_cleanly(main)
