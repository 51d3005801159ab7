"""How near to the entropy floor, and how consistent: the table and the picture of a log of bench fables."""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.compare.findings import Cell, Found, Log, chip
from bench.compare.plots import BLUE, INK, MUTED, RULE, STYLE, VERMILION, Picture
from bench.compare.tables import Table, seconds, spread
from mlx_transformer.run.plots import short
from mlx_transformer.run.report import FIGURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURES = {  # of a run: what it is, and how it is written
    "ratio": ("times the floor", ".2f"),
    "above_floor": ("bits per byte above it", ".3f"),
    **{key: (FIGURES[key][0], ".0%") for key in ("grammatical", "consistent", "cut_off", "consistent_sentences")},
}
SHARES = tuple(key for key in MEASURES if key in FIGURES)
_PANELS = {"ratio": "Times the entropy floor", "consistent_sentences": "Consistent sentences"}
_PANELS |= {"consistent": "Consistent stories"}
_LOOKS: dict[str, dict[str, Any]] = {  # told apart in grey by what they are and by whether they are full
    "max_tokens": {"color": BLUE, "marker": "o"},
    "max_seconds": {"color": VERMILION, "marker": "s", "markerfacecolor": "white"},
}
_ASIDE = {"max_tokens": -0.16, "max_seconds": 0.16}  # of a phase's place, so that the two stand beside each other


def table(log: Log) -> Table:
    """Contender by contender within each budget: medians over the seeds, and ranges."""
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
        " best evaluation; one that diverged writes no stories. Each phase trains by its own recipe: where its schedule"
        f" ends before the budget, it stops (plateau). {meanings} Measured on {log['machine']['device']}."
    )
    head = ("contender", "budget", *(label for label, _ in MEASURES.values()), "trained for; stopped by")
    return Table(title=f"Fables at {log['size']}, against their entropy", note=note, head=head, rows=rows)


def draw(log: Log) -> Picture:
    """A panel for each of three measures: phases beside each other, at equal tokens and at equal time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    diverged = sum(run["stopped"] == "diverged" for run in log["runs"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
            _draw_panel(axes, log, key)
            axes.set_title(title, fontsize=9)
        labels = {"max_tokens": "equal tokens: {}", "max_seconds": f"equal time: {{}} on {chip(log)}"}
        handles = [
            Line2D([], [], linestyle="", markersize=6, label=labels[budget].format(_budget(log, budget)), **look)
            for budget, look in _LOOKS.items()
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2, handletextpad=0.2, borderpad=0)
        doubt = f"; {diverged} of {len(log['runs'])} runs diverged" if diverged else ""
        said = f"phase ({log['size']}); bars: medians and 95 % intervals, dots: {len(log['seeds'])} seeds{doubt}"
        figure.supxlabel(said, fontsize=8.5)
    return Picture(name="fables", shows=_shows(log), figure=figure)


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
    """From the floor, or from nothing, to a little above the highest seed, whatever the intervals are."""
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
    told = []
    for row in log["rows"]:
        ratio, share = row["ratio"]["median"], row["consistent_sentences"]["median"]
        near = "not known" if ratio is None else f"{ratio:.2f} times the floor"
        straight = "" if share is None else f", {share:.0%} of sentences consistent"
        told.append(f"{row['name']} within {_budget(log, row['budget'])}: {near}{straight}")
    return f"Fables at {log['size']}: {'; '.join(told)}."


def runs_of(runs: Sequence[Found], row: Found) -> list[Found]:
    """The runs of a row's contender within its budget, one a seed."""
    return [run for run in runs if (run["name"], run["budget"]) == (row["name"], row["budget"])]


def _known(runs: Sequence[Found], key: str) -> list[float]:
    return [run[key] for run in runs if run[key] is not None]


def _budget(log: Log, name: str) -> str:
    amount = log["budgets"][name]
    return f"{short(amount)} tokens" if name == "max_tokens" else f"{amount:g} s"
