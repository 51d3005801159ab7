"""Tables and plot of a log of `bench fables`: distance to the entropy floor, and consistency."""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.compare.plots import BLUE, INK, MUTED, RULE, STYLE, VERMILION, Plot
from bench.compare.summary import Cell, Log, Row, chip
from bench.compare.tables import Table, seconds, spread
from mlx_transformer.run.plots import drawing, short
from mlx_transformer.run.report import BINDING, FIGURES
from mlx_transformer.utils.text import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURES = {  # of a run: label and format
    "ratio": ("times the floor", ".2f"),
    "above_floor": ("bits per byte above it", ".3f"),
    **{key: (FIGURES[key][0], ".0%") for key in ("grammatical", "consistent", "cut_off", "consistent_sentences")},
}
SHARES = tuple(key for key in MEASURES if key in FIGURES)
_PANELS = {"ratio": "Times the entropy floor", "consistent_sentences": "Consistent sentences"}
_PANELS |= {"consistent": "Consistent stories"}
_LOOKS: dict[str, dict[str, Any]] = {  # distinct in grey by shape and by filling
    "max_tokens": {"color": BLUE, "marker": "o"},
    "max_seconds": {"color": VERMILION, "marker": "s", "markerfacecolor": "white"},
}
_ASIDE = {"max_tokens": -0.16, "max_seconds": 0.16}  # horizontal offset, so that the two are side by side


def table(log: Log) -> Table:
    """One row per variant and budget: medians over the seeds, and ranges."""
    rows = []
    for row in log["rows"]:
        runs = runs_of(log["runs"], row)
        measured = (spread([run[key] for run in runs], form) for key, (_, form) in MEASURES.items())
        spent = f"{short(median(_known(runs, 'tokens')))} tokens in {seconds(median(_known(runs, 'train_seconds')))} s"
        ends = ", ".join(f"{count} {why}" for why, count in Counter(run["stopped"] for run in runs).items())
        rows.append((Cell(row["name"]), Cell(_budget(log, row["budget"])), *measured, Cell(f"{spent}; {ends}")))
    meanings = " ".join(f"{FIGURES[key][0].capitalize()}: {FIGURES[key][1]}." for key in SHARES)
    note = (
        f"The floor: {log['corpus']['floor_bpb']:.4f} bits per byte. Median over seeds and the range, each run at its"
        " best evaluation; a diverged run has no samples. Each phase trains with its own recipe and stops where its"
        f" schedule ends (plateau). {meanings} Measured on {log['machine']['device']}."
    )
    head = ("variant", "budget", *(label for label, _ in MEASURES.values()), "trained for; stopped by")
    return Table(title=f"Fables at {log['size']}, against their entropy", note=note, head=head, rows=rows)


def bindings(log: Log) -> Table:
    """One row per variant and budget: the words right of each kind that the stories determine, medians and ranges."""
    kinds = {kind: found for run in log["runs"] for kind, found in run.get("bindings", {}).items()}
    rows = []
    for row in log["rows"]:
        own = [run["bindings"] for run in runs_of(log["runs"], row) if run.get("bindings")]
        rights = (spread([found[kind]["right"] for found in own if kind in found], ".0%") for kind in kinds)
        rows.append((Cell(row["name"]), Cell(_budget(log, row["budget"])), *rights))
    chance = ", ".join(f"{kind} {found['chance']:.0%}" for kind, found in kinds.items())
    note = (
        f"Words {BINDING}. By chance: {chance or 'not measured'}. Each is judged by its first token, after the true"
        " text before it. Median over seeds and the range."
    )
    return Table(title="Words that the stories determine", note=note, head=("variant", "budget", *kinds), rows=rows)


@drawing(STYLE)
def draw(log: Log) -> Plot:
    """Draw a panel per measure: the phases side by side, at equal tokens and at equal time."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    diverged = sum(run["stopped"] == "diverged" for run in log["runs"])
    panels = {key: title for key, title in _PANELS.items() if any(_known(log["runs"], key))}  # a share may be 0 in all
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    grid = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axes, (key, title) in zip(grid, panels.items(), strict=False):
        _draw_panel(axes, log, key)
        axes.set_title(title, fontsize=9)
    labels = {"max_tokens": "equal tokens: {}", "max_seconds": f"equal time: {{}} on {chip(log)}"}
    handles = [
        Line2D([], [], linestyle="", markersize=6, label=labels[budget].format(_budget(log, budget)), **look)
        for budget, look in _LOOKS.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, handletextpad=0.2, borderpad=0)
    note = f"; {diverged} of {plural(len(log['runs']), 'run')} diverged" if diverged else ""
    label = f"phase ({log['size']}); bars: medians and 95 % intervals, dots: {plural(len(log['seeds']), 'seed')}{note}"
    figure.supxlabel(label, fontsize=8.5)
    return Plot(name="fables", description=_shows(log), figure=figure)


def _draw_panel(axes: "Axes", log: Log, key: str) -> None:
    names = list(dict.fromkeys(row["name"] for row in log["rows"]))
    for row in log["rows"]:
        aside, look, found = _ASIDE[row["budget"]], _LOOKS[row["budget"]], row[key]
        x, seeds = names.index(row["name"]) + aside, _known(runs_of(log["runs"], row), key)
        axes.plot([x + 0.9 * aside] * len(seeds), seeds, ".", markersize=3, color=MUTED, clip_on=False)
        if found["low"] is not None:
            axes.plot([x, x], [found["low"], found["high"]], color=look["color"], linewidth=1.4)
        if found["median"] is not None:
            axes.plot(x, found["median"], markersize=5, linestyle="", zorder=3, clip_on=False, **look)
    labels = [name.removeprefix("phase ") for name in names]
    slope: dict[str, Any] = {"rotation": 30, "ha": "right", "fontsize": 8} if max(map(len, labels)) > 4 else {}
    axes.set_xticks(range(len(names)), labels, **slope)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    _draw_scale(axes, _known(log["runs"], key), key)


def _draw_scale(axes: "Axes", values: Sequence[float], key: str) -> None:
    """Scale from the floor, or from 0, to a little above the highest seed, whatever the intervals are."""
    if key == "ratio":
        top = max([1.1, *values])
        axes.set_ylim(1 - 0.09 * (top - 1), 1 + 1.08 * (top - 1))
        axes.axhline(1, color=INK, linewidth=1)
        axes.annotate("floor", (0.02, 1), (0, -2), ("axes fraction", "data"), "offset points", va="top", fontsize=7.5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    else:
        axes.set_ylim(0, 1.08 * max([0.05, *values]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def _shows(log: Log) -> str:
    parts = []
    for row in log["rows"]:
        ratio, share = row["ratio"]["median"], row["consistent_sentences"]["median"]
        loss = "not known" if ratio is None else f"{ratio:.2f} times the floor"
        sentences = "" if share is None else f", {share:.0%} of sentences consistent"
        parts.append(f"{row['name']} within {_budget(log, row['budget'])}: {loss}{sentences}")
    return f"Fables at {log['size']}: {'; '.join(parts)}."


def runs_of(runs: Sequence[Row], row: Row) -> list[Row]:
    """Return the runs of a row's variant within its budget, one per seed."""
    return [run for run in runs if (run["name"], run["budget"]) == (row["name"], row["budget"])]


def _known(runs: Sequence[Row], key: str) -> list[float]:
    return [run[key] for run in runs if run[key] is not None]


def _budget(log: Log, name: str) -> str:
    amount = log["budgets"][name]
    return f"{short(amount)} tokens" if name == "max_tokens" else f"{amount:g} s"
