"""Table and plot of a log of `bench tasks`: accuracy by task and variant."""

from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.compare.plots import COLORS, MUTED, RULE, STYLE, WIDTH, Plot
from bench.compare.summary import Cell, Log, Row
from bench.compare.tables import Table
from mlx_transformer.run.plots import drawing, short
from mlx_transformer.utils.text import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 2  # panels of a row: readable on a phone


def runs_of(log: Log, name: str, task: str) -> list[Row]:
    """Return the runs of a variant on a task, one per seed."""
    return [run for run in log["runs"] if (run["name"], run["task"]) == (name, task)]


def accuracies(log: Log, name: str, task: str, level: str | None = None) -> list[float]:
    """Return the final accuracy of each seed: at one level, or the mean over the trained ones; diverged runs are 0."""
    found = []
    for run in runs_of(log, name, task):
        own = next((one["accuracy"] for one in run["levels"] if one["level"] == level), None)
        found.append((run["accuracy"] if level is None else own) or 0.0)
    return found


def bounds(log: Log, task: str) -> tuple[float, float]:
    """Return the floor and the ceiling of a task, each the mean over its trained levels."""
    levels: list[Row] = next((run["levels"] for run in log["runs"] if run["task"] == task and run["levels"]), [])
    trained = [level for level in levels if level["trained"]]
    return tuple(float(np.mean([level[key] for level in trained])) if trained else 0.0 for key in ("floor", "ceiling"))  # type: ignore[return-value]


def table(log: Log) -> Table:
    """One row per task: the final accuracy of every variant, the best one marked."""
    rows = []
    for task in log["tasks"]:
        found = {name: accuracies(log, name, task) for name in log["names"]}
        medians = {name: median(values) for name, values in found.items() if values}
        best = max(medians.values(), default=0.0)
        floor, ceiling = bounds(log, task)
        cells = (_cell(values, bool(values) and median(values) == best > 0) for values in found.values())
        rows.append((Cell(task), *cells, Cell(f"{100 * floor:.1f} to {100 * ceiling:.0f}")))
    note = (
        f"Share of right answers in percent, the mean over the trained levels, after {short(log['budget_tokens'])}"
        f" tokens: the median over {plural(len(log['seeds']), 'seed')} and the range, each run at its best evaluation;"
        " the best of each task in bold. Floor: a guess that does not solve the task."
    )
    head = ("task", *(f"{name} (%)" for name in log["names"]), "floor to ceiling (%)")
    return Table(title=f"Accuracy on tasks at {log['size']}", note=note, head=head, rows=rows)


def levels_table(log: Log) -> Table:
    """One row per task and level: the final accuracy of every variant, the best one marked."""
    rows = []
    for task in log["tasks"]:
        first = next((run for run in log["runs"] if run["task"] == task and run["levels"]), None)
        for level in first["levels"] if first else ():
            found = [accuracies(log, name, task, level["level"]) for name in log["names"]]
            best = max((median(values) for values in found if values), default=0.0)
            cells = (_cell(values, bool(values) and median(values) == best > 0) for values in found)
            rows.append((Cell(task), Cell(level["level"]), Cell("yes" if level["trained"] else "no"), *cells))
    head = ("task", "level", "trained", *(f"{name} (%)" for name in log["names"]))
    note = "Share of right answers in percent: the median over the seeds, and the range of several; the best in bold."
    return Table(title="Accuracy by level", note=note, head=head, rows=rows)


def _cell(values: list[float], best: bool) -> Cell:
    if not values:
        return Cell("not measured")
    middle = 100 * median(values)
    text = f"**{middle:.1f}**" if best else f"{middle:.1f}"
    spread = f" ({100 * min(values):.1f}–{100 * max(values):.1f})" if len(values) > 1 else ""
    return Cell(text + spread, middle)


@drawing(STYLE)
def draw(log: Log) -> Plot:
    """Draw a panel per task: the accuracy over the training tokens, a line per variant and a band over its seeds."""
    from matplotlib.figure import Figure

    rows = -(-len(log["tasks"]) // _COLUMNS)
    columns = min(_COLUMNS, len(log["tasks"]))
    figure = Figure(figsize=(WIDTH * columns / _COLUMNS, 0.7 + 1.6 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, task in zip(grid, log["tasks"], strict=False):
        _draw_panel(axes, log, task)
    for axes in grid[len(log["tasks"]) :]:
        axes.axis("off")
    for axes in grid[max(0, len(log["tasks"]) - columns) : len(log["tasks"])]:
        axes.tick_params(labelbottom=True)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(3, len(labels)), handlelength=1.6)
    last = grid[len(log["tasks"]) - 1]
    last.set_xlabel(f"training tokens ({log['size']}; {plural(len(log['seeds']), 'seed')})", fontsize=8.5)
    return Plot(name="tasks", description="Accuracy on each task over the training tokens.", figure=figure)


def _draw_panel(axes: "Axes", log: Log, task: str) -> None:
    for bound, style in zip(bounds(log, task), (":", "--"), strict=True):
        axes.axhline(100 * bound, color=MUTED, linewidth=0.8, linestyle=style)
    for i, name in enumerate(log["names"]):
        curves = list(_curves(runs_of(log, name, task)))
        if not curves:
            continue
        length = min(map(len, curves))
        tokens = [x for x, _ in curves[0][:length]]
        values = 100 * np.array([[y for _, y in curve[:length]] for curve in curves])
        look: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": "os^DvPX"[i % 7], "markersize": 2.6}
        axes.plot(tokens, np.median(values, axis=0), label=name, linewidth=1.2, **look)
        if len(values) > 1:
            axes.fill_between(tokens, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.14, lw=0)
    axes.set_title(task, fontsize=9)
    axes.set_ylim(-3, 103)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.xaxis.set_major_formatter(lambda value, _: short(value) if value else "0")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.tick_params(labelsize=8)


def _curves(runs: list[Row]) -> Iterator[list[tuple[int, float]]]:
    """Yield the accuracy at each evaluation of each run."""
    for run in runs:
        if points := [(one["tokens"], one["accuracy"]) for one in run["evals"] if one["accuracy"] is not None]:
            yield points
