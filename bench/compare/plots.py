"""The pictures of a comparison, as SVG and PNG: lines and markers tell apart what colour does, so paper may be grey."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.compare.findings import (
    MEASURES,
    Log,
    against,
    backend,
    base,
    caveat,
    chip,
    headline_measure,
    ladder,
    rate,
    runs_of,
    status,
    times,
    variants,
    verdict,
)
from mlx_transformer.run.plots import TIME_UNITS, short
from mlx_transformer.run.report import memory
from mlx_transformer.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1b1b1b", "#6a6a6a", "#dcdcdc"
# Okabe & Ito 2008, without the yellow that paper swallows, by lightness as far as the order allows
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
COLOURS = (INK, BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE)
# What a page in the dark may set otherwise, by the name that the page has for it.
ROLES = {"ink": INK, "muted": MUTED, "rule": RULE, "blue": BLUE, "vermilion": VERMILION, "green": GREEN}
ROLES |= {"purple": PURPLE, "sky": SKY, "orange": ORANGE}
MARKERS = "osD^vPX"
LINES = {"": "-", "torch": "--", "torch-compile": ":"}
KINDS: dict[str, dict[str, Any]] = {  # of a verdict: how its dot looks
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
WIDTH = 4.8  # inches: its type keeps its size on paper, and is still read on a telephone
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",  # text stays text: found, read aloud, in the page's type
    "svg.hashsalt": "compare",
    "text.parse_math": False,  # a name may hold a dollar
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn figure; `shows` says in a sentence what stands in it."""

    name: str
    shows: str
    figure: "Figure"

    def svg(self) -> str:
        """The <svg> element alone, on no ground of its own."""
        import matplotlib as mpl

        text = StringIO()
        with mpl.rc_context(STYLE):
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self.figure.savefig(text, format="svg", transparent=True, metadata=nothing)
        return text.getvalue()[text.getvalue().index("<svg") :]

    def write(self, folder: Path) -> Path:
        """Put NAME.png in the folder, the same bytes for the same log. Raises OSError."""
        import matplotlib as mpl

        data, path = BytesIO(), folder / f"{self.name}.png"
        with mpl.rc_context(STYLE):
            self.figure.savefig(data, format="png", dpi=200, facecolor="white", metadata={"Software": None})
        atomic_write(path, data.getvalue())
        return path


def draw(log: Log) -> list[Picture]:
    """All pictures that there is something to draw for."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        pictures = [draw_ladder(log)] if ladder(log) else []
        if any(run["evals"] for run in log["runs"]):
            pictures += [draw_loss(log, "tokens"), draw_loss(log, "seconds")]
        if log["rates"]:
            pictures += [draw_speed(log), draw_memory(log)]
    return pictures


def draw_ladder(log: Log) -> Picture:
    """How many times sooner than its baseline each contender is at the target: a dot, its interval, its number."""
    rows, key = ladder(log), headline_measure(log)
    baseline, names = against(rows)
    axes = _rows(names)
    known = [row[key][of] for row in rows if row[key] for of in ("ratio", "low", "high") if row[key][of]]
    left, right = min([0.9, *known]) / 1.08, max([1.1, *known]) * 1.08
    for y, row in enumerate(rows):
        _dot(axes, y, row[key], left, right)
    axes.axvline(1, color=INK, linewidth=0.8, zorder=1)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    _ratio_ticks(axes, left, right)
    _beside(axes, [times(row[key]).text for row in rows])
    _title(axes, f"Times as soon as {baseline} at a validation loss of {rows[0]['target_loss']:.3f}")
    axes.set_xlabel(_doubted(log, f"times as soon, by {MEASURES[key]} (log scale); bars: 95 % intervals"))
    _legend_of_kinds(axes, [verdict(row[key]) for row in rows])
    said = "; ".join(f"{row['name']} {times(row[key]).text}, {verdict(row[key])}" for row in rows)
    return Picture(name="ladder", shows=f"Times as soon as {baseline} at the target: {said}.", figure=_figure(axes))


def _dot(axes: "Axes", y: int, found: Mapping[str, Any] | None, left: float, right: float) -> None:
    """One row of the ladder; an arrow where a bound lies beyond all that was measured, a cross for no ratio at all."""
    kind = verdict(found)
    ratio, low, high = (None, None, None) if found is None else (found["ratio"], found["low"], found["high"])
    if low is not None or high is not None:
        axes.plot([low or left, high or right], [y, y], color=MUTED, linewidth=1.4, zorder=2)
        ends = [(left, "<")] * (low is None and ratio is not None) + [(right, ">")] * (high is None)
        for end, arrow in ends:
            axes.plot(end, y, marker=arrow, markersize=5, clip_on=False, color=MUTED)
    if ratio is not None or kind in ("not reached", "not measured"):
        axes.plot(ratio or left, y, markersize=6, linestyle="", zorder=3, clip_on=False, **KINDS[kind])


def _ratio_ticks(axes: "Axes", left: float, right: float) -> None:
    apart = 0.15 * np.log(right / left)
    ticks = [1.0]
    for tick in sorted(RATIO_TICKS, key=lambda tick: abs(np.log(tick))):
        if left <= tick <= right and min(abs(np.log(tick / other)) for other in ticks) >= apart:
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()


def _legend_of_kinds(axes: "Axes", kinds: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    shown = [kind for kind in KINDS if kind in kinds]
    handles = [Line2D([], [], linestyle="", markersize=6, label=kind, **KINDS[kind]) for kind in shown]
    _figure(axes).legend(handles=handles, loc="outside lower left", ncols=len(handles), handletextpad=0.2)


def draw_loss(log: Log, over: str) -> Picture:
    """Validation loss over "tokens" or "seconds": medians, bands over seeds, the target.

    One panel; where there are more contenders than looks, one for each against the first.
    """
    first, *others = bases = list(dict.fromkeys(map(base, variants(log))))
    crowded = len(bases) > len(COLOURS)
    by_gain = [row["name"] for row in ladder(log) if row["name"] in others]
    panels = [[first, other] for other in dict.fromkeys([*by_gain, *others])] if crowded else [bases]
    figure, grid = _panels(len(panels))
    for axes, shown in zip(grid, panels, strict=True):
        for name in variants(log):
            if base(name) in shown:
                _curve(axes, log, name, over, shown.index(base(name)), crowded=crowded)
        _target(axes, log)
        if crowded:
            axes.set_title(shown[1] + _mishaps(log, shown[1]), fontsize=8)
    _bounds(grid[0], log, over)
    (figure.supylabel if crowded else grid[0].set_ylabel)("validation loss (nats per piece)", fontsize=9)
    entries = _named_once(log, grid)
    columns = 2 if max(len(entry.get_label()) for entry in entries) <= 28 else 1
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(entries) // columns))
    figure.legend(handles=entries, loc="outside upper left", ncols=columns)
    said = "; ".join(f"{name}: {status(log, name)}" for name in variants(log))
    shows = f"Validation loss over training {over}, median and range over seeds. {said}."
    return Picture(name=f"loss_{over}", shows=shows, figure=figure)


def _curve(axes: "Axes", log: Log, name: str, over: str, i: int, *, crowded: bool) -> None:
    """A contender's band and median in the i-th look; a cross where a run ended before its time."""
    own = runs_of(log, name)
    x, low, middle, high = band(own, over)
    axes.plot(
        x,
        middle,
        color=COLOURS[i],
        linestyle=LINES.get(backend(name), "-."),
        linewidth=1.0 if crowded else 1.5,
        marker="" if backend(name) else MARKERS[i],
        markersize=2 if crowded else 3.5,
        markevery=max(1, len(x) // 8),
        label=name.replace(base(name), "named above") if crowded and i else name + _mishaps(log, name),
    )
    if len(own) > 1:
        axes.fill_between(x, low, high, color=COLOURS[i], alpha=0.15, linewidth=0)
    for run in own:
        if run["status"] in BROKEN:
            xs, losses = _points(run, over)
            axes.plot(xs[-1:], losses[-1:], color=COLOURS[i], **CROSS)


def _mishaps(log: Log, name: str) -> str:
    """What to say behind a name whose runs are not all done."""
    wanting = Counter(run["status"] for run in runs_of(log, name) if run["status"] != "done")
    return f" ({', '.join(f'{count} {what}' for what, count in wanting.items())})" if wanting else ""


def band(runs: Sequence[Mapping[str, Any]], over: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens or seconds from where every seed has been evaluated, and there the lowest, median and highest loss.

    Between two evaluations the line is straight, and a run that is done keeps its last loss. To the median a run that
    diverged or failed is at infinity from its end on, and an infinite median is a gap (NaN); to the bounds it is gone.
    """
    points = [(run, *_points(run, over)) for run in runs if run["evals"]]
    if not points:
        return (np.array([]),) * 4
    x = np.unique(np.concatenate([xs for _, xs, _ in points]))
    x = x[x >= max(xs[0] for _, xs, _ in points)]
    ends = [np.inf if run["status"] in BROKEN else losses[-1] for run, _, losses in points]
    values = np.stack([np.interp(x, xs, losses, right=end) for (_, xs, losses), end in zip(points, ends, strict=True)])
    going = np.isfinite(values).any(axis=0)
    x, values = x[going], values[:, going]
    middle, finite = np.median(values, axis=0), np.where(np.isfinite(values), values, np.nan)
    return x, np.nanmin(finite, axis=0), np.where(np.isfinite(middle), middle, np.nan), np.nanmax(finite, axis=0)


def _points(run: Mapping[str, Any], over: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens or seconds, and the losses, of a run's evaluations."""
    x, losses = (np.array([one[key] for one in run["evals"]], float) for key in (over, "valid_loss"))
    return x, losses


def _panels(count: int) -> tuple["Figure", list["Axes"]]:
    """One panel, or many small ones on equal axes, three in a row."""
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
    """Limits and labels of all panels, for all but the first tenth of a training: that falls from too high to show."""
    from matplotlib.ticker import MaxNLocator

    late, ends, target = [], [1.0], log["target"]["loss"]
    for run in log["runs"]:
        xs, losses = _points(run, over)
        late += losses[xs >= max([0.0, *xs]) / 10].tolist()
        ends.append(max([0.0, *xs]))
    low, high = min([*late, target or np.inf]), float(np.quantile(late or [1.0], 0.97))
    axes.set_ylim(low - 0.05 * (high - low), max(high, target or 0.0) * 1.02)
    if over == "tokens":
        axes.set_xlim(0, max(ends))
        axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
        axes.figure.supxlabel(_doubted(log, "training tokens"), fontsize=9)
        return
    unit, name = next(pair for pair in TIME_UNITS if max(ends) >= 3 * pair[0] or pair[0] == 1)
    ticks = np.asarray(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(0, max(ends) / unit))
    axes.set_xticks(ticks * unit, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(0, max(ends))
    axes.figure.supxlabel(_doubted(log, f"training time on {chip(log)} ({name})"), fontsize=9)


def _named_once(log: Log, grid: Sequence["Axes"]) -> list[Any]:
    """The legend's entries: each line of any panel once, the band, and the cross where there is one."""
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


def draw_speed(log: Log) -> Picture:
    """Tokens per second, the reference's bars hatched."""
    values = [one["tokens_per_second"]["median"] for one in log["rates"]]
    axes = _bars(log, values, [rate(one).text for one in log["rates"]])
    for y, one in enumerate(log["rates"]):
        low, high = one["tokens_per_second"]["low"], one["tokens_per_second"]["high"]
        if low is not None and high is not None:
            axes.plot([low, high], [y, y], color=INK, linewidth=1.2)
    _title(axes, "Training tokens per second, 95 % intervals")
    axes.set_xlabel(_doubted(log, f"tokens/s on {chip(log)}"))
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    said = "; ".join(f"{one['name']} {rate(one).text}" for one in log["rates"])
    return Picture(name="speed", shows=f"Tokens per second on {chip(log)}: {said}.", figure=_figure(axes))


def draw_memory(log: Log) -> Picture:
    """Memory at the peak of training."""
    axes = _bars(
        log,
        [one["memory_bytes"] / 2**30 for one in log["rates"]],
        [memory(one["memory_bytes"]) for one in log["rates"]],
    )
    _title(axes, "Peak memory of training")
    axes.set_xlabel(_doubted(log, f"GiB on {chip(log)}"))
    said = "; ".join(f"{one['name']} {memory(one['memory_bytes'])}" for one in log["rates"])
    return Picture(name="memory", shows=f"Peak memory: {said}.", figure=_figure(axes))


def _bars(log: Log, values: Sequence[float], texts: Sequence[str]) -> "Axes":
    names = [one["name"] for one in log["rates"]]
    axes = _rows(names)
    for y, (name, value) in enumerate(zip(names, values, strict=True)):
        look: dict[str, Any] = {"hatch": "////", "facecolor": "none"} if backend(name) else {"facecolor": BLUE}
        axes.barh(y, value, height=0.62, edgecolor=BLUE, linewidth=0.8, **look)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=5)
    _beside(axes, texts)
    return axes


def _rows(names: Sequence[str]) -> "Axes":
    """Axes with a row for each name, the first on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1.15 + 0.27 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, pad=7)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _beside(axes: "Axes", texts: Sequence[str]) -> None:
    """A column of figures to the right of the rows."""
    for y, text in enumerate(texts):
        axes.text(1.03, y, text, transform=axes.get_yaxis_transform(), va="center_baseline", fontsize=8.5)


def _doubted(log: Log, label: str) -> str:
    """An axis label, and below it what a picture must not lose when it is copied: that it is rough."""
    return f"{label}\n{caveat(log)}".rstrip()


def _title(axes: "Axes", text: str) -> None:
    _figure(axes).suptitle(text, x=0.01, ha="left", fontsize=9.5)


def _figure(axes: "Axes") -> "Figure":
    return axes.figure  # type: ignore[return-value]
