"""The pictures of the pages of results: each drawn from its logs, with a title that states what they show.

A picture is readable at 400 pixels and on a dark page (it has a white ground), its lines differ by marker and stroke as
well as by color, and its PNG carries a digest of the logs and of the code that drew it, by which `--check` knows
whether it is up to date.
"""

import hashlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare import plots
from bench.report import drawings, findings, rungs
from bench.report.placeholder import Logs
from bench.tools import growth_plots, length_cost, sweep_plots, task_plots
from mlx_transformer.run.plots import drawing, write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

_MODULES = (drawings, findings, plots, rungs, growth_plots, length_cost, sweep_plots, task_plots)
_CODE = (Path(__file__), *(Path(str(module.__file__)) for module in _MODULES))
_DPI = 200
_LETTERS = 12.6  # of a title, in an inch


@dataclass(frozen=True)
class Kind:
    """A kind of figure: the sentence that its logs give, and the function that draws them."""

    finding: Callable[..., str]
    draw: Callable[..., "Drawing"]


@dataclass(frozen=True)
class Figure:
    """A figure of a page: its kind, its logs (paths below results/published/) and what it shows."""

    kind: str
    logs: tuple[str, ...]
    finding: str

    def digest(self, root: Path) -> str:
        """Hash what decides the picture: the logs, the title and the code."""
        paths = [root / "results/published" / log for log in self.logs]
        files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
        parts = [self.kind.encode(), self.finding.encode(), *(path.read_bytes() for path in (*_CODE, *files))]
        return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def is_at(self, path: Path, root: Path) -> bool:
        """Whether the file is this figure, as the code draws it today."""
        return path.is_file() and self.digest(root).encode() in path.read_bytes()

    def drawn(self, root: Path) -> "Drawing":
        """Draw the figure with its title, inside `drawing(STYLE)`."""
        logs = [Logs(root / "results/published").read(log) for log in self.logs]
        figure = FIGURES[self.kind].draw(*logs)
        figure.set_dpi(_DPI)
        lines = textwrap.wrap(self.finding, int(_LETTERS * figure.get_figwidth()))
        figure.set_figheight(figure.get_figheight() + 0.17 * len(lines))
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9.5, fontweight="bold")
        return figure

    def write(self, path: Path, root: Path) -> None:
        """Draw the figure and write it as a PNG. Raises OSError."""
        with drawing(drawings.STYLE):
            write_png(self.drawn(root), path, {"Source": self.digest(root)})


FIGURES: dict[str, Kind] = {
    "race": Kind(findings.race, drawings.race),
    "ladder": Kind(findings.ladder, drawings.ladder),
    "loss": Kind(findings.loss, drawings.loss),
    "run": Kind(findings.run, drawings.run),
    "gate": Kind(findings.gate, drawings.gate),
    "steps": Kind(findings.steps, drawings.steps),
    "length": Kind(findings.length, drawings.length),
    "longcontext": Kind(findings.longcontext, drawings.longcontext),
    "fables": Kind(findings.fables, drawings.fables),
    "sweep": Kind(findings.sweep, drawings.sweep),
    "tasks": Kind(rungs.tasks_finding, lambda log: task_plots.draw(log).figure),
    "growth": Kind(rungs.growth_finding, lambda log: growth_plots.draw(log).figure),
    "length_cost": Kind(rungs.length_cost_finding, lambda log: length_cost.draw(log).figure),
}
