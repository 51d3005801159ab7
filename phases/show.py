"""What a phase is made of: `python -m phases.show 3 --branch rope`; and how two differ: `--diff 2 3`.

A phase is written N, a branch of it N/NAME. A number is dead where no line of the built model asks for it: see `reads`.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Annotated, Any

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx
import rich.console
import tyro
from rich.table import Table
from tyro.constructors import PrimitiveConstructorSpec

from mlx_transformer.nn import config, model
from mlx_transformer.nn.config import SIZES
from mlx_transformer.nn.model import Model
from mlx_transformer.run.flags import Size, Text, parse
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.train.optim.groups import assign
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.utils.errors import BadInput, exit_cleanly
from mlx_transformer.utils.trees import by_path

SLOTS = tuple(name for name in model.Model.__annotations__ if name not in vars(model.Model))
HOOKS = tuple(name for name, value in vars(model.Model).items() if callable(value) and not name.startswith("_"))
_OUTSIDE = ("seq_len",)  # read by the batches and by decoding, whatever the model
_PIPE_WIDTH = 160  # characters where nobody's window is to be filled

Cells = tuple[str, ...]
Sections = dict[str, dict[str, Cells]]  # title -> row -> cells
_HEADS = {
    "slots": ("class", "from"),
    "hooks": ("from",),
    "numbers": ("value", "from", "read by the model"),
    "recipe": ("value", "from"),
    "parameters": ("shape", "times", "count", "start", "optimizer group"),
}
_COMPARED = {"slots": 1, "hooks": 1, "numbers": 1, "recipe": 1, "parameters": 5}  # leading cells


@dataclass(frozen=True)
class Choice:
    """A phase's trunk or one of its branches."""

    phase: int
    branch: str | None
    module: ModuleType
    kind: type[Model]

    @classmethod
    def read(cls, text: str) -> "Choice":
        """What 3 or 3/rope names. Raises BadInput that lists what there is."""
        number, slash, name = text.partition("/")
        branch = name if slash else None
        module = find_phase(int(number) if re.fullmatch("[0-9]", number) else number)
        return cls(int(number), branch, module, find_branch(module, branch))

    def __str__(self) -> str:
        return f"phase {self.phase}" + (f"/{self.branch}" if self.branch else "")

    def owner(self, kind: type, name: str) -> str:
        """Who supplies an attribute of a class: a phase, this branch, or the file that every phase starts from."""
        place = next(ancestor for ancestor in kind.__mro__ if name in vars(ancestor))
        if place in (model.Model, config.Config):
            return f"{place.__module__.rpartition('.')[2]}.py"
        phase = re.fullmatch(r"phases\.phase(\d)", place.__module__)
        if phase and place.__name__ in ("Model", "Config"):
            return f"phase {phase[1]}"
        return f"branch {self.branch}" if self.branch and place.__module__.startswith("phases.") else place.__name__


def describe(choice: Choice, size: str) -> Sections:
    """Every slot, hook, number, recipe field and parameter of a choice, for one model size."""
    numbers = choice.kind.Config(**SIZES[size])
    return {
        "slots": {name: (_names(getattr(choice.kind, name)), choice.owner(choice.kind, name)) for name in SLOTS},
        "hooks": {name: (choice.owner(choice.kind, name),) for name in HOOKS},
        "numbers": dict(_numbers(choice, numbers)),
        "recipe": dict(_recipe(choice, size)),
        "parameters": _parameters(choice, numbers, size),
    }


def _names(slot: model.Slot) -> str:
    """file.Class of a slot, or of each class that the layers take in turn."""
    kinds = slot if isinstance(slot, tuple) else (slot,)
    return ", ".join(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for kind in kinds)


def _numbers(choice: Choice, numbers: config.Config) -> Iterator[tuple[str, Cells]]:
    read = reads(choice.kind)
    for name, value in numbers.to_dict().items():
        use = "yes" if name in read else "by training and decoding" if name in _OUTSIDE else "DEAD"
        yield name, (str(value), choice.owner(type(numbers), name), use)


def reads(kind: type[Model]) -> set[str]:
    """The Config fields that a nano model asks for while it is built, makes a loss, and decodes a piece.

    Found by running it: a number read and then thrown away counts as read. Making or copying a Config reads nothing.
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
    tokens = mx.zeros((1, 9), mx.int32)
    net.loss(tokens)
    net.eval()
    net(tokens[:, :1], net.make_cache(1))
    return found


def _recipe(choice: Choice, size: str) -> Iterator[tuple[str, Cells]]:
    """Each field with the phase since which it has had this value."""
    earlier = [_fields(find_phase(n).RECIPE.at(size)) for n in range(choice.phase, 0, -1)]
    for name, value in earlier[0].items():
        same = next((i for i, recipe in enumerate(earlier) if recipe.get(name) != value), len(earlier))
        yield name, (str(value), f"phase {choice.phase - same + 1}")


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {path: value for path, value in _flat(recipe.to_dict()) if path}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """{"clip": {"kind": "GlobalNorm", "max_norm": 1}} -> ("clip", "GlobalNorm"), ("clip.max_norm", 1)."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {item.pop("name", i): item for i, item in enumerate(value)}
    if not isinstance(value, dict):
        yield path, value
        return
    for name, item in value.items():
        yield from _flat(item, path if name == "kind" else f"{path}.{name}".lstrip("."))


def _parameters(choice: Choice, numbers: config.Config, size: str) -> dict[str, Cells]:
    """A row for the layers' parameters of one name and shape; where layers differ in shape, by the first one's path."""
    net = choice.kind(numbers)
    own = by_path(net.parameters())
    groups = assign(choice.module.RECIPE.at(size).groups, own)
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for path, value in own.items():
        alike.setdefault((re.sub(r"^blocks\.\d+\.", "blocks.*.", path), value.shape), []).append(path)
    patterns = Counter(pattern for pattern, _ in alike)
    rows: dict[str, Cells] = {}
    for (pattern, shape), paths in alike.items():
        group = next(name for name, owned in groups.items() if paths[0] in owned)
        count = f"{sum(own[path].size for path in paths):,}"
        row = pattern if patterns[pattern] == 1 else paths[0]
        rows[row] = (str(shape), str(len(paths)), count, _start(own[paths[0]]), group)
    return rows | {"total": ("", str(len(own)), f"{net.count_parameters()['total']:,}", "", "")}


def _start(value: mx.array) -> str:
    """How a parameter starts, as measured: a constant, or the deviation of what was drawn."""
    low, high = value.min().item(), value.max().item()
    return f"{low:g}" if low == high else f"sd {mx.sqrt(mx.var(value)).item():.3g}"


def difference(a: Sections, b: Sections) -> Iterator[tuple[str, str, str, str]]:
    """(section, row, in a, in b) for every row that is not the same; an absent one is empty."""
    for title, count in _COMPARED.items():
        for row in {**a[title], **b[title]}:
            before, after = (", ".join(filter(None, side[title].get(row, ())[:count])) for side in (a, b))
            if before != after:
                yield title, row, before, after


def _show(choice: Choice, size: str, terminal: rich.console.Console) -> None:
    terminal.print((choice.module.__doc__ or "").splitlines()[0], markup=False)
    for title, rows in describe(choice, size).items():
        table = Table(title.rstrip("s"), *_HEADS[title], title=f"{choice}, {size}: {title}", title_justify="left")
        for name, cells in rows.items():
            table.add_row(name, *cells, style="red" if "DEAD" in cells else "dim" if cells[-1] == "model.py" else "")
        terminal.print(table)


def _show_difference(a: Choice, b: Choice, size: str, terminal: rich.console.Console) -> None:
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
    """Show which phase supplied each slot, hook and number, and the parameters; or how two phases differ."""

    phase: Annotated[Text, tyro.conf.Positional] = None
    """a phase, 3, or a branch of it, 3/rope"""
    branch: Text = None
    """one idea on top of the phase's trunk"""
    diff: Annotated[tuple[str, str] | None, _PAIR, tyro.conf.arg(help_behavior_hint="")] = None
    """show how two phases differ: --diff 2 3, --diff 3 3/rope"""
    size: Size = None
    """nano, small, or base (default: base)"""


def main() -> None:
    """The command line."""
    flags = parse(Flags, "python -m phases.show")
    if (flags.phase is None) == (flags.diff is None) or (flags.diff and flags.branch):
        raise BadInput("expected: python -m phases.show PHASE [--branch NAME], or python -m phases.show --diff A B")
    size = "base" if flags.size in (None, "auto") else str(flags.size)
    terminal = rich.console.Console(highlight=False)
    if not terminal.is_terminal:
        terminal.width = _PIPE_WIDTH
    if flags.diff:
        _show_difference(Choice.read(flags.diff[0]), Choice.read(flags.diff[1]), size, terminal)
    else:
        _show(Choice.read("/".join(text for text in (flags.phase, flags.branch) if text is not None)), size, terminal)


if __name__ == "__main__":
    exit_cleanly(main)
