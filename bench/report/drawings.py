"""Draw the figures of the pages of results, without their titles (see figures.py)."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.compare import plots, summary
from bench.compare.plots import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RULE, SKY, VERMILION, WIDTH, band
from bench.compare.summary import Log
from bench.report import findings
from bench.report.findings import Steps, label
from mlx_transformer.run.plots import finite, series, short
from mlx_transformer.utils.text import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {**plots.STYLE, "figure.facecolor": "white", "lines.linewidth": 1.5, "lines.markersize": 4.5}
_COLORS = (INK, BLUE, SKY, GREEN, PURPLE, VERMILION, ORANGE, MUTED)  # the sixth, of phase 6, stands out
_STROKES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), "-", (0, (3, 1)), "--")
_MARKERS = "osD^vPX*"


def _figure(height: float, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """Make panels one below the other, as wide as a phone shows them readably."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    for axes in grid:
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, grid


def _look(i: int) -> dict[str, Any]:
    """Return color, stroke and marker of the i-th line."""
    return {"color": _COLORS[i % 8], "linestyle": _STROKES[i % 8], "marker": _MARKERS[i % 8]}


def _legend(figure: "Figure", axes: "Axes", columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * rows)
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=2.8, columnspacing=1.2)


def _draw_bands(axes: "Axes", log: Log, scale: Callable[[str], float]) -> None:
    """Draw each variant's median loss and the range over its seeds, over scale(name) times the tokens."""
    names = summary.variants(log)
    bases = list(dict.fromkeys(map(summary.base, names)))
    for name in names:
        x, low, middle, high = band(summary.runs_of(log, name), "tokens")
        look = _look(bases.index(summary.base(name)))
        if backend := summary.backend(name):
            look |= {"linestyle": plots.LINES.get(backend, ":"), "marker": "", "linewidth": 2.4, "alpha": 0.7}
        x = x * scale(name)
        axes.plot(x, middle, label=name, markevery=max(1, len(x) // 8), **look)
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    target = log["target"]["loss"]
    axes.axhline(target, color=MUTED, linestyle=(0, (1, 2)), linewidth=1.2, label=f"target {target:.3f}", zorder=1)
    late = [one["valid_loss"] for run in log["runs"] for one in run["evals"][len(run["evals"]) // 10 :]]
    axes.set_ylim(min([*late, target]) - 0.04, float(np.quantile(late, 0.98)) + 0.1)
    axes.set_ylabel("validation loss (nats per token)")


def race(log: Log) -> "Figure":
    """Draw the validation loss over the training time, on a logarithmic axis: tokens ÷ interleaved throughput."""
    figure, (axes,) = _figure(3.3)
    speeds = {row["name"]: row["tokens_per_second"]["median"] for row in log["throughput"]}
    _draw_bands(axes, log, lambda name: 1 / speeds[name])
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    ticks = [unit * 10**power for power in range(6) for unit in (1, 2, 5) if left <= unit * 10**power <= right]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"training time on {summary.chip(log)}, seconds (log scale)")
    _legend(figure, axes, 3)
    return figure


def ladder(log: Log) -> "Figure":
    """Draw each variant's speedup over its baseline: its interval, and the figure beside it; a cross: not reached."""
    rows, key = summary.ladder(log), summary.headline_measure(log)
    figure, (axes,) = _figure(0.75 + 0.21 * len(rows))
    known = [row[key][bound] for row in rows for bound in ("ratio", "low", "high") if row[key] and row[key][bound]]
    left, right = min([0.9, *known]) / 1.08, max([1.1, *known]) * 1.08
    for y, row in enumerate(rows):
        found, look = row[key], plots.KINDS[summary.verdict(row[key])]
        if found["low"] or found["high"]:
            axes.plot([found["low"] or left, found["high"] or right], [y, y], color=MUTED, linewidth=1.4, marker="")
        axes.plot(found["ratio"] or left, y, linestyle="", markersize=6, clip_on=False, **look)
        axes.text(1.03, y, summary.ratio(found).text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    axes.axvline(1, color=INK, linewidth=0.9, zorder=1)
    axes.set_yticks(range(len(rows)), [findings.change(row["name"], row["over"]) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    plots.mark_ratios(axes.xaxis, left, right)
    over, _ = summary.against(rows)
    axes.set_xlabel(f"speedup over {over} (log scale); bars: 95 %")
    _legend_of_verdicts(figure, [summary.verdict(row[key]) for row in rows])
    return figure


def _legend_of_verdicts(figure: "Figure", verdicts: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    shown = [kind for kind in plots.KINDS if kind in verdicts]
    handles = [Line2D([], [], linestyle="", markersize=6, label=kind, **plots.KINDS[kind]) for kind in shown]
    figure.set_figheight(figure.get_figheight() + 0.19)
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), handletextpad=0.2)


def loss(log: Log) -> "Figure":
    """Draw the validation loss over the training tokens, the median and the range over the seeds."""
    figure, (axes,) = _figure(3.0)
    _draw_bands(axes, log, lambda name: 1)
    axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    axes.set_xlabel(f"training tokens; bands: lowest to highest of {len(log['seeds'])} seeds")
    _legend(figure, axes, 2 if max(map(len, summary.variants(log))) > 14 else 3)
    return figure


def run(result: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw the training and validation loss of one run over its tokens."""
    figure, (axes,) = _figure(2.8)
    axes.plot(*series(curve, "log", "loss"), color=ORANGE, linewidth=1, label="training")
    axes.plot(*series(curve, "eval", "valid_loss"), color=BLUE, marker="o", label="validation")
    axes.set_ylim(0.9 * finite(series(curve, "eval", "valid_loss")[1]).min(), None)
    axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)")
    _legend(figure, axes, 2)
    return figure


def gate(*curves: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw the mean gate of a mixture with an n-gram expert over training, a line per seed."""
    figure, (axes,) = _figure(2.4)
    for curve in curves:
        axes.plot(*series(curve, "log", "gate"), color=BLUE, linewidth=1, alpha=0.7)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    axes.set(xlabel=f"training tokens ({plural(len(curves), 'seed')})", ylabel="mean gate")
    return figure


def steps(logs: Steps) -> "Figure":
    """Draw the speedup of a training step over PyTorch, a row per phase, a marker per size."""
    figure, (axes,) = _figure(2.9)
    sizes = [size for size in ("nano", "small", "base") if any(log["size"] == size for log in logs)]
    phases = sorted({log["phase"] for log in logs})
    for i, size in enumerate(sizes):
        for log in (log for log in logs if log["measures"] == "step" and log["size"] == size):
            found = next(one for one in log["ratios"] if one["b"] == "torch")
            y = phases.index(log["phase"]) + 0.24 * (i - (len(sizes) - 1) / 2)
            axes.plot([found["low"], found["high"]], [y, y], color=_COLORS[i + 1], linewidth=1.6)
            axes.plot(
                found["ratio"],
                y,
                _MARKERS[i],
                color=_COLORS[i + 1],
                label=size if log["phase"] == phases[0] else None,
            )
    axes.axvline(1, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(phases)), [f"phase {phase}" for phase in phases])
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens/s of MLX ÷ PyTorch, {logs[0]['machine']['device'].split(',')[0]}; bars: 95 %")
    _legend(figure, axes, 3)
    return figure


def length(log: Log) -> "Figure":
    """Draw the loss at each length above that at the trained one, a line per variant, clipped above one nat."""
    figure, (axes,) = _figure(3.3)
    lengths = list(next(one for one in log["runs"] if one["status"] == "done")["losses"])
    at = {one: findings.losses_at(log, one) for one in lengths}
    ordered = sorted(at[lengths[0]], key=lambda name: at[lengths[-1]][name] - at[lengths[0]][name], reverse=True)
    for i, name in enumerate(ordered):
        extra = [at[one][name] - at[lengths[0]][name] for one in lengths]
        shown = "learned positions" if name == f"phase {log['phase']}" else label(name)
        axes.plot(range(len(lengths)), extra, label=shown, **_look(i))
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_xlabel(f"tokens of a sequence; trained on {lengths[0]}")
    axes.set_ylabel("extra loss (nats per token)")
    _legend(figure, axes, 2)
    return figure


def longcontext(log: Log) -> "Figure":
    """Draw time of a step, its peak memory and the time of a decoded token over the length, each axis logarithmic."""
    figure, grid = _figure(6.0, 3)
    panels = [("gradients", 1e3, "forward and backward (ms)"), ("peak", 1e-6, "peak memory (MB)")]
    panels.append(("decode", 1e3, "a decoded token (ms)"))
    for axes, (key, unit, text) in zip(grid, panels, strict=True):
        for i, name in enumerate(dict.fromkeys(one["name"] for one in log["settings"])):
            points = findings.passes(log, name)
            values = [unit * one[key] for one in points.values()]
            axes.plot(list(points), values, label=label(name) if i else "full attention", **_look(i + 1))
        axes.set(xscale="log", yscale="log", ylabel=text)
        axes.set_xticks(list(points), [f"{tick:,}" for tick in points])
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
    grid[-1].set_xlabel(f"tokens of the sequence (phase {log['phase']} at {log['size']})")
    _legend(figure, grid[0], 2)
    return figure


def fables(log: Log) -> "Figure":
    """Draw how many times the entropy each variant's loss is, and how many of its sentences are consistent."""
    figure, grid = _figure(4.4, 2)
    names = list(dict.fromkeys(row["name"] for row in log["rows"]))
    budgets = {"max_tokens": ("equal tokens", BLUE, "o", -0.15), "max_seconds": ("equal time", VERMILION, "s", 0.15)}
    for axes, key, unit in zip(grid, ("ratio", "consistent_sentences"), (1, 100), strict=True):
        for row in log["rows"]:
            text, color, marker, aside = budgets[row["budget"]]
            found, x = row[key], names.index(row["name"]) + aside
            axes.plot([x, x], [unit * found["low"], unit * found["high"]], color=color, linewidth=1.6)
            axes.plot(x, unit * found["median"], marker, color=color, label=text if row["name"] == names[0] else None)
        axes.set_xticks(range(len(names)), [_wrapped(name.removeprefix("phase ")) for name in names])
    grid[0].set_ylabel("loss ÷ entropy (×)")
    grid[0].axhline(1, color=INK, linewidth=0.9)
    grid[0].set_ylim(0.85, None)
    grid[1].set_ylabel("consistent sentences (%)")
    grid[1].set_xlabel(f"phase; bars: 95 % intervals over {len(log['seeds'])} seeds")
    _legend(figure, grid[0], 2)
    return figure


def _wrapped(name: str) -> str:
    return name.replace(":", ":\n").replace("_", "\n")


def sweep(log: Log) -> "Figure":
    """Draw the throughput over the batch size: a color for each width, a stroke for each length."""
    figure, (axes,) = _figure(3.0)
    done = [one for one in log["settings"] if "tokens_per_second" in one]
    widths, lengths = (sorted({one[key] for one in done}) for key in ("d_model", "seq_len"))
    for i, width in enumerate(widths):
        for j, of in enumerate(lengths):
            own = sorted(
                (one for one in done if (one["d_model"], one["seq_len"]) == (width, of)),
                key=lambda one: one["batch_size"],
            )
            look = {"color": _COLORS[i + 1], "marker": _MARKERS[i], "linestyle": _STROKES[j]}
            xs, ys = ([one[key] for one in own] for key in ("batch_size", "tokens_per_second"))
            axes.plot(xs, ys, label=f"{width} wide, {of} long", **look)
    axes.set(xscale="log", yscale="log", ylabel=f"tokens/s on {log['machine']['device'].split(',')[0]}")
    batches = sorted({one["batch_size"] for one in done})
    axes.set_xticks(batches, map(str, batches))
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.yaxis.set_minor_formatter(lambda value, _: short(value) if f"{value:g}"[0] in "25" else "")
    axes.set_xlabel("batch size (sequences)")
    _legend(figure, axes, 2)
    return figure
