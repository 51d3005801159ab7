"""Everything that bench.compare shows: files in a folder, tables on a terminal."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from bench.compare import page, plots, summary, tables
from bench.compare.summary import Log
from mlx_transformer.run.report import escaped
from mlx_transformer.utils.files import atomic_write
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
    _write_markdown(folder / "compare.md", log, described)
    page.write_page(folder / "compare.html", log, all_plots)
    return [folder / "compare.html", folder / "compare.md", *drawn]


def _write_markdown(path: Path, log: Log, plots: Sequence[tuple[str, str]]) -> None:
    """Write compare.md: answer, remarks, plots (file, description), all tables. Raises OSError."""
    answer, *further = summary.headline(log)
    parts = ["# Does it pay?", f"**{escaped(answer)}**", *map(escaped, further), escaped(summary.setting(log))]
    parts.append("\n".join(f"- {escaped(remark)}" for remark in summary.remarks(log)))
    parts += [f"![{escaped(description)}]({name})" for name, description in plots]
    for make in tables.ALL:
        table = make(log)
        parts += [f"## {table.title}", tables.markdown(table)]
    parts += ["## Machine", escaped(summary.describe_machine(log))]
    atomic_write(path, "\n\n".join(part for part in parts if part) + "\n")


def show(log: Log, console: Terminal) -> None:
    """Print the answer, the remarks and the main tables of a compare.json."""
    answer, *further = summary.headline(log)
    console.print(Text(answer, style="bold"))
    for sentence in further:
        console.print(Text(sentence))
    for remark in summary.remarks(log):
        console.print(Text(f"! {remark}", style="yellow"))
    for make in tables.ON_A_TERMINAL:
        table = make(log)
        if table.rows:
            console.print(tables.on_terminal(table))
    console.print(Text(f"{summary.setting(log)}; {summary.describe_machine(log)}", style="dim"))
