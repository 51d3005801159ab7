"""Command lines: dataclasses that tyro reads, numbers checked, and one sentence where a flag is wrong."""

import contextlib
import functools
import inspect
import io
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from mlx_transformer.generate.sampling import Sampling
from mlx_transformer.nn.config import MAX_AXIS
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.utils.errors import BadInput

T = TypeVar("T")


def _whole(text: str) -> int:
    value = int(text.replace("_", "")) if re.fullmatch(r"\+?\d[\d_]{0,17}", text, re.ASCII) else 0
    if value < 1:
        raise ValueError(f"{text!r}: expected a whole number of at least 1, and of at most 18 digits")
    return value


def _extent(text: str) -> int:
    if (value := _whole(text)) > MAX_AXIS:
        raise ValueError(f"{text!r}: expected a whole number from 1 to {MAX_AXIS}")
    return value


def _extent_or_none(text: str) -> int:
    return 0 if text == "0" else _extent(text)


def _real(text: str, expected: str = "a number of at least 0") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{text!r}: expected {expected}")
    return value


def _positive(text: str) -> float:
    if not (value := _real(text, "a number above 0")):
        raise ValueError(f"{text!r}: expected a number above 0")
    return value


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise ValueError(f"{text!r}: expected a whole number of at least 0, and of at most 18 digits")
    return int(text)


def _place(text: str) -> str:
    place = os.path.expanduser(text)  # a shell leaves the ~ in --out=~/runs as it is
    if not place.strip():
        raise ValueError(f"{text!r}: expected a name")
    if place.startswith("~"):
        raise ValueError(f"{text!r}: there is no user of that name; write ./{text} for a file")
    try:
        os.stat(place)
    except (FileNotFoundError, NotADirectoryError):
        pass  # not there yet, or for its reader to complain of
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered, a zero byte
        raise ValueError(f"{text!r}: expected a path that the system takes ({error})") from error
    return place


def _path(text: str) -> Path:
    return Path(_place(text))


def _choice(*names: str) -> PrimitiveConstructorSpec:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r}: expected one of {', '.join(names)}")
        return text

    return _optional(read, "|".join(names))


def _optional(read: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec:
    """A flag that is None until it is given; read raises ValueError with what was expected."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: read(texts[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


WholeNumber = Annotated[int | None, _optional(_whole, "N"), tyro.conf.arg(help_behavior_hint="")]
Extent = Annotated[int | None, _optional(_extent, "N"), tyro.conf.arg(help_behavior_hint="")]
Number = Annotated[float | None, _optional(_real, "X"), tyro.conf.arg(help_behavior_hint="")]
Positive = Annotated[float | None, _optional(_positive, "X"), tyro.conf.arg(help_behavior_hint="")]
Text = Annotated[str | None, _optional(str, "TEXT"), tyro.conf.arg(help_behavior_hint="")]
Place = Annotated[str | None, _optional(_place, "NAME|PATH"), tyro.conf.arg(help_behavior_hint="")]
Folder = Annotated[Path | None, _optional(_path, "DIR"), tyro.conf.arg(help_behavior_hint="")]
File = Annotated[Path | None, _optional(_path, "FILE"), tyro.conf.arg(help_behavior_hint="")]
Argument = Annotated[Path, _optional(_path, "PATH"), tyro.conf.Positional]
Words = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Seed = Annotated[int | None, _optional(_seed, "N"), tyro.conf.arg(help_behavior_hint="")]
Size = Annotated[str | None, _choice("nano", "small", "base", "auto"), tyro.conf.arg(help_behavior_hint="")]
Device = Annotated[str | None, _choice("auto", "gpu", "cpu"), tyro.conf.arg(help_behavior_hint="")]
Dtype = Annotated[str | None, _choice("float32", "float16", "bfloat16"), tyro.conf.arg(help_behavior_hint="")]
Switch = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


def parse(kind: type[T], prog: str, description: str | None = None, args: list[str] | None = None) -> T:
    """Read the command line into a dataclass. Raises BadInput in one sentence where tyro would draw a box."""
    for argument in sys.argv[1:] if args is None else args:
        if argument.encode(errors="ignore").decode() != argument:
            raise BadInput(f"{argument!r} is not UTF-8: expected text")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _wide():
            return tyro.cli(kind, prog=prog, description=description, args=args, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise BadInput(f"{_sentence(said.getvalue())}; see {prog} --help") from None


@contextlib.contextmanager
def _wide() -> Any:
    """A terminal so wide that no sentence is wrapped; --help, which is for reading, keeps the real one."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(sys.argv):
        os.environ["COLUMNS"] = "2000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _sentence(box: str) -> str:
    """The first line under the title of tyro's box, which is drawn with other characters where there is no UTF-8."""
    lines = [line.strip("│| ") for line in box.splitlines()]
    _, *inside = [line for line in lines if line and not re.fullmatch("[╭╮╰╯─-]+", line)] or [""]
    text = next(iter(inside), "the command line cannot be read").rstrip(".")
    if text.startswith("Missing from"):
        return "an argument is missing"
    return re.sub(r"^Error parsing (--[\w-]+): ", r"\1: ", text)


@dataclass
class TrainFlags:
    """Train a phase of the ladder, evaluate it, write stories, save everything."""

    size: Size = None
    """model size: nano (tests), small, base, or auto: base on a GPU, small on a CPU (default: auto)"""
    branch: Text = None
    """one idea on top of this phase's trunk"""
    recipe: Text = None
    """a named variant of this phase's recipe"""
    data: Place = None
    """auto, fables, tinystories, or a UTF-8 text file, documents separated by lines <|endoftext|> (default: auto)"""
    valid: Place = None
    """validation text file (default: the last 5 % of the documents of --data)"""
    stories: WholeNumber = None
    """how many stories or documents to train on"""
    tokenizer: Place = None
    """bpe, word, or the path of a tokenizer.json (default: bpe)"""
    vocab_size: Extent = None
    """pieces of the tokenizer (default: by size, less where the text supports less)"""
    d_model: Extent = None
    """width of the residual stream"""
    n_layers: Extent = None
    """blocks"""
    n_heads: Extent = None
    """attention heads"""
    d_ff: Extent = None
    """width inside the feed-forward part"""
    seq_len: Extent = None
    """tokens of a row, and the context"""
    dropout: Number = None
    """share of activations dropped in training"""
    batch_size: Extent = None
    """rows of a step"""
    learning_rate: Positive = None
    """the peak of the schedule"""
    dtype: Dtype = None
    """what forward and backward compute in; weights stay float32 (on a CPU the others are several times slower)"""
    max_steps: WholeNumber = None
    """stop after this many steps"""
    max_tokens: WholeNumber = None
    """stop after this many tokens"""
    max_epochs: Positive = None
    """stop after this many passes over the training text"""
    max_seconds: Positive = None
    """stop after this many seconds of training (default: 240 if no other --max is given)"""
    target_loss: Positive = None
    """stop at this validation loss, in nats per piece"""
    seed: Seed = None
    """of weights, batches and dropout (default: 0)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: Folder = None
    """the run's folder (default: results/phases/phase_<n>_<name>_<time>)"""
    resume: Folder = None
    """go on with the run in this folder, with its settings"""
    init_from: Folder = None
    """start from the weights and the tokenizer of this run"""
    prompt: Words = ()
    """first words of a story to write at the end (repeatable)"""
    temperature: Number = None
    """of the stories; 0 takes the likeliest piece (default: 0.8)"""
    top_k: WholeNumber = None
    """draw the stories from the k likeliest pieces"""
    top_p: Number = None
    """draw the stories from the likeliest pieces of together this probability"""
    min_p: Number = None
    """draw the stories from pieces of at least this share of the likeliest one's probability"""
    eval_every: WholeNumber = None
    """steps between evaluations (default: by size)"""
    save_every: WholeNumber = None
    """steps between checkpoints besides those at evaluations (default: at least every 60 s)"""
    no_compile: Switch = False
    """run every operation as it comes"""
    quiet: Switch = False
    """say only errors"""

    def given(self) -> dict[str, Any]:
        """The flags that were on the command line, paths and numbers as JSON holds them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None and value is not False and value != ()
        }


def train_flags(experiment: Experiment) -> type[TrainFlags]:
    """TrainFlags with a flag for each further number in the Config of its model or of one of its branches."""
    numbers: dict[str, Any] = {}  # each field, by its name
    owners: dict[str, dict[tuple[str, Any], list[str]]] = {}  # name -> its meaning and default -> who has that
    for branch, kind in (("", experiment.model), *experiment.branches.items()):
        for field in fields(kind.Config):
            if field.name not in TrainFlags.__dataclass_fields__:
                numbers[field.name] = field
                same = (_meaning(kind.Config, field.name), field.default)
                owners.setdefault(field.name, {}).setdefault(same, []).append(branch)
    further = []
    for name, field in numbers.items():
        whole = field.type in (int, "int")
        extent = _extent if field.default else _extent_or_none  # 0 there: as another number says
        read = _optional(extent, "N") if whole else _optional(_positive, "X")
        helps = [_help(meaning, default, whose) for (meaning, default), whose in owners[name].items()]
        help_text = tyro.conf.arg(help="; ".join(helps), help_behavior_hint="")
        further.append((name, Annotated[(int if whole else float) | None, read, help_text], None))
    return make_dataclass("TrainFlags", further, bases=(TrainFlags,), namespace={"__doc__": TrainFlags.__doc__})


def _help(meaning: str, default: Any, whose: list[str]) -> str:
    owners = "every branch" if "" in whose else ", ".join(whose)
    return f"{meaning} ({owners}{f', default: {default}' if default else ''})"


def _meaning(config: type, name: str) -> str:
    """The comment behind a number of a Config, wherever in its line of classes that stands."""
    owner = next(kind for kind in config.__mro__ if name in vars(kind).get("__annotations__", {}))
    return _comments(owner).get(name, name)


@functools.cache  # a class's source is looked for in its whole file
def _comments(kind: type) -> dict[str, str]:
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), re.MULTILINE))


def read_sampling(flags: Any) -> Sampling:
    """The Sampling of any flags that carry its four numbers."""
    names = ("temperature", "top_k", "top_p", "min_p")
    return Sampling(**{name: getattr(flags, name) for name in names if getattr(flags, name) is not None})
