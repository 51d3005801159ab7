"""Plan of a run: every choice made and checked before anything is written."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transformer.backend import use_device
from mlx_transformer.data.corpus import Corpus
from mlx_transformer.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from mlx_transformer.generate.sampling import Sampling
from mlx_transformer.nn.config import SIZES, Config, choose_size
from mlx_transformer.nn.growth import grow
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.weights import put_weights
from mlx_transformer.run.flags import read_sampling
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.run.memory import check_dimensions, check_memory, check_part
from mlx_transformer.run.own_code import Code
from mlx_transformer.run.saved import find_weights, model_folder, read_config
from mlx_transformer.run.settings import ENDS, Settings, decide, resume_settings
from mlx_transformer.run.task import TextTask, task_of
from mlx_transformer.train.recipe import Recipe, check_groups
from mlx_transformer.train.sharding import OPTIMIZER
from mlx_transformer.train.trainer import Limits
from mlx_transformer.utils.errors import BadInput

DEFAULT_SECONDS = 240.0  # without a --max flag


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a run: model, recipe, text, limits."""

    experiment: Experiment
    kind: type[Model]
    task: TextTask
    settings: Settings  # without "auto" and relative paths
    size: str
    seed: int
    config: Config
    recipe: Recipe
    recipe_code: Code | None  # the file that the recipe is from, if --recipe names one
    limits: Limits
    sampling: Sampling
    corpus: Corpus
    tokenizer: Tokenizer
    tokens: Any  # Tokens, or PairTokens of a translator
    weights: tuple[dict[str, mx.array], Path] | None  # of --init-from, and where they are from

    def make_model(self, say: Callable[[str], None] = lambda _: None, shares: int = 1, parts: int = 1) -> Model:
        """Initialize the model, and say how it grew from the weights of --init-from.

        A rank computes one of so many shares of a batch, with one of so many parts of the model. Raises BadInput if
        that does not fit the device, or the model the recipe's groups or --init-from.
        """
        flags = tuple(self.settings.to_dict())
        of_rank = replace(self.recipe, accumulate=self.recipe.accumulate * shares)  # as many sequences at a time
        check_dimensions(self.config, of_rank, flags)
        model = self.kind(self.config, self.seed)
        check_groups(self.recipe, model)
        if parts > 1:
            check_part(model, of_rank, flags, parts)
        else:
            check_memory(model, of_rank, self.seed, flags, shares if self.settings.shard == OPTIMIZER else 1)
        if self.weights is not None:
            arrays, notes = grow(model, *self.weights)
            put_weights(model, arrays, self.weights[1])
            for note in notes:
                say(f"note: {note}")
        return model

    def bits_per_byte(self, loss: float | None) -> float | None:
        """Convert validation loss from nats per token to bits per UTF-8 byte; None for a lossy tokenizer."""
        if loss is None or not self.tokens.lossless:
            return None
        return loss * self.tokens.valid_tokens / math.log(2) / self.tokens.valid_bytes


def make_plan(experiment: Experiment, settings: Settings, say: Callable[[str], None]) -> Plan:
    """Decide every choice of a run. Raises BadInput, with nothing written but caches, where a setting is impossible."""
    if settings.resume is not None:
        settings = resume_settings(experiment, settings)
    use_device(settings.device or "auto")
    kind = experiment.find_branch(settings.branch)
    task = task_of(kind, settings)
    kind = task.fit(kind, settings)
    source = None if settings.init_from is None else model_folder(settings.init_from)
    size = choose_size(settings.size) if source is None else _size_of(source, settings.size)
    recipe, recipe_code = experiment.find_recipe(settings.recipe, settings.branch)
    width = settings.d_model or (read_config(source)["config"]["d_model"] if source else None)
    recipe = _change_recipe(recipe.at(size, width), settings)
    config = _make_config(experiment, kind, settings, size, recipe, source)
    recipe.check_dropout(config.dropout)
    if settings.batch_size is not None:
        recipe = replace(recipe, batch_tokens=settings.batch_size * config.seq_len)
    limits, sampling = _limits(settings), read_sampling(settings)
    corpus = task.load(settings, say)
    weights = None
    if source is None:
        explicit = settings.vocab_size is not None
        tokenizer = train_tokenizer(settings.tokenizer or "bpe", corpus, config.vocab_size, explicit=explicit)
        config = replace(config, vocab_size=tokenizer.vocab_size)
    else:
        tokenizer = load_tokenizer(source)
        arrays, path, notes = find_weights(source)
        weights = arrays, path
        for note in notes:
            say(f"note: {note}")
    plan = Plan(
        experiment=experiment,
        kind=kind,
        task=task,
        settings=decide(replace(settings, stream=corpus.shards is not None), size, corpus.name),
        size=size,
        seed=settings.seed or 0,
        config=config,
        recipe=recipe,
        recipe_code=recipe_code,
        limits=limits,
        sampling=sampling,
        corpus=corpus,
        tokenizer=tokenizer,
        tokens=task.tokenize(corpus, tokenizer, config, say),
        weights=weights,
    )
    task.check(plan)
    return plan


def _size_of(source: Path, given: str | None) -> str:
    """Return the size whose width, depth and heads a saved model has, else the one given or "auto".

    Raises BadInput if another one is given: the model's hyperparameters come with its weights.
    """
    numbers, named = read_config(source)["config"], ("d_model", "n_layers", "n_heads")
    sizes = (size for size, values in SIZES.items() if all(numbers.get(name) == values[name] for name in named))
    if (size := next(sizes, None)) is None:
        return choose_size(given)
    if given not in (None, "auto", size):
        raise BadInput(f"--size {given}: the model in '{source}' is of size {size}, which comes with its weights")
    return size


def _change_recipe(recipe: Recipe, settings: Settings) -> Recipe:
    changed = {name: getattr(settings, name) for name in ("learning_rate", "dtype", "dropout")}
    return replace(recipe, **{name: value for name, value in changed.items() if value is not None}).check()


def _make_config(
    experiment: Experiment, kind: type[Model], settings: Settings, size: str, recipe: Recipe, source: Path | None
) -> Config:
    """Combine, in this order, the size's hyperparameters, those of --init-from, the recipe's dropout, the settings."""
    given = {name for name in ("vocab_size", "tokenizer") if getattr(settings, name) is not None}
    if source is not None and given:
        raise BadInput(
            f"--{min(given).replace('_', '-')} and --init-from exclude each other: the tokenizer comes with the weights"
        )
    numbers = {**SIZES[size], **(_numbers_of(source, kind) if source else {})}
    numbers |= {} if recipe.dropout is None else {"dropout": recipe.dropout}
    return kind.Config(**{**numbers, **own_numbers(experiment, kind, settings)})


def _limits(settings: Settings) -> Limits:
    given = {name: value for name in (*ENDS, "target_loss") if (value := getattr(settings, name)) is not None}
    if given.keys().isdisjoint(ENDS):
        given["max_seconds"] = DEFAULT_SECONDS
    return Limits(**given)


def own_numbers(experiment: Experiment, kind: type[Model], settings: Settings) -> dict[str, Any]:
    """Return the settings that are fields of a model's Config. Raises BadInput for one of other branches only."""
    own = {field.name for field in fields(kind.Config)}
    further = {field.name for branch in experiment.branches.values() for field in fields(branch.Config)}
    given = {name: value for name in own | further if (value := getattr(settings, name, None)) is not None}
    if foreign := given.keys() - own:
        name = min(foreign)
        whose = " or ".join(branch for branch, other in experiment.branches.items() if hasattr(other.Config, name))
        raise BadInput(f"--{name.replace('_', '-')} belongs to another model: --branch {whose}")
    return given


def _numbers_of(source: Path, kind: type[Model]) -> dict[str, Any]:
    """Return the hyperparameters of the run that weights come from, but for dropout, which only training uses."""
    numbers = read_config(source)["config"]
    return {f.name: numbers[f.name] for f in fields(kind.Config) if f.name in numbers and f.name != "dropout"}
