"""The door to everything that bench.compare shows: files in a folder, tables on a terminal."""

from pathlib import Path

from rich.console import Console

from bench.compare import page, plots, tables
from bench.compare.findings import Log


def write_all(log: Log, folder: Path) -> list[Path]:
    """Write compare.html, compare.md and the pictures (PNG) of a compare.json into the folder; the paths.

    The same log gives the same bytes; each file is whole or not there. Raises OSError.
    """
    pictures = plots.draw(log)
    drawn = [picture.write(folder) for picture in pictures]
    shown = [(path.name, picture.shows) for path, picture in zip(drawn, pictures, strict=True)]
    tables.write_markdown(folder / "compare.md", log, shown)
    page.write_page(folder / "compare.html", log, pictures)
    return [folder / "compare.html", folder / "compare.md", *drawn]


def show(log: Log, console: Console) -> None:
    """The answer and the main tables of a compare.json."""
    tables.show(log, console)
