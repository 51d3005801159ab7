"""The plots of a comparison, as SVG and PNG. Lines and markers differ as colors do, so that grey prints work."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.compare.summary import (
    MEASURES,
    Log,
    against,
    backend,
    base,
    caveat,
    chip,
    headline_measure,
    ladder,
    ratio,
    runs_of,
    status,
    tokens_per_second,
    variants,
    verdict,
)
from mlx_transformer.run.plots import TIME_UNITS, drawing, short
from mlx_transformer.run.report import memory
from mlx_transformer.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1b1b1b", "#6a6a6a", "#dcdcdc"
# Okabe & Ito 2008 without yellow, which does not print, roughly by lightness
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
COLORS = (INK, BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE)
# Colors that the page replaces in dark mode, by the name of its CSS variable.
ROLES = {"ink": INK, "muted": MUTED, "rule": RULE, "blue": BLUE, "vermilion": VERMILION, "green": GREEN}
ROLES |= {"purple": PURPLE, "sky": SKY, "orange": ORANGE}
MARKERS = "osD^vPX"
LINES = {"": "-", "torch": "--", "torch-compile": ":"}
KINDS: dict[str, dict[str, Any]] = {  # marker by verdict
    "faster": {"marker": "o", "color": BLUE},
    "slower": {"marker": "s", "color": VERMILION},
    "no difference": {"marker": "o", "color": INK, "markerfacecolor": "none"},
    "no interval": {"marker": "D", "color": MUTED, "markerfacecolor": "none"},
    "not reached": {"marker": "x", "color": VERMILION},
    "not measured": {"marker": "_", "color": MUTED},
}
CROSS: dict[str, Any] = {"marker": "x", "markersize": 7, "markeredgewidth": 1.8, "linestyle": ""}
BROKEN = ("diverged", "failed")
RATIO_TICKS = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50)
WIDTH = 4.8  # inches: readable on paper and on a phone
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",  # text stays text, for search and screen readers
    "svg.hashsalt": "compare",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn figure, and a sentence that describes it."""

    name: str
    description: str
    figure: "Figure"

    def svg(self) -> str:
        """Return the <svg> element alone, without a background."""
        text = StringIO()
        with drawing(STYLE):
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self.figure.savefig(text, format="svg", transparent=True, metadata=nothing)
        return text.getvalue()[text.getvalue().index("<svg") :]

    def write(self, folder: Path) -> Path:
        """Write NAME.png into the folder, the same bytes for the same log. Raises OSError."""
        data, path = BytesIO(), folder / f"{self.name}.png"
        with drawing(STYLE):
            self.figure.savefig(data, format="png", dpi=200, facecolor="white", metadata={"Software": None})
        atomic_write(path, data.getvalue())
        return path


@drawing(STYLE)
def draw(log: Log) -> list[Plot]:
    """Draw all plots that the log has data for."""
    plots = [draw_ladder(log)] if ladder(log) else []
    if any(run["evals"] for run in log["runs"]):
        plots += [draw_loss(log, "tokens"), draw_loss(log, "seconds")]
    if log["throughput"]:
        plots += [draw_speed(log), draw_memory(log)]
    return plots


def draw_ladder(log: Log) -> Plot:
    """Draw each variant's speedup over its baseline: a dot, its interval, its figure."""
    rows, key = ladder(log), headline_measure(log)
    baseline, names = against(rows)
    axes = _rows(names)
    known = [row[key][bound] for row in rows if row[key] for bound in ("ratio", "low", "high") if row[key][bound]]
    left, right = min([0.9, *known]) / 1.08, max([1.1, *known]) * 1.08
    for y, row in enumerate(rows):
        _dot(axes, y, row[key], left, right)
    axes.axvline(1, color=INK, linewidth=0.8, zorder=1)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    mark_ratios(axes.xaxis, left, right)
    _beside(axes, [ratio(row[key]).text for row in rows])
    _title(axes, f"Speedup over {baseline} to a validation loss of {rows[0]['target_loss']:.3f}")
    axes.set_xlabel(_with_caveat(log, f"speedup by {MEASURES[key]} (log scale); bars: 95 % intervals"))
    _legend_of_kinds(axes, [verdict(row[key]) for row in rows])
    values = "; ".join(f"{row['name']} {ratio(row[key]).text}, {verdict(row[key])}" for row in rows)
    return Plot(
        name="ladder", description=f"Speedup over {baseline} to the target loss: {values}.", figure=_figure(axes)
    )


def _dot(axes: "Axes", y: int, row: Mapping[str, Any] | None, left: float, right: float) -> None:
    """Draw a row of the ladder, with an arrow for a bound beyond everything measured, and a cross without a ratio."""
    kind = verdict(row)
    value, low, high = (None, None, None) if row is None else (row["ratio"], row["low"], row["high"])
    if low is not None or high is not None:
        axes.plot([low or left, high or right], [y, y], color=MUTED, linewidth=1.4, zorder=2)
        ends = [(left, "<")] * (low is None and value is not None) + [(right, ">")] * (high is None)
        for end, arrow in ends:
            axes.plot(end, y, marker=arrow, markersize=5, clip_on=False, color=MUTED)
    if value is not None or kind in ("not reached", "not measured"):
        axes.plot(value or left, y, markersize=6, linestyle="", zorder=3, clip_on=False, **KINDS[kind])


def mark_ratios(axis: "Axis", left: float, right: float) -> None:
    """Set the ticks of a logarithmic axis of ratios between two limits: 1×, and others such as 0.5× and 2×."""
    apart = 0.15 * np.log(right / left)
    ticks = [1.0]
    for tick in sorted(RATIO_TICKS, key=lambda tick: abs(np.log(tick))):
        if left <= tick <= right and min(abs(np.log(tick / other)) for other in ticks) >= apart:
            ticks.append(tick)
    axis.set_ticks(ticks, labels=[f"{tick:g}×" for tick in ticks])
    axis.set_ticks([], minor=True)


def _legend_of_kinds(axes: "Axes", kinds: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    shown = [kind for kind in KINDS if kind in kinds]
    handles = [Line2D([], [], linestyle="", markersize=6, label=kind, **KINDS[kind]) for kind in shown]
    _figure(axes).legend(handles=handles, loc="outside lower left", ncols=len(handles), handletextpad=0.2)


def draw_loss(log: Log, over: str) -> Plot:
    """Draw the validation loss over "tokens" or "seconds": medians, bands over seeds, the target.

    One panel, or where there are more variants than colors one for each against the first.
    """
    first, *others = bases = list(dict.fromkeys(map(base, variants(log))))
    crowded = len(bases) > len(COLORS)
    by_gain = [row["name"] for row in ladder(log) if row["name"] in others]
    panels = [[first, other] for other in dict.fromkeys([*by_gain, *others])] if crowded else [bases]
    figure, grid = _panels(len(panels))
    for axes, shown in zip(grid, panels, strict=True):
        for name in variants(log):
            if base(name) in shown:
                _curve(axes, log, name, over, shown.index(base(name)), crowded=crowded)
        _target(axes, log)
        if crowded:
            axes.set_title(_wrap(shown[1] + _incidents(log, shown[1])), fontsize=7.5)
    _bounds(grid[0], log, over)
    (figure.supylabel if crowded else grid[0].set_ylabel)("validation loss (nats per token)", fontsize=9)
    entries = _named_once(log, grid)
    columns = 2 if max(len(entry.get_label()) for entry in entries) <= 28 else 1
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(entries) // columns))
    figure.legend(handles=entries, loc="outside upper left", ncols=columns)
    counts = "; ".join(f"{name}: {status(log, name)}" for name in variants(log))
    description = f"Validation loss over training {over}, median and range over seeds. {counts}."
    return Plot(name=f"loss_{over}", description=description, figure=figure)


def _curve(axes: "Axes", log: Log, name: str, over: str, i: int, *, crowded: bool) -> None:
    """Draw a variant's median and band in the i-th color, and a cross where a run broke off."""
    runs = runs_of(log, name)
    x, low, middle, high = band(runs, over)
    end = max((run["evals"][-1][over] for run in log["runs"] if run["evals"]), default=0.0)
    axes.plot(
        x,
        middle,
        color=COLORS[i],
        linestyle=LINES.get(backend(name), "-."),
        linewidth=1.0 if crowded else 1.5,
        marker="" if backend(name) else MARKERS[i],
        markersize=2 if crowded else 3.5,
        markevery=_apart(x, end / 14),
        label=name.replace(base(name), "named above") if crowded and i else name + _incidents(log, name),
    )
    if len(runs) > 1:
        axes.fill_between(x, low, high, color=COLORS[i], alpha=0.15, linewidth=0)
    for run in runs:
        if run["status"] in BROKEN:
            xs, losses = _points(run, over)
            axes.plot(xs[-1:], losses[-1:], color=COLORS[i], **CROSS)


def _apart(x: np.ndarray, least: float) -> list[int]:
    """Return indices of points that lie apart: the seeds' evaluations lie close together in time."""
    chosen: list[int] = []
    for i, value in enumerate(x):
        if not chosen or value - x[chosen[-1]] >= least:
            chosen.append(i)
    return chosen


def _incidents(log: Log, name: str) -> str:
    """Return what follows a name whose runs are not all done."""
    counts = Counter(run["status"] for run in runs_of(log, name) if run["status"] != "done")
    return f" ({', '.join(f'{count} {what}' for what, count in counts.items())})" if counts else ""


def band(runs: Sequence[Mapping[str, Any]], over: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens or seconds from where every seed has an evaluation, and the lowest, median and highest loss there.

    Interpolates linearly; a run that is done keeps its last loss. A run that diverged or failed counts as infinite in
    the median from its end on, and an infinite median is a gap (NaN); the bounds ignore it.
    """
    points = [(run, *_points(run, over)) for run in runs if run["evals"]]
    if not points:
        return (np.array([]),) * 4
    x = np.unique(np.concatenate([xs for _, xs, _ in points]))
    x = x[x >= max(xs[0] for _, xs, _ in points)]
    ends = [np.inf if run["status"] in BROKEN else losses[-1] for run, _, losses in points]
    values = np.stack([np.interp(x, xs, losses, right=end) for (_, xs, losses), end in zip(points, ends, strict=True)])
    known = np.isfinite(values).any(axis=0)
    x, values = x[known], values[:, known]
    middle, finite = np.median(values, axis=0), np.where(np.isfinite(values), values, np.nan)
    return x, np.nanmin(finite, axis=0), np.where(np.isfinite(middle), middle, np.nan), np.nanmax(finite, axis=0)


def _points(run: Mapping[str, Any], over: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens or seconds, and the losses, of a run's evaluations."""
    x, losses = (np.array([one[key] for one in run["evals"]], float) for key in (over, "valid_loss"))
    return x, losses


def _wrap(name: str) -> str:
    """Break a name after its separators into lines that fit a small panel."""
    return "\n".join(re.findall(r".{1,22}(?:[/:_ ]|$)|.+", name))


def _panels(count: int) -> tuple["Figure", list["Axes"]]:
    """Make one panel, or many small ones on equal axes, three per row."""
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, 3.0 if count == 1 else 0.5 + 1.35 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid:
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, list(grid[:count])


def _target(axes: "Axes", log: Log) -> None:
    loss = log["target"]["loss"]
    if loss is not None:
        axes.axhline(loss, color=MUTED, linestyle=(0, (5, 3)), linewidth=1, label=f"target {loss:.3f}", zorder=1)


def _bounds(axes: "Axes", log: Log, over: str) -> None:
    """Set the limits and labels of all panels, without the high losses of the first tenth of training."""
    from matplotlib.ticker import MaxNLocator

    late, ends, target = [], [1.0], log["target"]["loss"]
    for run in log["runs"]:
        xs, losses = _points(run, over)
        late += losses[xs >= max([0.0, *xs]) / 10].tolist()
        ends.append(max([0.0, *xs]))
    low, high = min([*late, target or np.inf]), float(np.quantile(late or [1.0], 0.97))
    axes.set_ylim(low - 0.05 * (high - low), max(high, target or 0.0) * 1.02)
    right = 1.02 * max(ends)  # shows the last marker whole
    axes.set_xlim(0, right)
    if over == "tokens":
        axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
        axes.figure.supxlabel(_with_caveat(log, "training tokens"), fontsize=9)
        return
    unit, name = next(pair for pair in TIME_UNITS if max(ends) >= 3 * pair[0] or pair[0] == 1)
    ticks = np.asarray(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(0, max(ends) / unit))
    axes.set_xticks(ticks * unit, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(0, right)
    axes.figure.supxlabel(_with_caveat(log, f"training time on {chip(log)} ({name})"), fontsize=9)


def _named_once(log: Log, grid: Sequence["Axes"]) -> list[Any]:
    """Return the legend's entries: each line of any panel once, the band, and the cross where there is one."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    entries = list(lines.values())
    if len(log["seeds"]) > 1:
        entries.append(
            Patch(color=MUTED, alpha=0.3, linewidth=0, label=f"lowest to highest of {len(log['seeds'])} seeds")
        )
    if any(run["status"] in BROKEN for run in log["runs"]):
        entries.append(Line2D([], [], color=MUTED, label="a run diverged or failed", **CROSS))
    return entries


def draw_speed(log: Log) -> Plot:
    """Draw the throughput, the reference's bars hatched."""
    values = [row["tokens_per_second"]["median"] for row in log["throughput"]]
    highest = [row["tokens_per_second"]["high"] or 0 for row in log["throughput"]]
    axes = _bars(log, values, [tokens_per_second(row).text for row in log["throughput"]], max([*values, *highest]))
    for y, row in enumerate(log["throughput"]):
        low, high = row["tokens_per_second"]["low"], row["tokens_per_second"]["high"]
        if low is not None and high is not None:
            axes.plot([low, high], [y, y], color=INK, linewidth=1.2)
    _title(axes, "Training throughput, 95 % intervals")
    axes.set_xlabel(_with_caveat(log, f"tokens/s on {chip(log)}"))
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    figures = "; ".join(f"{row['name']} {tokens_per_second(row).text}" for row in log["throughput"])
    return Plot(name="speed", description=f"Tokens per second on {chip(log)}: {figures}.", figure=_figure(axes))


def draw_memory(log: Log) -> Plot:
    """Draw the peak memory of training."""
    unit, size = ("GiB", 2**30) if max(row["memory_bytes"] for row in log["throughput"]) >= 2**30 else ("MiB", 2**20)
    values = [row["memory_bytes"] / size for row in log["throughput"]]
    axes = _bars(log, values, [f"{value:.3g} {unit}" for value in values], max(values))
    _title(axes, "Peak memory of training")
    axes.set_xlabel(_with_caveat(log, f"{unit} on {chip(log)}"))
    listed = "; ".join(f"{row['name']} {memory(row['memory_bytes'])}" for row in log["throughput"])
    return Plot(name="memory", description=f"Peak memory: {listed}.", figure=_figure(axes))


def _bars(log: Log, values: Sequence[float], texts: Sequence[str], largest: float) -> "Axes":
    """Draw a bar for each variant; largest: of the values and their intervals."""
    names = [row["name"] for row in log["throughput"]]
    axes = _rows(names)
    for y, (name, value) in enumerate(zip(names, values, strict=True)):
        style: dict[str, Any] = {"hatch": "////", "facecolor": "none"} if backend(name) else {"facecolor": BLUE}
        axes.barh(y, value, height=0.62, edgecolor=BLUE, linewidth=0.8, **style)
    axes.set_xlim(0, 1.04 * largest or 1)
    axes.locator_params(axis="x", nbins=5)
    _beside(axes, texts)
    return axes


def _rows(names: Sequence[str]) -> "Axes":
    """Make axes with a row for each name, the first on top."""
    from matplotlib.figure import Figure

    width = WIDTH + max(0.0, 0.08 * (max(map(len, names), default=0) - 26))  # long names need room
    figure = Figure(figsize=(width, 1.15 + 0.27 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, pad=7)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _beside(axes: "Axes", texts: Sequence[str]) -> None:
    """Write a column of figures to the right of the rows."""
    for y, text in enumerate(texts):
        axes.text(1.03, y, text, transform=axes.get_yaxis_transform(), va="center_baseline", fontsize=8.5)


def _with_caveat(log: Log, label: str) -> str:
    """Return an axis label with the caveat below it, which stays with a copied plot."""
    return f"{label}\n{caveat(log)}".rstrip()


def _title(axes: "Axes", text: str) -> None:
    _figure(axes).suptitle(text, x=0.01, ha="left", fontsize=9.5)


def _figure(axes: "Axes") -> "Figure":
    return axes.figure  # type: ignore[return-value]
