"""The picture of a sweep: tokens per second and memory over batch size and sequence length, a column for each width."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.compare.plots import INK, MUTED, RULE, STYLE, Picture
from mlx_transformer.run.plots import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

Setting = Mapping[str, Any]
Axis = tuple[list[int], list[int], list[int]]  # widths, sequence lengths, batch sizes, each ascending
_LIGHT = 0.55  # of the scale; above it the ground is so light that ink is read on it


def draw(log: Mapping[str, Any]) -> Picture:
    """sweep.json -> a row of maps for the rate and one for the peak memory; what did not fit is hatched."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings = log["settings"]
    widths, lengths, batches = (
        sorted({one[name] for one in settings}) for name in ("d_model", "seq_len", "batch_size")
    )
    with mpl.rc_context(dict[Any, Any](STYLE)):
        inches = max(6.0, 1 + 0.62 * len(widths) * len(batches)), max(4.2, 1.6 + 0.9 * len(lengths))
        figure = Figure(figsize=inches, layout="constrained")
        rates, memory = figure.subplots(2, len(widths), squeeze=False, sharex=True, sharey=True)
        axis = widths, lengths, batches
        _draw_row(rates, settings, axis, "tokens_per_second", lambda n, one: f"{short(n)}\n{one['matmul_share']:.0%}")
        peaks = [one | {"peak": one["peak_bytes"]["step"] / 1e9} if "peak_bytes" in one else one for one in settings]
        _draw_row(memory, peaks, axis, "peak", lambda n, one: f"{n:.2g}")
        for above, below, width in zip(rates, memory, widths, strict=True):
            above.set_title(f"d_model {width}")
            below.set_xlabel("batch size, rows")
        for axes, what in ((rates[0], "tokens/s, MFU"), (memory[0], "peak memory, GB")):
            axes.set_ylabel(f"{what}\nsequence length, tokens")
        title = f"phase {log['phase']}, whole training step\n{log['machine']['device']}"
        figure.suptitle(title, fontsize=8.5)
    return Picture(name="sweep", shows="Tokens per second and peak memory of a training step.", figure=figure)


def _draw_row(
    row: Sequence["Axes"], settings: Sequence[Setting], axis: Axis, key: str, label: Callable[[float, Setting], str]
) -> None:
    """The maps of one figure for all widths, on one logarithmic scale."""
    from matplotlib.colors import LogNorm

    found = [one[key] for one in settings if key in one] or [1.0]
    norm = LogNorm(min(found) * 0.99, max(found) * 1.01)
    for axes, width in zip(row, axis[0], strict=True):
        _draw_map(axes, [one for one in settings if one["d_model"] == width], axis, key, norm)
        for one in settings:
            if one["d_model"] == width:
                text = label(one[key], one) if key in one else "no\nmemory"
                colour = (INK if norm(one[key]) > _LIGHT else "white") if key in one else MUTED
                place = axis[2].index(one["batch_size"]), axis[1].index(one["seq_len"])
                axes.text(*place, text, ha="center", va="center", fontsize=7, color=colour)


def _draw_map(axes: "Axes", settings: Sequence[Setting], axis: Axis, key: str, norm: "Normalize") -> None:
    _, lengths, batches = axis
    grid = np.full((len(lengths), len(batches)), np.nan)
    for one in settings:
        grid[lengths.index(one["seq_len"]), batches.index(one["batch_size"])] = one.get(key, np.nan)
    axes.patch.set(hatch="///", edgecolor=RULE)  # shows where there is no number
    axes.imshow(grid, cmap="cividis", norm=norm, aspect="auto", origin="lower")
    axes.set_xticks(range(len(batches)), map(str, batches))
    axes.set_yticks(range(len(lengths)), map(str, lengths))
