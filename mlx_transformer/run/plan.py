"""From flags to a plan: every choice of a run made and checked before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mlx_transformer.backend import device_info, use_device
from mlx_transformer.data.corpus import Corpus, load_corpus
from mlx_transformer.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from mlx_transformer.data.tokens import Tokens, tokenize_corpus
from mlx_transformer.generate.sampling import Sampling
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.config import SIZES, Config, choose_size
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.weights import load_weights
from mlx_transformer.run.flags import TrainFlags, parse, read_sampling, train_flags
from mlx_transformer.run.ladder import Experiment, split_recipe
from mlx_transformer.run.own_code import Code
from mlx_transformer.run.saved import model_folder, read_config
from mlx_transformer.train.recipe import Recipe, check_groups
from mlx_transformer.train.trainer import Limits
from mlx_transformer.utils.errors import BadInput

SETTINGS = "settings.json"
DEFAULT_SECONDS = 240.0  # a first run is minutes; any --max flag replaces it
_ENDS = ("max_steps", "max_tokens", "max_epochs", "max_seconds")
_LIMITS = (*_ENDS, "target_loss")
_FREE = (*_LIMITS, "quiet", "prompt", "resume")  # what may differ when a run goes on
_AUTO = ("size", "data", "device")  # "auto" means: as it was chosen when the run began
PROMPTS = (
    "Once upon a time",
    "There was a little",
    "The brave princess",
    "In a magical forest",
    "A small cat",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run, decided: what is trained, on what, how, and where it goes."""

    experiment: Experiment
    kind: type[Model]
    settings: dict[str, Any]  # the flags that decide the result, as settings.json holds them
    size: str
    seed: int
    config: Config
    recipe: Recipe
    recipe_code: Code | None  # the file that the recipe is from, if --recipe names one
    limits: Limits
    sampling: Sampling
    corpus: Corpus
    tokenizer: Tokenizer
    tokens: Tokens
    init_from: Path | None

    def make_model(self) -> Model:
        """The model as it starts. Raises BadInput if it does not fit the device, the recipe's groups or --init-from."""
        self._check_memory(0, 0)  # before a billion layers are made
        model = self.kind(self.config, self.seed)
        scores = [part.n_scores(self.config.seq_len) for part in model.modules() if isinstance(part, Attention)]
        self._check_memory(model.count_parameters()["total"], max(scores, default=0))
        check_groups(self.recipe, model)
        if self.init_from is not None:
            load_weights(model, self.init_from)
        return model

    def _check_memory(self, parameters: int, scores: int) -> None:
        """Raises BadInput where training cannot fit: a lower bound, counted before anything is computed.

        scores: of one row and the layer that has most.
        """
        states = 3 * parameters  # the weights, their gradients, and what any optimizer remembers at least
        tokens = self.recipe.batch_tokens // self.recipe.accumulate  # at a time
        activations = tokens * self.config.d_model * self.config.n_layers  # the blocks' inputs alone
        attention = 2 * scores * max(1, tokens // self.config.seq_len)  # a layer's weights and their gradient
        needed, present = 4 * (states + activations + attention) / 2**30, device_info().memory_bytes / 2**30
        if 0 < present < needed:
            grown = [name for name in ("batch_size", *vars(self.config)) if name in self.settings]
            flags = grown or ["d_model", "d_ff", "n_layers", "batch_size"]
            raise BadInput(
                f"such a model and {tokens:,} tokens at a time need at least {needed:,.0f} GiB, and this device has "
                f"{present:,.0f}: give a smaller {' or '.join('--' + name.replace('_', '-') for name in flags)}"
            )

    def bits_per_byte(self, loss: float | None) -> float | None:
        """Validation loss in nats per piece -> bits per UTF-8 byte; None where the tokenizer loses text."""
        if loss is None or not self.tokens.lossless:
            return None
        return loss * (len(self.tokens.valid) - 1) / math.log(2) / self.tokens.valid_bytes

    @property
    def prompts(self) -> list[str]:
        """Those asked for, else the default ones that fit the context."""
        asked = self.settings.get("prompt")
        if asked:
            return asked
        return [p for p in PROMPTS if len(self.tokenizer.encode(p)) + 1 < self.config.seq_len]


def make_plan(experiment: Experiment, flags: TrainFlags, say: Callable[[str], None]) -> Plan:
    """Decide a run. Raises BadInput, with nothing written but caches, where the flags cannot be followed."""
    given = flags.given()
    settings = _resumed(experiment, flags.resume, given) if flags.resume else given
    use_device(settings.get("device", "auto"))
    kind = experiment.find_branch(settings.get("branch"))
    size = choose_size(settings.get("size"))
    source = model_folder(settings["init_from"]) if "init_from" in settings else None
    if source is not None and (own := {"vocab_size", "tokenizer"} & settings.keys()):
        raise BadInput(
            f"--{min(own).replace('_', '-')} and --init-from exclude each other: the tokenizer comes with the weights"
        )
    numbers = {**SIZES[size], **(_numbers_of(source, kind) if source else {})}
    recipe, recipe_code = experiment.find_recipe(settings.get("recipe"))
    changed = {name: settings[name] for name in ("learning_rate", "dtype", "dropout") if name in settings}
    recipe, limits = replace(recipe.at(size), **changed).check(), _limits(settings)
    numbers |= {} if recipe.dropout is None else {"dropout": recipe.dropout}
    numbers |= own_numbers(experiment, kind, settings)
    asked_vocab = settings.get("vocab_size")
    config = kind.Config(**{**numbers, "vocab_size": asked_vocab or numbers["vocab_size"]})
    recipe.check_dropout(config.dropout)
    if "batch_size" in settings:
        recipe = replace(recipe, batch_tokens=settings["batch_size"] * config.seq_len)
    sampling = read_sampling(flags if not flags.resume else _Attributes(settings))
    corpus = load_corpus(settings.get("data", "auto"), settings.get("valid"), settings.get("stories"), say)
    if source is None:
        name = settings.get("tokenizer", "bpe")
        tokenizer = train_tokenizer(name, corpus, config.vocab_size, explicit=asked_vocab is not None)
    else:
        tokenizer = load_tokenizer(source)
    plan = Plan(
        experiment=experiment,
        kind=kind,
        settings=_decided(settings, size, corpus),
        size=size,
        seed=settings.get("seed", 0),
        config=replace(config, vocab_size=tokenizer.vocab_size) if source is None else config,
        recipe=recipe,
        recipe_code=recipe_code,
        limits=limits,
        sampling=sampling,
        corpus=corpus,
        tokenizer=tokenizer,
        tokens=tokenize_corpus(corpus, tokenizer, say),
        init_from=source,
    )
    _check_text(plan)
    return plan


class _Attributes:
    """Stored settings read as attributes, absent ones as None."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        return self._settings.get(name)


def _limits(settings: dict[str, Any]) -> Limits:
    given = {name: settings[name] for name in _LIMITS if name in settings}
    if given.keys().isdisjoint(_ENDS):
        given["max_seconds"] = DEFAULT_SECONDS
    return Limits(**given)


def own_numbers(experiment: Experiment, kind: type[Model], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are numbers of a Config. Raises BadInput for one that only other branches have."""
    own = {field.name for field in fields(kind.Config)} - {"vocab_size"}
    others = {field.name for branch in experiment.branches.values() for field in fields(branch.Config)} - {"vocab_size"}
    if foreign := (others - own) & settings.keys():
        number = min(foreign)
        whose = " or ".join(name for name, branch in experiment.branches.items() if hasattr(branch.Config, number))
        raise BadInput(f"--{number.replace('_', '-')} is a number of another model, --branch {whose}")
    return {name: settings[name] for name in own & settings.keys()}


def _numbers_of(source: Path, kind: type[Model]) -> dict[str, Any]:
    """The numbers of the run that weights come from, but for dropout, which training alone reads."""
    numbers = read_config(source)["config"]
    return {f.name: numbers[f.name] for f in fields(kind.Config) if f.name in numbers and f.name != "dropout"}


def _check_text(plan: Plan) -> None:
    """Prompts must fit, and one row must come out of the training text. Raises BadInput."""
    from mlx_transformer.generate import encode_prompt

    for prompt in plan.settings.get("prompt", ()):
        encode_prompt(plan.tokenizer, prompt, plan.config.seq_len)
    pieces = len(plan.tokens.train)
    if pieces <= plan.config.seq_len:
        raise BadInput(
            f"the training text has {pieces:,} pieces: one row needs {plan.config.seq_len + 1:,}; "
            "give a longer text or a smaller --seq-len"
        )


def _decided(settings: dict[str, Any], size: str, corpus: Corpus) -> dict[str, Any]:
    """The settings with every "auto" replaced by what it came to, so that a resumed run chooses the same."""
    data = settings.get("data", "auto")
    decided = {**settings, "size": size, "data": corpus.name if data == "auto" else data}
    if (named := split_recipe(decided.get("recipe") or "")) is not None:
        decided["recipe"] = f"{named[0].resolve()}:{named[1]}"
    for name in ("data", "valid", "tokenizer", "init_from"):
        value = decided.get(name)
        if (
            value is not None
            and Path(value).expanduser().exists()
            and value not in ("fables", "tinystories", "bpe", "word")
        ):
            decided[name] = str(Path(value).expanduser().resolve())
    return {name: value for name, value in decided.items() if name not in ("resume", "out", "quiet")}


def _resumed(experiment: Experiment, folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The stored settings of a run, with this command line's limits. Raises BadInput where the two disagree."""
    stored = read_settings(folder)
    name = experiment.code.path.name if experiment.code else None
    code = stored.get("code")
    file = code.get("file") if isinstance(code, dict) else None
    if (stored["phase"], file) != (experiment.phase, name):
        raise BadInput(f"'{folder}' is a run of {file or 'phase {}'.format(stored['phase'])}, not of {experiment}")
    settings = _read_again(train_flags(experiment), stored["flags"], folder / SETTINGS)
    if "out" in given:
        raise BadInput(
            f"--out {given['out']} and --resume {folder} exclude each other: a resumed run stays in its folder"
        )
    defaults = {"seed": 0, "tokenizer": "bpe", **stored.get("config", {}), **stored.get("recipe", {})}
    for name, value in given.items():
        free = name in _FREE or (name in _AUTO and value == "auto")
        was = settings.get(name, defaults.get(name, "the default"))
        if not free and not _same(value, was):
            flag = name.replace("_", "-")
            raise BadInput(
                f"--{flag} {value}: the run in '{folder}' was begun with {was}; a resumed run keeps its settings"
            )
    limits = {name: given[name] for name in _LIMITS if name in given}
    if not limits.keys().isdisjoint(_ENDS):  # another end; the target stays, unless another one is given
        settings = {name: value for name, value in settings.items() if name not in _ENDS}
    return {**settings, **limits, **{name: given[name] for name in ("prompt", "quiet") if name in given}}


def _read_again(kind: type[TrainFlags], flags: dict[str, Any], path: Path) -> dict[str, Any]:
    """Stored flags, read as the command line was. Raises BadInput where somebody has made of them what none can be."""
    line: list[str] = []
    for name, value in flags.items():
        if name not in kind.__dataclass_fields__:
            raise BadInput(f"'{path}' is damaged: '{name}' is no flag")
        flag = f"--{name.replace('_', '-')}"
        line += (
            [flag] if value is True else [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
        )
    try:
        return parse(kind, f"'{path}'", args=line).given()
    except BadInput as error:
        raise BadInput(f"'{path}' is damaged: {error}") from None


def _same(given: Any, stored: Any) -> bool:
    if isinstance(given, str) and isinstance(stored, str):
        return given == stored or str(Path(given).expanduser().resolve()) == stored
    return given == stored


def read_settings(folder: Path) -> dict[str, Any]:
    """settings.json of a run folder. Raises BadInput if it is no run."""
    path = Path(folder) / SETTINGS
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"'{folder}' is no run: expected a folder with {SETTINGS}, as --out makes it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"'{path}' cannot be read ({error}): the run cannot go on") from error
    if not isinstance(stored, dict) or "phase" not in stored or not isinstance(stored.get("flags"), dict):
        raise BadInput(f"'{path}' does not describe a run: expected the keys phase and flags")
    return stored
