"""Recipe: the numbers and rules of training, as one frozen value; a phase is `replace(previous.RECIPE, ...)`."""

from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from mlx_transformer.errors import BadInput
from mlx_transformer.optim.clip import GlobalNorm
from mlx_transformer.optim.groups import Group
from mlx_transformer.optim.schedules import Schedule

DTYPES = ("float32", "float16", "bfloat16")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BySize:
    """A number that differs by model size; `Recipe.at(size)` picks one."""

    nano: Any
    small: Any
    base: Any


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Stop after `patience` evaluations in a row without a gain of `min_improvement` nats on the best so far."""

    patience: int
    min_improvement: float


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained. Horizons are numbers of tokens. Any field, and any number inside one, may be a BySize."""

    batch_tokens: Any  # predicted tokens of a step: rows = batch_tokens / seq_len
    learning_rate: Any  # the peak, times the schedule
    schedule: Schedule
    groups: tuple[Group, ...]  # which optimizer owns which parameter
    clip: GlobalNorm
    stop: Plateau
    eval_tokens: Any  # training tokens between two evaluations, unless the validation text is longer
    dtype: str = "float32"  # what forward and backward compute in; the weights stay float32

    def at(self, size: str) -> "Recipe":
        """The recipe of one model size: every BySize replaced by its number."""
        return _pick(self, size)

    def check(self) -> "Recipe":
        """Itself, once sized. Raises BadInput where a number is out of its range."""
        if self.dtype not in DTYPES:
            raise BadInput(f"dtype = {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if not 0 < self.learning_rate < float("inf"):
            raise BadInput(f"learning rate = {self.learning_rate}: expected a number above 0")
        return self

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
