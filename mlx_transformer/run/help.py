"""--help and --help-all of a training command."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from rich.table import Table
from rich.text import Text

from mlx_transformer.nn.config import SIZES
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.run.settings import COMMON, GROUPS, Settings, settings_type
from mlx_transformer.utils.terminal import Terminal

HELP, HELP_ALL = {"-h", "--help"}, "--help-all"


def print_help(experiment: Experiment, *, everything: bool) -> None:
    """Print the common flags, or all of them, with the defaults by model size."""
    console = Terminal()
    title = (experiment.module.__doc__ or f"{experiment}.").splitlines()[0]
    console.print(f"usage: {experiment.command} [FLAGS]\n\n{title}\n")
    kind = settings_type(experiment)
    listed = {name for names in GROUPS.values() for name in names}
    further = [field.name for field in fields(kind) if field.name not in listed]
    own = {name for name in further if _is_own(experiment, name)}
    for group, names in GROUPS.items():
        names = (*names, *further) if group == "model" else names
        shown = [name for name in names if everything or name in COMMON or name in own]
        if shown:
            console.print(Text(group, style="bold"))
            console.print(_table(kind, shown))
    console.print(_defaults(experiment))
    for word, known in (("branches", experiment.branches), ("recipes", experiment.recipes)):
        if known:
            console.print(f"\n{word}: {', '.join(sorted(known))}")
    if not everything:
        console.print(f"\n{HELP_ALL} lists all flags")


def _is_own(experiment: Experiment, name: str) -> bool:
    """Whether a number is declared by somebody's own file."""
    declared = [
        vars(kind).get("__annotations__", {}) for kind in vars(experiment.module).values() if inspect.isclass(kind)
    ]
    return experiment.code is not None and any(name in names for names in declared)


def _table(kind: type[Settings], names: list[str]) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=True)
    hints = get_type_hints(kind, include_extras=True)
    meanings = _meanings()
    for name in names:
        metavar, help_text = _describe(hints[name])
        flag = f"--{name.replace('_', '-')} {metavar}".rstrip()
        table.add_row(Text(flag, no_wrap=True), Text(help_text or meanings[name]))
    return table


def _describe(hint: Any) -> tuple[str, str | None]:
    """Return the metavar of a flag, and its help text where the annotation has one."""
    extras = get_args(hint)[1:]
    found = {
        key: next((value for extra in extras if (value := getattr(extra, key, None))), None)
        for key in ("metavar", "help")
    }
    return found["metavar"] or "", found["help"]


def _meanings() -> dict[str, str]:
    """Return the string under each field of Settings."""
    source = "".join(inspect.getsource(kind) for kind in Settings.__mro__ if is_dataclass(kind))
    return dict(re.findall(r'^    (\w+): .*\n    """(.*)"""$', source, re.MULTILINE))


def _defaults(experiment: Experiment) -> Table:
    """Tabulate the default of each hyperparameter for each model size."""
    table = Table("defaults", *SIZES, box=None, padding=(0, 2, 0, 2))
    for name in SIZES["nano"]:
        table.add_row(name, *(str(numbers[name]) for numbers in SIZES.values()))
    for name, values in _recipe_defaults(experiment):
        table.add_row(name, *values)
    return table


def _recipe_defaults(experiment: Experiment) -> Iterator[tuple[str, list[str]]]:
    recipes = [experiment.recipe.at(size) for size in SIZES]
    lengths = [numbers["seq_len"] for numbers in SIZES.values()]
    yield "batch_size", [str(r.batch_tokens // length) for r, length in zip(recipes, lengths, strict=True)]
    yield "learning_rate", [f"{recipe.learning_rate:g}" for recipe in recipes]
    yield "dropout", [f"{experiment.model.Config().dropout if r.dropout is None else r.dropout:g}" for r in recipes]
    yield "dtype", [recipe.dtype for recipe in recipes]
