"""Flags of several tools, their defaults and readers, and the terminal."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from mlx_transformer.backend import use_device
from mlx_transformer.nn.config import choose_size
from mlx_transformer.run.flags import DataFlags, Device, Size
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import BadInput, Interrupted

BUDGETS = {"nano": 2_000_000, "small": 5_000_000, "base": 20_000_000}  # training tokens of a run, by model size
SEEDS = 5

Say = Callable[[str], None]


@dataclass
class TrainFlags(DataFlags):
    """The runs of a tool that trains."""

    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    device: Device = None
    """where to compute (default: auto)"""

    def choose(self, default: str | None = None) -> str:
        """Set the device and return the size. Raises BadInput."""
        use_device(self.device or "auto")
        return choose_size(self.size or default)

    def settings(self, size: str, **changes: Any) -> Settings:
        """Return the settings of a training command."""
        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(DataFlags)}
        return Settings(size=size, device=self.device, **given, **changes)


@contextmanager
def resumable() -> Iterator[None]:
    """Raise Interrupted for Ctrl-C among runs that the same command finds again."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("stopped, the current run is saved; the same command resumes") from None


def read_numbers(flag: str, text: str | None) -> list[int]:
    """Read "8,32" as [8, 32], ascending, and None as []. Raises BadInput for anything but whole numbers."""
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,10}", word) and 0 < int(word) < 2**31 for word in words):
        raise BadInput(f"{flag} {text!r}: expected whole numbers of at least 1, with commas")
    return sorted(set(map(int, words)))


def read_names(flag: str, text: str | None, known: Sequence[str], default: Sequence[str]) -> list[str]:
    """Read names with commas, each once. Raises BadInput for an unknown one."""
    names = list(default) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise BadInput(f"{flag} {name!r}: expected some of {', '.join(known)}, with commas")
    return list(dict.fromkeys(names))
