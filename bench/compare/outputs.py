"""Everything that bench.compare shows: files in a folder, tables on a terminal."""

import sys
from pathlib import Path

from bench.compare import page, plots, tables
from bench.compare.summary import Log
from mlx_transformer.utils.terminal import Terminal


def write_all(log: Log, folder: Path) -> list[Path]:
    """Write compare.html, compare.md and the plots (PNG) of a compare.json into the folder; the paths.

    The same log gives the same bytes; each file is written whole or not at all. Plots that cannot be drawn are omitted,
    with a warning. Raises OSError.
    """
    try:
        all_plots = plots.draw(log)
        drawn = [plot.write(folder) for plot in all_plots]
    except OSError:
        raise
    except Exception as error:  # of matplotlib and its fonts; the tables are there without it
        print(f"warning: no plots were drawn ({type(error).__name__}: {error})", file=sys.stderr)
        all_plots, drawn = [], []
    described = [(path.name, plot.description) for path, plot in zip(drawn, all_plots, strict=True)]
    tables.write_markdown(folder / "compare.md", log, described)
    page.write_page(folder / "compare.html", log, all_plots)
    return [folder / "compare.html", folder / "compare.md", *drawn]


def show(log: Log, console: Terminal) -> None:
    """Print the answer and the main tables of a compare.json."""
    tables.show(log, console)
