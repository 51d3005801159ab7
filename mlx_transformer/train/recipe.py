"""Recipe: the numbers and rules of training, as one frozen value; a phase is `replace(previous.RECIPE, ...)`."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from mlx_transformer.nn.config import Config
from mlx_transformer.train.optim.average import EMA
from mlx_transformer.train.optim.clip import Clip
from mlx_transformer.train.optim.groups import Group
from mlx_transformer.train.optim.scaling import LossScale
from mlx_transformer.train.optim.schedules import BatchWarmup, Schedule
from mlx_transformer.train.optim.stopping import StopRule
from mlx_transformer.utils.errors import BadInput

DTYPES = ("float32", "float16", "bfloat16")
CHECKPOINTS = ("none", "block")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BySize:
    """A number that differs by model size; `Recipe.at(size)` picks one."""

    nano: Any
    small: Any
    base: Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained. Any field, and any number inside one, may be a BySize.

    Horizons of schedules, batch warm-up and averages are numbers of tokens; an optimizer, a clip or a loss scale
    remembers steps.
    """

    batch_tokens: Any  # predicted tokens of a step: batch size = batch_tokens / seq_len
    learning_rate: Any  # the peak, times the schedule
    schedule: Schedule
    groups: tuple[Group, ...]  # which optimizer owns which parameter
    clip: Clip
    stop: StopRule
    eval_tokens: Any  # training tokens between two evaluations, unless the validation text is longer
    dtype: str = "float32"  # what forward and backward compute in; the weights stay float32
    loss_scale: LossScale = field(default_factory=LossScale)  # in float16; the other dtypes need none
    batch_warmup: BatchWarmup | None = None
    accumulate: Any = 1  # parts of a step that are computed one after the other: the memory of one, the sum of all
    checkpoint: str = "none"  # block: a block's insides are computed again in the backward pass, not kept in memory
    label_smoothing: Any = 0.0  # of the training loss; the validation loss is always the plain one
    average: EMA | None = None  # of the weights: what is evaluated and kept in place of the weights
    dropout: Any = None  # in place of the Config's, where a run makes its model

    def at(self, size: str) -> "Recipe":
        """The recipe of one model size: every BySize replaced by its number."""
        return _pick(self, size)

    def check(self) -> "Recipe":
        """Itself, once sized. Raises BadInput where a number is out of its range."""
        if self.dtype not in DTYPES:
            raise BadInput(f"dtype = {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if not 0 < self.learning_rate < float("inf"):
            raise BadInput(f"learning rate = {self.learning_rate}: expected a number above 0")
        if not 0 <= self.label_smoothing < 1:
            raise BadInput(f"label_smoothing = {self.label_smoothing}: expected a number from 0 to below 1")
        if self.accumulate < 1:
            raise BadInput(f"accumulate = {self.accumulate}: expected a whole number of at least 1")
        if self.checkpoint not in CHECKPOINTS:
            raise BadInput(f"checkpoint = {self.checkpoint!r}: expected one of {', '.join(CHECKPOINTS)}")
        return self

    def check_model(self, config: Config) -> None:
        """Raises BadInput where a model of these numbers cannot be trained so."""
        if self.checkpoint != "none" and config.dropout > 0:
            raise BadInput(
                f"checkpoint = {self.checkpoint!r} and dropout = {config.dropout}: what is computed twice would drop "
                "other numbers the second time; give a dropout of 0, or a recipe without checkpointing"
            )

    def batch_size(self, seq_len: int, tokens: int | None = None) -> int:
        """Sequences of the step that begins after `tokens` training tokens (None: after the batch warm-up)."""
        full = max(1, self.batch_tokens // seq_len)
        return full if tokens is None or self.batch_warmup is None else self.batch_warmup.batch_size(full, tokens)

    def learning_rate_at(self, tokens: int) -> float:
        """The learning rate of the step after which `tokens` training tokens have been seen."""
        return self.learning_rate * self.schedule(tokens)

    def is_finished(self, tokens: int) -> bool:
        """Whether the weights no longer change: a learning rate of 0 now, and over the horizon of the average."""
        since = tokens - (self.average.horizon_tokens if self.average else 0)
        return since > 0 and not any(map(self.learning_rate_at, (since, tokens)))

    def to_dict(self) -> dict[str, Any]:
        """Every number, with the class name of each part as "kind": what result.json records."""
        return _described(self)


def _pick(value: Any, size: str) -> Any:
    if isinstance(value, BySize):
        return asdict(value)[size]
    if isinstance(value, tuple):
        return tuple(_pick(item, size) for item in value)
    if is_dataclass(value):
        return replace(value, **{f.name: _pick(getattr(value, f.name), size) for f in fields(value)})  # type: ignore[type-var]
    return value


def _described(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_described(item) for item in value]
    if is_dataclass(value):
        return {"kind": type(value).__name__, **{f.name: _described(getattr(value, f.name)) for f in fields(value)}}
    return value
