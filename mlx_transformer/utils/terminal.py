"""The terminal: text as it is, and tables that drop columns rather than cut them."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
from rich.measure import Measurement
from rich.table import Column, Table

_ANY_WIDTH = 1 << 16


class Terminal(rich.console.Console):
    """Standard output where names may have brackets and colons: nothing is markup, emoji or highlighted by rich."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def say(self, text: str) -> None:
        """Print a line without wrapping it."""
        self.print(text, soft_wrap=True)

    def print_columns(self, columns: Mapping[str, Sequence[str]], worth: Sequence[str]) -> None:
        """Print columns, head -> cells, without those that do not fit; worth: heads, the one to drop last first.

        A head that is not in `worth` stays. Where the output is no terminal all fit.
        """
        shown = dict(columns)
        wide = self.options.update(width=_ANY_WIDTH)
        for head in (*reversed(worth), None):
            table = Table(*(Column(name, overflow="fold") for name in shown))
            for cells in zip(*shown.values(), strict=True):
                table.add_row(*cells)
            width = Measurement.get(self, wide, table).maximum
            if width <= self.width or not self.is_terminal or head is None:
                break
            del shown[head]
        if not self.is_terminal:
            self.width = max(self.width, width)
        self.print(table)
