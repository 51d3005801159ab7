"""Defaults and readers of the flags that several tools share."""

import re
from collections.abc import Sequence

from mlx_transformer.utils.errors import BadInput

BUDGETS = {"nano": 2_000_000, "small": 5_000_000, "base": 20_000_000}  # training tokens of a run, by model size
SEEDS = 5


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
