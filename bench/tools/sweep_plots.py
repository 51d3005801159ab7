"""Plots of a sweep: maps over batch size and sequence length, or lines over the sequence length."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.compare.plots import COLORS, INK, MUTED, RULE, STYLE, Plot
from bench.tools.throughput import median_seconds
from mlx_transformer.run.plots import drawing, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

Setting = Mapping[str, Any]
Axis = tuple[list[int], list[int], list[int]]  # widths, sequence lengths, batch sizes, each ascending
_LIGHT = 0.55  # of the scale; above it the ground is light enough for dark text
_LABELS = {
    "forward": "forward (ms)",
    "gradients": "forward and backward (ms)",
    "step": "training step (ms)",
    "decode": "decoding a token (ms)",
    "products": "matrix products of a step (ms)",
}


def draw(log: Mapping[str, Any]) -> list[Plot]:
    """Draw sweep.json: lines for several variants of one width and batch size, else a picture of maps per variant."""
    settings = log["settings"]
    names = list(dict.fromkeys(one["name"] for one in settings))
    if len(names) > 1 and len({(one["d_model"], one["batch_size"]) for one in settings}) == 1:
        return [draw_lines(log, names)]
    return [draw_maps(log, name, "sweep" + (f"_{i}" if i else "")) for i, name in enumerate(names)]


@drawing(STYLE)
def draw_lines(log: Mapping[str, Any], names: Sequence[str]) -> Plot:
    """Draw a panel for each pass's time and one for the peak memory, over the sequence length, a line per variant."""
    from matplotlib.figure import Figure

    done = [one for one in log["settings"] if "pass_seconds" in one]
    passes = dict.fromkeys(name for one in done for name in one["pass_seconds"])
    panels: dict[str, Callable[[Setting], float]] = {_LABELS[name]: _milliseconds(name) for name in passes}
    unit, size = _memory_unit(done)
    panels[f"peak memory ({unit})"] = lambda one: max(one["peak_bytes"].values()) / size
    figure = Figure(figsize=(2.8 * len(panels), 3), layout="constrained")
    for axes, (label, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        lines = {}
        for name in names:
            own = sorted((one for one in done if one["name"] == name), key=lambda one: one["seq_len"])
            lines[name] = [one["seq_len"] for one in own], [value(one) for one in own]
        draw_panel(axes, label, lines)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(names), frameon=False)
    return Plot(name="sweep", description="Time and peak memory over the sequence length.", figure=figure)


def draw_panel(
    axes: "Axes",
    label: str,
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    ends: Mapping[str, float | None] | None = None,
) -> None:
    """Draw lines by name over the sequence length, both axes logarithmic. ends: a number beside the end of each."""
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        axes.plot(xs, ys, marker="os^DvPX"[i % 7], color=color, markersize=4, label=name)
        if ends and xs and (end := ends[name]) is not None:
            place = {"xytext": (5, -3), "textcoords": "offset points"}
            axes.annotate(f"{end:.2f}", (xs[-1], ys[-1]), **place, color=color, fontsize=8)  # type: ignore[arg-type]
    lengths = sorted({x for xs, _ in lines.values() for x in xs})
    axes.set(xscale="log", yscale="log", xlabel="sequence length, tokens")
    low, high = axes.get_ylim()
    axes.set_xticks(lengths, map(str, lengths), rotation=45)
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if low <= value <= high else "")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
    axes.tick_params(which="both", labelsize=8)
    axes.set_title(label, loc="left", fontsize=9)


def _memory_unit(settings: Sequence[Setting]) -> tuple[str, float]:
    """Return the unit for the largest peak, and its bytes."""
    largest = max((peak for one in settings for peak in one.get("peak_bytes", {}).values()), default=0)
    return ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)


def _milliseconds(name: str) -> Callable[[Setting], float]:
    return lambda one: 1000 * median_seconds(one, name)


@drawing(STYLE)
def draw_maps(log: Mapping[str, Any], name: str, file: str) -> Plot:
    """Draw a row of maps for the throughput and one for the peak memory; what did not fit is hatched."""
    from matplotlib.figure import Figure

    settings = [one for one in log["settings"] if one["name"] == name]
    widths, lengths, batches = axis = _axis(settings)
    inches = max(6.0, 1 + 0.62 * len(widths) * len(batches)), max(4.2, 1.6 + 0.9 * len(lengths))
    figure = Figure(figsize=inches, layout="constrained")
    throughput, memory = figure.subplots(2, len(widths), squeeze=False, sharex=True, sharey=True)
    _draw_row(throughput, settings, axis, "tokens_per_second", lambda n, one: f"{short(n)}\n{one['matmul_share']:.0%}")
    unit, size = _memory_unit(settings)
    peaks = [
        {**one, "peak": max(one["peak_bytes"].values()) / size} if "peak_bytes" in one else one for one in settings
    ]
    _draw_row(memory, peaks, axis, "peak", lambda n, one: f"{n:.2g}" if n < 100 else f"{n:.0f}")
    for above, below, width in zip(throughput, memory, widths, strict=True):
        above.set_title(f"d_model {width}")
        below.set_xlabel("batch size, sequences")
    for axes, what in ((throughput[0], "tokens/s, MFU"), (memory[0], f"peak memory, {unit}")):
        axes.set_ylabel(f"{what}\nsequence length, tokens")
    figure.suptitle(f"{name}, whole training step\n{log['machine']['device']}", fontsize=8.5)
    return Plot(name=file, description="Throughput and peak memory of a training step.", figure=figure)


def _axis(settings: Sequence[Setting]) -> Axis:
    widths, lengths, batches = (
        sorted({one[name] for one in settings}) for name in ("d_model", "seq_len", "batch_size")
    )
    return widths, lengths, batches


def _draw_row(
    row: Sequence["Axes"], settings: Sequence[Setting], axis: Axis, key: str, label: Callable[[float, Setting], str]
) -> None:
    """Draw the maps of one figure for all widths, on one logarithmic scale."""
    from matplotlib.colors import LogNorm

    values = [one[key] for one in settings if key in one] or [1.0]
    norm = LogNorm(min(values) * 0.99, max(values) * 1.01)
    for axes, width in zip(row, axis[0], strict=True):
        _draw_map(axes, [one for one in settings if one["d_model"] == width], axis, key, norm)
        for one in settings:
            if one["d_model"] == width:
                text = label(one[key], one) if key in one else "no\nmemory" if "why" in one else ""
                color = (INK if norm(one[key]) > _LIGHT else "white") if key in one else MUTED
                place = axis[2].index(one["batch_size"]), axis[1].index(one["seq_len"])
                axes.text(*place, text, ha="center", va="center", fontsize=7, color=color)


def _draw_map(axes: "Axes", settings: Sequence[Setting], axis: Axis, key: str, norm: "Normalize") -> None:
    _, lengths, batches = axis
    grid = np.full((len(lengths), len(batches)), np.nan)
    for one in settings:
        grid[lengths.index(one["seq_len"]), batches.index(one["batch_size"])] = one.get(key, np.nan)
    axes.patch.set(hatch="///", edgecolor=RULE)  # visible where there is no number
    axes.imshow(grid, cmap="cividis", norm=norm, aspect="auto", origin="lower")
    axes.set_xticks(range(len(batches)), map(str, batches))
    axes.set_yticks(range(len(lengths)), map(str, lengths))
