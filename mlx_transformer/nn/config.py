"""Config: the hyperparameters of a model, and the three model sizes."""

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from mlx_transformer.backend import device_info
from mlx_transformer.utils.errors import BadInput

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda cls: cls


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Hyperparameters:
    """Base class whose subclasses become frozen, keyword-only dataclasses without a decorator.

    A direct subclass is a mixin of fields for `leaf`. Its `__post_init__`, if any, ends with super().__post_init__().
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        """Derive and check fields; called once by the dataclass, end of the chain of super() calls."""

    def derive(self, name: str, value: int) -> None:
        """Set field `name` to `value` if it was left at 0. Only for use in `__post_init__`."""
        if getattr(self, name) == 0:
            object.__setattr__(self, name, value)


SIZES: dict[str, dict[str, int]] = {
    "nano": {"vocab_size": 1024, "d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 256, "seq_len": 64},
    "small": {"vocab_size": 4096, "d_model": 128, "n_layers": 4, "n_heads": 4, "d_ff": 512, "seq_len": 128},
    "base": {"vocab_size": 8192, "d_model": 256, "n_layers": 4, "n_heads": 8, "d_ff": 1024, "seq_len": 128},
}


def choose_size(size: str | None) -> str:
    """Return the size's name; None or "auto" is "small" on a CPU and "base" on a GPU."""
    if size is None or size == "auto":
        return "small" if device_info().backend == "cpu" else "base"
    return size


MAX_AXIS = 2**31 - 1  # MLX stores the length of an axis in 32 bits


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Config(Hyperparameters):
    """Hyperparameters of a model; a subclass adds fields.

    Raises BadInput (a ValueError) for an integer below 1, or below its field's metadata["least"], or above MAX_AXIS, a
    float that is not finite, dropout outside [0, 1), norm_eps not above 0, or d_model that is not a multiple of
    n_heads.
    """

    vocab_size: int = 8192  # tokens in the vocabulary, special tokens included
    d_model: int = 256  # width of the residual stream
    n_layers: int = 4  # number of blocks
    n_heads: int = 8  # attention heads per layer
    d_ff: int = 1024  # hidden width of the feed-forward layers
    seq_len: int = 128  # tokens per training sequence, and the context length
    dropout: float = 0.1  # probability of zeroing an activation in training
    norm_eps: float = 1e-5  # added to the variance in norms

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int"):
                least = field.metadata.get("least", 1)
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise BadInput(f"{field.name} = {value!r}: expected a whole number of at least {least}")
                if value > MAX_AXIS:
                    raise BadInput(f"{field.name} = {value}: expected a whole number up to {MAX_AXIS:,}")
            if field.type in (float, "float") and not _is_finite(value):
                raise BadInput(f"{field.name} = {value!r}: expected a number")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout = {self.dropout!r}: expected a number from 0 up to, not including, 1")
        if self.norm_eps <= 0:
            raise BadInput(f"norm_eps = {self.norm_eps!r}: expected a number above 0")
        _ = self.head_dim  # raises BadInput if n_heads does not divide d_model

    def default_head_dim(self) -> int:
        """Return d_model / n_heads. Raises BadInput if n_heads does not divide d_model."""
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise BadInput(
                f"d_model = {self.d_model} is not a multiple of n_heads = {self.n_heads}: change one of the two"
            )
        return self.d_model // self.n_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.default_head_dim()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON; `type(config)(**fields)` is its inverse."""
        return asdict(self)
