"""Tables of branches, each judged on five axes: a comparison, `bench footprint` and `bench tasks` in one table.

{{table: axes COMPARE.json FOOTPRINT.json TASKS.json}}    the task: recall at 4x the training length
{{table: length_cost COST.json}}                          the longest length, and the slopes
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.compare import summary, tables
from bench.compare.summary import Cell, Log
from bench.tools import growth_plots, length_cost, task_plots
from bench.tools.footprint import LONG
from bench.workers.machine import shown_bytes
from bench.workers.passes import FULL

_TASK, _LEVEL = "recall", "64 pairs, 4x length"
_GUESS = 100 / 64
_CLEARLY = 5.0  # points of accuracy: above the error of a few hundred answers


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A column: its cell for a variant, and whether a variant is better than the phase there."""

    head: str
    short: str
    cell: Callable[[str], Cell]
    sign: int  # 1: more is better, -1: less is
    better: Callable[[str], bool]

    def score(self, name: str) -> float:
        """Return a number that is higher for a better variant; -inf if it was not measured."""
        value = self.cell(name).value
        return -math.inf if value is None else self.sign * value


def axes_table(comparison: Log, footprint: Log, tasks: Log | None = None) -> str:
    """Table of the branches of a phase by axis: the axis where a branch ranks best in bold, ties to the worse rank.

    Without a log of tasks there is no axis of recall.
    """
    names = summary.variants(comparison)
    phase, recipe = names[0], _shared_recipe(names)
    axes = [*_measured(comparison, phase), *_memory(footprint, phase, recipe)]
    axes += [_recall(tasks, phase, recipe)] if tasks is not None else []
    rows = []
    for name in names:
        ranks = [sum(axis.score(other) >= axis.score(name) for other in names) for axis in axes]
        cells = [axis.cell(name) for axis in axes]
        known = [rank for rank, cell in zip(ranks, cells, strict=True) if cell.value is not None]
        marked = [
            f"**{cell.text}**" if cell.value is not None and rank == min(known) else cell.text
            for cell, rank in zip(cells, ranks, strict=True)
        ]
        ahead = [axis.short for axis in axes if axis.better(name)]
        last = "—" if name == phase else ", ".join(ahead) or "nothing"
        rows.append([name.removesuffix(recipe), *marked, last])
    head = ("variant", *(axis.head for axis in axes), f"better than {phase.removesuffix(recipe)} in")
    lines = [head, ["---", *["---:"] * len(axes), "---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shared_recipe(names: Sequence[str]) -> str:
    """Return the recipe at the end of every name of a comparison, such as ":short.py:SHORT"; "" where it differs."""
    _, separator, recipe = names[0].partition(":")
    suffix = separator + recipe
    return suffix if all(name.endswith(suffix) for name in names) else ""


def _measured(log: Log, phase: str) -> list[Axis]:
    """Return the axes of a comparison: final loss and throughput."""
    losses = {str(row[0].text): row[1] for row in tables.final_losses(log).rows}
    ratios = {row["a"]: row for row in log["speed"] if row["b"] == phase}
    one = Cell("1")._replace(value=1.0)

    def lower(name: str) -> bool:
        found = summary.loss_difference(log, name, phase)
        return found is not None and found[2] < 0

    return [
        Axis(
            head="final loss (nats per token)",
            short="loss",
            cell=lambda name: losses.get(name, summary.NOT_MEASURED),
            sign=-1,
            better=lower,
        ),
        Axis(
            head="relative throughput",
            short="throughput",
            cell=lambda name: one if name == phase else summary.ratio(ratios.get(name)),
            sign=1,
            better=lambda name: name in ratios and summary.verdict(ratios[name]) == "faster",
        ),
    ]


def _memory(log: Log, phase: str, recipe: str) -> list[Axis]:
    """Return the axes of a footprint, whose names lack the recipe: a step, and the caches by token."""
    by_name = {row["name"] + recipe: row for row in log["rows"]}

    def step(name: str) -> Cell:
        row = by_name.get(name)
        return summary.NOT_MEASURED if row is None else Cell(shown_bytes(row["step_bytes"]), row["step_bytes"])

    def caches(name: str) -> Cell:
        row = by_name.get(name)
        if row is None:
            return summary.NOT_MEASURED
        value = row["cache_bytes"][str(LONG)] / LONG
        return Cell(f"{value:,.1f}" if value < 100 else f"{value:,.0f}", value)

    def less(cell: Callable[[str], Cell], share: float) -> Callable[[str], bool]:
        return lambda name: (cell(name).value or math.inf) < share * (cell(phase).value or 0)

    return [
        Axis(head="memory of a step", short="step memory", cell=step, sign=-1, better=less(step, 0.98)),
        Axis(
            head=f"decoding, bytes per token at {LONG:,}",
            short="decode memory",
            cell=caches,
            sign=-1,
            better=less(caches, 1.0),
        ),
    ]


def _recall(log: Log, phase: str, recipe: str) -> Axis:
    """Return the axis of associative recall at four times the training length, in percent."""
    seeds: dict[str, list[float]] = {
        name + recipe: [100 * value for value in task_plots.accuracies(log, name, _TASK, _LEVEL)]
        for name in log["names"]
    }

    def cell(name: str) -> Cell:
        found = tables.spread(seeds.get(name, []), ".0f")
        return found if (found.value or 0.0) > _GUESS + _CLEARLY else Cell(found.text)  # who guesses has no rank

    def better(name: str) -> bool:
        known = bool(seeds.get(name)) and bool(seeds.get(phase))
        return known and min(seeds[name]) > max(seeds[phase]) + _CLEARLY

    return Axis(head="recall at 4x the length (%)", short="recall at 4x", cell=cell, sign=1, better=better)


def length_cost_table(log: Mapping[str, Any]) -> str:
    """Table of a log of `bench length cost`: each measure at the longest length, and its slopes."""
    rows: list[Sequence[str]] = []
    longest = max(one["seq_len"] for sweep in log["sweeps"].values() for one in sweep["settings"])
    for name, own in log["slopes"].items():
        cells = []
        for measure, shown in length_cost.SHOWN.items():
            lengths, values = length_cost.line(log, name, measure)
            at = f" at {lengths[-1]:,}" if lengths and lengths[-1] < longest else ""
            slope = own[measure]["last"]
            cells += [shown(values[-1]) + at if values else FULL, "—" if slope is None else f"{slope:.2f}"]
        rows.append((name, *cells))
    head = ("variant", "step", "slope", "memory", "slope", "decoded token", "slope", "memory", "slope")
    lines = [head, ["---", *["---:"] * 8], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tasks_finding(log: Log) -> str:
    """Say which variant is right most often, task by task."""
    best: dict[str, list[str]] = {}
    for task in log["tasks"]:
        medians = {name: median(task_plots.accuracies(log, name, task) or [0.0]) for name in log["names"]}
        first = [name for name, value in medians.items() if value == max(medians.values())]
        best.setdefault(first[0] if len(first) == 1 else "several", []).append(task)
    parts = [f"{name} in {' and '.join(tasks)}" for name, tasks in best.items()]
    return f"Most often right: {', '.join(parts)}"


def growth_finding(log: Log) -> str:
    """Say how the grown models end beside those trained from scratch."""
    parts = []
    for kind, title in (("experts", "experts"), ("deep", "the deeper model")):
        scratch = median(growth_plots.final_losses(log, f"{kind} from scratch"))
        names = [f"{kind} grown at {100 * share:.0f} %" for share in log["shares"]]
        apart = min(median(growth_plots.final_losses(log, name)) for name in names) - scratch
        parts.append(f"{title} {abs(apart):.3f} nats {'above' if apart > 0 else 'below'}")
    return f"Grown at their best, against from scratch at equal compute: {' and '.join(parts)}"


def length_cost_finding(log: Mapping[str, Any]) -> str:
    """Say how the time of a step grows with the length, at its steepest and its flattest."""
    last = {name: own["step seconds"]["last"] for name, own in log["slopes"].items()}
    known = {name: value for name, value in last.items() if value is not None}
    high, low = max(known, key=lambda name: known[name]), min(known, key=lambda name: known[name])
    return (
        f"A step's time grows with the length to the power of {known[high]:.1f} in {high}, of {known[low]:.1f} in {low}"
    )


TABLES: dict[str, Callable[..., str]] = {
    "axes": axes_table,
    "length_cost": length_cost_table,
    "tasks": lambda log: tables.markdown(task_plots.table(log)),
    "task_levels": lambda log: tables.markdown(task_plots.levels_table(log)),
    "growth": lambda log: tables.markdown(growth_plots.table(log)),
}
