"""Settings of a training run: a typed dataclass, read from the command line or from settings.json."""

import functools
import inspect
import json
import re
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from mlx_transformer.nn.config import Config
from mlx_transformer.run.flags import (
    DataFlags,
    Device,
    Dtype,
    Extent,
    Folder,
    Logs,
    Number,
    Place,
    Positive,
    SamplingFlags,
    Seed,
    Shard,
    Size,
    Switch,
    Text,
    WholeNumber,
    Words,
    optional,
    read_json,
    read_length,
    read_length_or_zero,
    read_positive,
    read_real,
)
from mlx_transformer.run.ladder import Experiment, split_recipe
from mlx_transformer.utils.errors import BadInput

SETTINGS = "settings.json"
ENDS = ("max_steps", "max_tokens", "max_epochs", "max_seconds")
_FREE = (*ENDS, "target_loss", "quiet", "prompt", "log", "resume", "shard")  # may differ when a run is resumed
_AUTO = ("size", "data", "device")  # when a run is resumed, "auto" is what was chosen at its start


@dataclass
class Settings(DataFlags, SamplingFlags):
    """Train a model, evaluate it, generate text, save everything."""

    size: Size = None
    """model size: nano (tests), small, base, or auto: base on a GPU, small on a CPU (default: auto)"""
    branch: Text = None
    """variant of the model"""
    d_model: Extent = None
    """width of the residual stream"""
    n_layers: Extent = None
    """number of blocks"""
    n_heads: Extent = None
    """attention heads"""
    d_ff: Extent = None
    """hidden width of the feed-forward part"""
    seq_len: Extent = None
    """context length, and the tokens of a training sequence"""
    dropout: Number = None
    """dropout probability in training"""
    init_from: Folder = None
    """initialize weights and tokenizer from this run; a deeper model, or one with experts, grows from it"""
    stories: WholeNumber = None
    """number of documents to train on"""
    stream: Switch = False
    """read the files of --data while training, in bounded memory and disk (default: above 5 GB in several files)"""
    tokenizer: Place = None
    """bpe, word, or the path of a tokenizer.json (default: bpe)"""
    vocab_size: Extent = None
    """vocabulary of the tokenizer (default: by size, less where the text supports less)"""
    recipe: Text = None
    """named training recipe, or FILE.py:NAME for one of your own"""
    batch_size: Extent = None
    """sequences per step"""
    learning_rate: Positive = None
    """peak learning rate"""
    dtype: Dtype = None
    """dtype of forward and backward pass; weights stay float32 (16 bits are several times slower on a CPU)"""
    seed: Seed = None
    """random seed of initialization, batches and dropout (default: 0)"""
    device: Device = None
    """device to compute on (default: auto)"""
    no_compile: Switch = False
    """do not compile the training step"""
    deterministic: Switch = False
    """on a GPU add in a fixed order, so that a run can be repeated bit for bit (a CPU always does)"""
    shard: Shard = None
    """what the ranks divide: none (batches alone), optimizer (its state too), tensor (heads), pipeline (layers)"""
    max_steps: WholeNumber = None
    """stop after this many steps"""
    max_tokens: WholeNumber = None
    """stop after this many tokens"""
    max_epochs: Positive = None
    """stop after this many epochs"""
    max_seconds: Positive = None
    """stop after this many seconds of training, without compiling and evaluating (default: 240 without a --max flag)"""
    target_loss: Positive = None
    """stop at this validation loss, in nats per token"""
    prompt: Words = ()
    """prompt to continue at the end (repeatable)"""
    out: Folder = None
    """run folder (default: results/phases/phase_<n>_<name>_<time>)"""
    resume: Folder = None
    """resume the run in this folder, with its settings"""
    eval_every: WholeNumber = None
    """steps between evaluations (default: by size)"""
    save_every: WholeNumber = None
    """steps between checkpoints, besides those at evaluations (default: at least every 60 s)"""
    log: Logs = ()
    """also log to tensorboard or wandb (repeatable)"""
    quiet: Switch = False
    """print errors only"""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are not at their default, as JSON values."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, (value, default) in values.items()
            if value != default
        }


GROUPS = {  # of --help-all; the fields of a Config that Settings lacks are in the first
    "model": ("size", "branch", "d_model", "n_layers", "n_heads", "d_ff", "seq_len", "dropout", "init_from"),
    "data": ("data", "valid", "text_column", "stories", "stream", "tokenizer", "vocab_size"),
    "training": (
        *("recipe", "batch_size", "learning_rate", "dtype", "seed", "device", "no_compile", "deterministic"),
        "shard",
    ),
    "limits": (*ENDS, "target_loss"),
    "generation": ("prompt", "temperature", "top_k", "top_p", "min_p"),
    "output": ("out", "resume", "eval_every", "save_every", "log", "quiet"),
}
COMMON = {
    *("size", "branch", "recipe", "data", "batch_size", "learning_rate", "seed", "device"),
    *("max_steps", "max_seconds", "prompt", "out", "resume"),
}


def settings_type(experiment: Experiment) -> type[Settings]:
    """Return Settings with a field for each further number in the Config of the model or of one of its branches.

    Raises BadInput for a number that has the name of another flag.
    """
    numbers: dict[str, Any] = {}  # name -> field
    meanings: dict[str, dict[tuple[str, Any], list[str]]] = {}  # name -> meaning and default -> branches
    for branch, kind in (("", experiment.model), *experiment.branches.items()):
        for field in fields(kind.Config):
            if field.name in Settings.__dataclass_fields__:
                if field.name not in Config.__dataclass_fields__:
                    raise BadInput(f"{field.name} of {experiment}'s Config is the name of a flag: give another name")
            elif field.type in (int, "int", float, "float"):
                numbers[field.name] = field
                same = (meaning(kind.Config, field.name), field.default)
                meanings.setdefault(field.name, {}).setdefault(same, []).append(branch)
    further = []
    for name, field in numbers.items():
        helps = [_help(text, default, branches) for (text, default), branches in meanings[name].items()]
        help_text = tyro.conf.arg(help="; ".join(helps), help_behavior_hint="")
        if field.type in (int, "int"):
            read = read_length if field.default else read_length_or_zero  # a default of 0: derived from other numbers
            further.append((name, Annotated[int | None, optional(read, "N"), help_text], None))
        else:
            read_float = read_positive if experiment.code is None else read_real
            further.append((name, Annotated[float | None, optional(read_float, "X"), help_text], None))
    return make_dataclass("Settings", further, bases=(Settings,), namespace={"__doc__": Settings.__doc__})


def _help(text: str, default: Any, branches: list[str]) -> str:
    notes = [] if "" in branches else [f"branch {', '.join(branches)}"]
    notes += [f"default: {default}"] if default else []
    return f"{text} ({'; '.join(notes)})" if notes else text


def meaning(config: type, name: str) -> str:
    """Return the comment behind a field of a Config, in the class that declares it."""
    owner = next(kind for kind in config.__mro__ if name in vars(kind).get("__annotations__", {}))
    return _comments(owner).get(name, name)


@functools.cache  # inspect searches the whole file for each class
def _comments(kind: type) -> dict[str, str]:
    try:
        return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), re.MULTILINE))
    except (OSError, TypeError):
        return {}


def resume_settings(experiment: Experiment, given: Settings) -> Settings:
    """Return the stored settings of the run in given.resume, with the limits that were given now.

    Raises BadInput where there is no such run or a setting differs.
    """
    folder = given.resume
    assert folder is not None
    stored = read_settings(folder)
    name, file = (experiment.code.path.name if experiment.code else None), _file(stored)
    if (stored["phase"], file) != (experiment.phase, name):
        of = file or f"phase {stored['phase']}"
        raise BadInput(f"'{folder}' is a run of {of}, not of {experiment}")
    settings = read_json(settings_type(experiment), stored["flags"], f"'{folder / SETTINGS}'")
    now = given.to_dict()
    if given.out is not None:
        raise BadInput(f"--out {given.out} and --resume {folder} exclude each other: a run stays in its folder")
    before = {"seed": 0, "tokenizer": "bpe", **stored.get("config", {}), **stored.get("recipe", {})}
    before |= settings.to_dict()
    for name, value in now.items():
        free = name in _FREE or (name in _AUTO and value == "auto")
        was = before.get(name, "the default")
        if not free and not _same(value, was):
            flag = name.replace("_", "-")
            raise BadInput(
                f"--{flag} {value}: the run in '{folder}' was started with {was}; a resumed run keeps its settings"
            )
    no_ends: dict[str, Any] = dict.fromkeys(ENDS)
    if not now.keys().isdisjoint(ENDS):  # a new end replaces the old one; the target stays unless it is given too
        settings = replace(settings, **no_ends)
    changed = {name: getattr(given, name) for name in _FREE if name in now}
    return replace(settings, **changed)


def _same(given: Any, stored: Any) -> bool:
    if isinstance(given, str) and isinstance(stored, str):
        return stored in (given, str(Path(given).expanduser().resolve()))
    return given == stored


def _file(stored: dict[str, Any]) -> str | None:
    code = stored.get("code")
    return code.get("file") if isinstance(code, dict) else None


def decide(settings: Settings, size: str, corpus: str) -> Settings:
    """Replace "auto" by what was chosen and relative paths by absolute ones, so that a resumed run uses the same."""
    decided: dict[str, Any] = {"size": size, "data": corpus if settings.data in (None, "auto") else settings.data}
    for name in ("valid", "tokenizer", "init_from"):
        decided[name] = getattr(settings, name)
    for name, value in decided.items():
        if value is not None and value not in ("fables", "tinystories", "pairs", "bpe", "word"):
            path = Path(value).expanduser()
            decided[name] = type(value)(path.resolve()) if path.exists() else value
    if (named := split_recipe(settings.recipe or "")) is not None:
        decided["recipe"] = f"{named[0].resolve()}:{named[1]}"
    device = None if settings.device == "auto" else settings.device
    return replace(settings, **decided, device=device, resume=None, out=None, quiet=False)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return settings.json of a run folder, unchecked but for its keys phase and flags. Raises BadInput."""
    path = Path(folder) / SETTINGS
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"'{folder}' is no run: expected a folder with {SETTINGS}, as --out makes it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"'{path}' cannot be read ({error}): the run cannot be resumed") from error
    if not isinstance(stored, dict) or "phase" not in stored or not isinstance(stored.get("flags"), dict):
        raise BadInput(f"'{path}' does not describe a run: expected the keys phase and flags")
    return stored


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return result.json; None if there is none, or it is damaged."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "stopped" in result else None
