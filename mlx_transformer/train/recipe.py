"""Recipe: how a model is trained, as one frozen value; a phase's is `replace(previous.RECIPE, ...)`."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from mlx_transformer.nn.config import SIZES
from mlx_transformer.nn.model import Model
from mlx_transformer.train.optim.average import Average
from mlx_transformer.train.optim.clip import Clip
from mlx_transformer.train.optim.groups import Group, assign
from mlx_transformer.train.optim.scaling import LossScale
from mlx_transformer.train.optim.schedules import BatchWarmup, Schedule
from mlx_transformer.train.optim.stopping import StopRule
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path

DTYPES = ("float32", "float16", "bfloat16")
CHECKPOINTS = ("none", "block")


@dataclass(frozen=True, kw_only=True)
class BySize:
    """A value that differs by model size; `Recipe.at(size)` picks one."""

    nano: Any
    small: Any
    base: Any


@dataclass(frozen=True)
class ByWidth:
    """A number that follows the model's width: value * (d_model / width) ** power, to three digits.

    muP (Yang et al. 2022, arXiv 2203.03466, table 8): with Adam, the best learning rate of matrices is inverse to the
    width, and that of embeddings does not depend on it. So a rate tuned in a narrow model serves a wide one.
    `Recipe.at(size, d_model)` computes the number.
    """

    value: float
    power: float
    width: int = 64  # where `value` is the number

    def at(self, d_model: int) -> float:
        """Return the number for a width."""
        return float(f"{self.value * (d_model / self.width) ** self.power:.3g}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The training configuration. Any field, and any number inside one, may be a BySize or a ByWidth.

    The horizons of the schedule, the batch warm-up and the average are numbers of tokens; those of the optimizers, the
    clipping and the loss scale are numbers of steps.
    """

    batch_tokens: Any  # predicted tokens of a step: batch size = batch_tokens / seq_len
    learning_rate: Any  # the peak, which the schedule multiplies
    schedule: Schedule
    groups: tuple[Group, ...]  # which optimizer updates which parameter
    clip: Clip
    stop: StopRule
    eval_tokens: Any  # training tokens between two evaluations; at least the validation tokens
    dtype: str = "float32"  # of the forward and backward pass; the weights stay float32
    loss_scale: LossScale = field(default_factory=LossScale)  # used in float16 only
    batch_warmup: BatchWarmup | None = None
    accumulate: Any = 1  # parts of a step that are computed one after the other, to save memory
    checkpoint: str = "none"  # gradient checkpointing; "block": recompute each block in the backward pass
    label_smoothing: Any = 0.0  # of the training loss only
    average: Average | None = None  # of the weights: evaluated and kept instead of them
    dropout: Any = None  # replaces the Config's while training; None: the Config's

    def at(self, size: str, d_model: int | None = None) -> "Recipe":
        """Return the recipe of a model size ("nano", "small", "base"): every BySize and ByWidth replaced by its value.

        d_model: the model's width; None: the size's. Raises BadInput for another size.
        """
        if size not in SIZES:
            raise BadInput(f"size = {size!r}: expected one of {', '.join(SIZES)}")
        return _pick(self, size, d_model or SIZES[size]["d_model"])

    def with_rates(self, learning_rate: Any, **multipliers: Any) -> "Recipe":
        """Return the recipe with another peak learning rate, and other multiples of it for the groups of these names.

        Raises BadInput for a name that no group has.
        """
        if unknown := multipliers.keys() - {group.name for group in self.groups}:
            raise BadInput(f"the recipe has no optimizer group named {min(unknown)}")
        groups = (replace(g, lr_multiplier=multipliers.get(g.name, g.lr_multiplier)) for g in self.groups)
        return replace(self, learning_rate=learning_rate, groups=tuple(groups))

    def check(self) -> "Recipe":
        """Return the recipe itself. Raises BadInput for a BySize or ByWidth left in it, or a number out of range."""
        if name := next(_unsized(self), None):
            raise BadInput(f'the recipe\'s {name} differs by model size: use recipe.at("nano")')
        if self.dtype not in DTYPES:
            raise BadInput(f"dtype = {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if not 0 < self.learning_rate < float("inf"):
            raise BadInput(f"learning rate = {self.learning_rate}: expected a number above 0")
        if not 0 <= self.label_smoothing < 1:
            raise BadInput(f"label_smoothing = {self.label_smoothing}: expected a number from 0 to below 1")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise BadInput(f"dropout = {self.dropout!r}: expected a number from 0 up to, not including, 1")
        if self.accumulate < 1:
            raise BadInput(f"accumulate = {self.accumulate}: expected a whole number of at least 1")
        if self.checkpoint not in CHECKPOINTS:
            raise BadInput(f"checkpoint = {self.checkpoint!r}: expected one of {', '.join(CHECKPOINTS)}")
        if self.average:
            self.average.check()
        return self

    def check_dropout(self, dropout: float) -> None:
        """Raise BadInput if a model with this dropout cannot be trained: with gradient checkpointing it must be 0."""
        if self.checkpoint != "none" and dropout > 0:
            raise BadInput(
                f"checkpoint = {self.checkpoint!r} and dropout = {dropout}: the recomputed pass would drop "
                "other values than the first; give a dropout of 0, or a recipe without checkpointing"
            )

    def batch_size(self, seq_len: int, tokens: int | None = None) -> int:
        """Return the sequences of the step that begins after `tokens` training tokens (None: after the warm-up)."""
        full = max(1, self.batch_tokens // seq_len)
        return full if tokens is None or self.batch_warmup is None else self.batch_warmup.batch_size(full, tokens)

    def learning_rate_at(self, tokens: int) -> float:
        """Return the learning rate of the step that ends after `tokens` training tokens."""
        return self.learning_rate * self.schedule(tokens)

    def is_finished(self, tokens: int) -> bool:
        """Whether the weights no longer change: a learning rate of 0 now, and over the horizon of the average."""
        since = tokens - (self.average.horizon() if self.average else 0)
        return since > 0 and not any(map(self.learning_rate_at, (since, tokens)))

    def to_dict(self) -> dict[str, Any]:
        """Return every number, with the class name of each part as "kind": what result.json records."""
        return _described(self)


def check_groups(recipe: Recipe, model: Model) -> None:
    """Raise BadInput unless every parameter of the model is in exactly one of the recipe's groups."""
    assign(recipe.groups, by_path(model.trainable_parameters()))


def _pick(value: Any, size: str, d_model: int) -> Any:
    if isinstance(value, BySize):
        return asdict(value)[size]
    if isinstance(value, ByWidth):
        return value.at(d_model)
    if isinstance(value, tuple):
        return tuple(_pick(item, size, d_model) for item in value)
    if is_dataclass(value):
        return replace(value, **{f.name: _pick(getattr(value, f.name), size, d_model) for f in fields(value)})  # type: ignore[type-var]
    return value


def _unsized(value: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of the values that differ by size or width."""
    if isinstance(value, (BySize, ByWidth)):
        yield name
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _unsized(item, f"{name}[{i}]")
    elif is_dataclass(value):
        for f in fields(value):
            yield from _unsized(getattr(value, f.name), f"{name}.{f.name}".lstrip("."))


def _described(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_described(item) for item in value]
    if is_dataclass(value):
        return {"kind": type(value).__name__, **{f.name: _described(getattr(value, f.name)) for f in fields(value)}}
    if callable(value):  # a user's own selector or rule
        return {"kind": getattr(value, "__name__", type(value).__name__)}
    return value
