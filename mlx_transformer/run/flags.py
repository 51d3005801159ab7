"""Flags as fields of a dataclass: read from the command line or from JSON, with one sentence where one is wrong."""

import contextlib
import io
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from mlx_transformer.generate.sampling import Sampling
from mlx_transformer.nn.config import MAX_AXIS
from mlx_transformer.utils.errors import BadInput

T = TypeVar("T")
_REQUIRED = " (required)"  # tyro's, behind a help text


def read_whole(text: str) -> int:
    value = int(text.replace("_", "")) if re.fullmatch(r"\+?\d[\d_]{0,17}", text, re.ASCII) else 0
    if value < 1:
        raise ValueError(f"{text!r}: expected a whole number of at least 1, and of at most 18 digits")
    return value


def read_length(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := read_whole(text)) <= MAX_AXIS:
            return value
    raise ValueError(f"{text!r}: expected a whole number from 1 to {MAX_AXIS}")


def read_length_or_zero(text: str) -> int:
    try:
        return 0 if text == "0" else read_length(text)
    except ValueError:
        raise ValueError(f"{text!r}: expected a whole number from 1 to {MAX_AXIS}, or 0 for the default") from None


def read_number(text: str, expected: str = "a number of at least 0") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{text!r}: expected {expected}")
    return value


def read_positive(text: str) -> float:
    if not (value := read_number(text, "a number above 0")):
        raise ValueError(f"{text!r}: expected a number above 0")
    return value


def read_real(text: str) -> float:
    value = float(text) if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text, re.ASCII | re.IGNORECASE) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r}: expected a number")
    return value


def read_seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise ValueError(f"{text!r}: expected a whole number of at least 0, and of at most 18 digits")
    return int(text)


def read_place(text: str) -> str:
    place = os.path.expanduser(text)  # a shell does not expand the ~ of --out=~/runs
    if not place.strip():
        raise ValueError(f"{text!r}: expected a name")
    if place.startswith("~"):
        raise ValueError(f"{text!r}: there is no user of that name; write ./{text} for a file")
    try:
        os.stat(place)
    except (FileNotFoundError, NotADirectoryError):
        pass  # a new path, or one that its reader refuses
    except (OSError, ValueError) as error:  # name too long, folder not accessible, zero byte
        raise ValueError(f"{text!r}: expected a path that the system takes ({error})") from error
    return place


def read_path(text: str) -> Path:
    return Path(read_place(text))


def _choice(*names: str) -> PrimitiveConstructorSpec:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r}: expected one of {', '.join(names)}")
        return text

    return optional(read, "|".join(names))


def optional(read: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec:
    """Describe a flag whose default is None; read raises ValueError with what was expected."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: read(texts[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


_NO_HINT: Any = tyro.conf.arg(help_behavior_hint="")  # the help text names the default
WholeNumber = Annotated[int | None, optional(read_whole, "N"), _NO_HINT]
Extent = Annotated[int | None, optional(read_length, "N"), _NO_HINT]
Number = Annotated[float | None, optional(read_number, "X"), _NO_HINT]
Positive = Annotated[float | None, optional(read_positive, "X"), _NO_HINT]
Text = Annotated[str | None, optional(str, "TEXT"), _NO_HINT]
Place = Annotated[str | None, optional(read_place, "NAME|PATH"), _NO_HINT]
Folder = Annotated[Path | None, optional(read_path, "DIR"), _NO_HINT]
File = Annotated[Path | None, optional(read_path, "FILE"), _NO_HINT]
Argument = Annotated[Path, optional(read_path, "PATH"), tyro.conf.Positional]
RunArgument = Annotated[Path, optional(read_path, "RUN"), tyro.conf.Positional]
Arguments = Annotated[
    tuple[Annotated[Path, optional(read_path, "RUN")], ...],
    tyro.conf.Positional,
    _NO_HINT,
]
Words = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Logs = Annotated[
    tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="tensorboard|wandb", help_behavior_hint="")
]
Seed = Annotated[int | None, optional(read_seed, "N"), _NO_HINT]
Size = Annotated[str | None, _choice("nano", "small", "base", "auto"), _NO_HINT]
Device = Annotated[str | None, _choice("auto", "gpu", "cpu"), _NO_HINT]
Dtype = Annotated[str | None, _choice("float32", "float16", "bfloat16"), _NO_HINT]
Shard = Annotated[str | None, _choice("none", "optimizer", "tensor", "pipeline"), _NO_HINT]
Part = Annotated[str | None, _choice("tensor", "pipeline"), _NO_HINT]
Switch = Annotated[bool, _NO_HINT]


def parse(kind: type[T], prog: str, args: list[str] | None = None) -> T:
    """Read the command line, or args, into a dataclass. Raises BadInput with the first complaint of tyro."""
    args = sys.argv[1:] if args is None else args
    for argument in args:
        if argument.encode(errors="ignore").decode() != argument:
            raise BadInput(f"{argument!r} is not UTF-8: expected text")
    if repeated := _repeated(kind, args):
        raise BadInput(f"{repeated} is there more than once: expected one; see {prog} --help")
    complaint = io.StringIO()
    wide = contextlib.nullcontext() if {"-h", "--help"} & set(args) else _wide_terminal()
    try:
        with contextlib.redirect_stderr(complaint), wide:
            return tyro.cli(kind, prog=prog, args=args, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise BadInput(f"{_first_sentence(complaint.getvalue())}; see {prog} --help") from None


def _repeated(kind: type, args: list[str]) -> str | None:
    """Return the first flag that is there more than once and does not collect its values."""
    hints = get_type_hints(kind, include_extras=True)
    single = {name for name, hint in hints.items() if tyro.conf.UseAppendAction not in get_args(hint)}
    seen = set()
    for argument in itertools.takewhile(lambda argument: argument != "--", args):
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name in single:
            if name in seen:
                return f"--{name.replace('_', '-')}"
            seen.add(name)
    return None


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Set a width at which tyro wraps no sentence."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "2000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _first_sentence(box: str) -> str:
    """Return the first line under the title of tyro's box, whose frame is ASCII where there is no UTF-8."""
    lines = [line.strip("│| ") for line in box.splitlines()]
    _, *inside = [line for line in lines if line and not re.fullmatch("[╭╮╰╯─-]+", line)] or [""]
    text = next(iter(inside), "the command line cannot be read").rstrip(".")
    if text.startswith("Missing from"):
        named = [(name, help_text) for name, help_text in itertools.pairwise(inside) if help_text.endswith(_REQUIRED)]
        return "; ".join(f"{name} is missing: {text.removesuffix(_REQUIRED)}" for name, text in named)
    if found := re.match(r"Missing value for argument '(--[\w-]+)'", text):
        return f"{found[1]} has no value: expected one"
    return re.sub(r"^Error parsing (--[\w-]+): ", r"\1: ", text)


def read_json(kind: type[T], values: dict[str, Any], source: str) -> T:
    """Make a dataclass of flags from JSON values, with the checks of the command line.

    Raises BadInput, which names the source, for an unknown name, a wrong type or a value out of range.
    """
    hints = get_type_hints(kind, include_extras=True)
    read = {}
    for name, value in values.items():
        if name not in hints:
            raise BadInput(f"{source} is damaged: '{name}' is no setting")
        try:
            read[name] = _read_value(hints[name], value)
        except ValueError as error:
            raise BadInput(f"{source} is damaged: {name}: {error}") from None
    return kind(**read)


def _read_value(hint: Any, value: Any) -> Any:
    """Check a JSON value against an annotation of this module. Raises ValueError with what was expected."""
    base = get_args(hint)[0]
    if base is bool and isinstance(value, bool):
        return value
    if get_origin(base) is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    types = {int: (int,), float: (int, float)}.get(next(iter(get_args(base)), str), (str,))
    specs = [extra for extra in get_args(hint)[1:] if isinstance(extra, PrimitiveConstructorSpec)]
    if specs and isinstance(value, types) and not isinstance(value, bool):
        return specs[0].instance_from_str([str(value)])
    raise ValueError(f"{value!r}: expected {specs[0].metavar if specs else 'another type'}")


@dataclass
class DataFlags:
    """The text to train on, and the one to evaluate on."""

    data: Place = None
    """auto, fables, tinystories, pairs, task:NAME, OWNER/NAME , a text, .jsonl, .csv, .gz, folder (default: auto)"""
    valid: Place = None
    """validation text, as --data takes them (default: the last 5 % of the documents of --data)"""
    text_column: Text = None
    """key or column of .jsonl and .csv that holds the text (default: text)"""


@dataclass
class SamplingFlags:
    """The distribution that tokens are drawn from."""

    temperature: Number = None
    """sampling temperature; 0 is greedy (default: 0.8)"""
    top_k: WholeNumber = None
    """sample from the k most probable tokens"""
    top_p: Number = None
    """sample from the smallest set of tokens with at least this probability in total"""
    min_p: Number = None
    """sample from tokens with at least this share of the most probable token's probability"""


def read_sampling(flags: SamplingFlags) -> Sampling:
    """Make a Sampling of the flags that were given."""
    values = {field.name: getattr(flags, field.name) for field in fields(SamplingFlags)}
    return Sampling(**{name: value for name, value in values.items() if value is not None})
