"""Table and plot of a log of `bench growth`: loss over the compute, grown and from scratch."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bench.compare import stats
from bench.compare.plots import BLUE, GREEN, INK, MUTED, RULE, STYLE, VERMILION, WIDTH, Plot
from bench.compare.summary import Cell, Log, Row
from bench.compare.tables import Table, spread
from mlx_transformer.run.plots import drawing, short
from mlx_transformer.utils.text import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LARGE = {"experts": "Experts, upcycled", "deep": "Twice the layers, stacked"}  # kind -> title of its panel


def label(row: Row) -> str:
    """Name what a run is: "deep from scratch", "deep grown at 30 %", "dense before growing at 30 %"."""
    if row["share"] is None:
        return f"{row['kind']} from scratch"
    return f"{row['kind']} {'grown' if row['grown'] else 'before growing'} at {100 * row['share']:.0f} %"


def final_losses(log: Log, name: str) -> list[float]:
    """Return the last validation loss of each seed of a kind of run; inf for one that diverged."""
    own = sorted((run for run in log["runs"] if label(run) == name), key=lambda run: run["seed"])
    return [run["evals"][-1]["valid_loss"] if run["status"] == "done" else math.inf for run in own]


def table(log: Log) -> Table:
    """One row per kind of run: tokens, final loss, and its difference from the same model trained from scratch."""
    rows = []
    for name in dict.fromkeys(label(run) for run in log["runs"]):
        first = next(run for run in log["runs"] if label(run) == name)
        if first["share"] is not None and not first["grown"]:
            continue  # a source
        before = round(first["spent_before"] / _flops(log, "dense"))
        tokens = f"{short(before)} + {short(first['tokens'])}" if before else short(first["tokens"])
        found = final_losses(log, name)
        cells = spread(found, ".4f"), _difference(log, found, f"{first['kind']} from scratch", name)
        rows.append((Cell(name), Cell(tokens), *cells, _difference(log, found, "dense from scratch", name)))
    note = (
        f"Each spends the floating-point operations of the dense model's {short(log['budget_tokens'])} tokens,"
        " those before growing included. Final validation loss: the median over"
        f" {plural(len(log['seeds']), 'seed')} and the range; differences are means over equal seeds with 95 %"
        " intervals by Student's t."
    )
    head = ("run", "tokens", "final loss (nats per token)", "against the same from scratch", "against dense")
    return Table(title=f"Growing at {log['size']}, at equal compute", note=note, head=head, rows=rows)


def _flops(log: Log, kind: str) -> int:
    return next(run["flops_per_token"] for run in log["runs"] if run["kind"] == kind)


def _difference(log: Log, found: Sequence[float], over: str, name: str) -> Cell:
    theirs = final_losses(log, over)
    if over == name or len(theirs) != len(found):
        return Cell("—")
    difference = stats.mean_difference(np.array(found), np.array(theirs))
    if difference is None:
        return Cell("—")
    mean, low, high = difference
    return Cell(f"{mean:+.4f} ({low:+.4f} to {high:+.4f})", mean)


@drawing(STYLE)
def draw(log: Log) -> Plot:
    """Draw a panel per larger model: the median loss over the compute, from scratch and grown."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    grid = figure.subplots(len(_LARGE), 1, sharex=True)
    for axes, (kind, title) in zip(grid, _LARGE.items(), strict=True):
        _draw_panel(axes, log, kind)
        axes.set_title(title, fontsize=9)
    figure.supylabel("validation loss, nats per token", fontsize=8.5)
    note = (
        f"total compute, as tokens of the dense model ({log['size']}; medians over {plural(len(log['seeds']), 'seed')})"
    )
    grid[-1].set_xlabel(note, fontsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2)
    return Plot(
        name="growth", description="Validation loss over the total compute, grown and from scratch.", figure=figure
    )


def _draw_panel(axes: "Axes", log: Log, kind: str) -> None:
    _line(axes, log, "dense from scratch", "dense, from scratch", MUTED, "-")
    _line(axes, log, f"{kind} from scratch", "the larger, from scratch", INK, "-")
    for share, color in zip(log["shares"], (BLUE, VERMILION, GREEN), strict=False):
        percent = f"{100 * share:.0f} %"
        _line(axes, log, f"dense before growing at {percent}", None, color, ":")
        _line(axes, log, f"{kind} grown at {percent}", f"grown at {percent}", color, "--")
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.xaxis.set_major_formatter(lambda value, _: short(value) if value else "0")
    ends = [values[-1]["valid_loss"] for run in log["runs"] if (values := run["evals"]) and run["status"] == "done"]
    axes.set_ylim(min(ends) - 0.05, max(ends) + 0.9)


def _line(axes: "Axes", log: Log, name: str, shown: str | None, color: str, style: str) -> None:
    own = [run for run in log["runs"] if label(run) == name and run["status"] == "done"]
    if not own:
        return
    unit, length = _flops(log, "dense"), min(len(run["evals"]) for run in own)
    spent = [
        (one["spent_before"] + e["tokens"] * one["flops_per_token"]) / unit for one in own[:1] for e in one["evals"]
    ]
    losses = np.median([[e["valid_loss"] for e in run["evals"][:length]] for run in own], axis=0)
    axes.plot(
        spent[:length], losses, label=shown, color=color, linestyle=style, marker="o", markersize=2.4, linewidth=1.2
    )
