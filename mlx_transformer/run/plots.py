"""The pictures of a run, loss.png and a translator's lengths.png, and the style of all plots."""

import contextlib
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_transformer.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

# Okabe & Ito 2008: distinguishable with any kind of color vision, and in gray by lightness, line style and marker
VALID_COLOR, TRAIN_COLOR, FLOOR_COLOR, UNIFORM_COLOR = "#0072B2", "#E69F00", "#009E73", "#555555"
TIME_UNITS = ((3600, "h"), (60, "min"), (1, "s"))
_PANELS: dict[str, dict[str, dict[str, str]]] = {  # label: keys of curve.jsonl, and how each is drawn
    "accuracy": {"accuracy": {}},
    "learning rate": {"learning_rate": {}},
    "gradient norm": {"grad_norm": {}},
    "experts' load": {
        "router_most_load": {"label": "busiest expert"},
        "router_least_load": {"label": "idlest expert", "linestyle": "--"},
    },
    "network's share": {"gate": {}},
}
_ONE_AT_A_TIME = threading.RLock()  # matplotlib's settings are those of the process


@contextlib.contextmanager
def drawing(style: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Draw with matplotlib's defaults and a style on top: nobody's matplotlibrc or MPLBACKEND changes a picture.

    Everything is drawn and written inside it, also as a decorator. Text is literal: a name may have a dollar sign.
    """
    _import_matplotlib()
    from matplotlib.style import context

    with _ONE_AT_A_TIME, context(["default", {"text.parse_math": False, **(style or {})}]):
        yield


def _import_matplotlib() -> None:
    """Import matplotlib, which refuses to be imported with an MPLBACKEND that it does not know."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib as mpl
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with contextlib.suppress(ValueError):
            mpl.rcParams["backend"] = backend


@drawing()
def draw_loss(path: Path, result: Record, curve: Sequence[Record]) -> None:
    """Write the picture as a PNG: loss over tokens, the clock along the top, bits per byte on the right.

    Below it the accuracy of a task, the learning rate, the gradient norm before clipping, the load of a router's
    busiest and idlest expert relative to an equal share, and the mean gate of a mixture with an n-gram expert, where
    the run has them. result is a result.json, curve the lines of a curve.jsonl; null, NaN and infinity leave gaps. The
    same input gives the same bytes. Raises OSError.
    """
    from matplotlib.figure import Figure  # here: half a second that only plots need

    panels = {
        label: keys for label, keys in _PANELS.items() if any(len(finite(series(curve, None, key)[1])) for key in keys)
    }
    figure = Figure(figsize=(7.5, 4.8 + 1.2 * len(panels)), dpi=150, layout="constrained")
    axes, *below = figure.subplots(
        1 + len(panels), sharex=True, height_ratios=(4, *[1] * len(panels)), squeeze=False
    ).flat
    _draw_series(axes, curve)
    _draw_bounds(axes, result, curve)
    _draw_clock(axes, curve)
    _draw_bits(axes, result)
    axes.set_title(f"{title(result)}, {short(result['parameters']['total'])} parameters", pad=10)
    axes.legend(loc="best", framealpha=1, edgecolor="none", fontsize=9)
    for panel, (label, keys) in zip(below, panels.items(), strict=True):
        for key, style in keys.items():
            panel.plot(*series(curve, None, key), color=TRAIN_COLOR, linewidth=1, **style)
        panel.set_ylim(bottom=0)
        if label == "accuracy":
            _draw_levels(panel, curve)
        panel.set_ylabel(label)
        if len(keys) > 1:
            panel.legend(loc="best", framealpha=1, edgecolor="none", fontsize=8, ncols=len(keys))
    for panel in (axes, *below):
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    (axes, *below)[-1].set_xlabel("training tokens")
    figure.align_ylabels()
    write_png(figure, path)


@drawing()
def draw_lengths(path: Path, result: Record) -> None:
    """Write the exact match of a translator by the length of the source as a PNG, a line per test and search.

    Of pairs of several kinds those of the sentences: a sum in digits is long in another way. result is a result.json
    with translations. The same input gives the same bytes. Raises OSError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), dpi=150, layout="constrained")
    axes, quality = figure.subplots(), result["quality"]
    beam, colors = f"beam search ({quality['beam']})", (VALID_COLOR, TRAIN_COLOR, FLOOR_COLOR)
    firsts: set[int] = set()
    for (name, scores), color in zip(quality["translations"].items(), colors, strict=False):
        for search, own, style in ((beam, scores, "o-"), ("greedy", scores["greedy"], "s:")):
            found = own.get("by_kind", {}).get("sentences", own)
            words, _, shares = zip(*found["by_length"], strict=True)
            label = f"{name}, {search}: {100 * found['exact_match']:.1f} %"
            axes.plot(words, [100 * share for share in shares], style, color=color, markersize=4, label=label)
            firsts.update(words)
    axes.set_title(f"{title(result)}: sentences translated exactly", pad=10)
    axes.set_xticks(sorted(firsts), [f"{first}-{first + 3}" for first in sorted(firsts)])
    axes.set_xlabel("length of the source (words)")
    axes.set_ylabel("exact match (%)")
    axes.set_ylim(-3, 103)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="best", framealpha=1, edgecolor="none", fontsize=9)
    write_png(figure, path)


def _draw_levels(axes: "Axes", curve: Sequence[Record]) -> None:
    """Draw the accuracy of each level of a task behind their mean."""
    for key in dict.fromkeys(key for record in curve for key in record if key.startswith("accuracy, ")):
        axes.plot(*series(curve, None, key), color=UNIFORM_COLOR, linewidth=0.5, zorder=1)
    axes.set_ylim(0, 1.02)


def write_png(figure: "Figure", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a figure, inside `drawing`, as a PNG whose bytes depend on nothing else. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None, **(metadata or {})})
    atomic_write(path, buffer.getvalue())


def series(curve: Sequence[Record], kind: str | None, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens, ascending, and the values of a key in the records of a kind (None: all); null becomes NaN."""
    records = [record for record in curve if kind in (None, record["kind"]) and key in record]
    tokens = np.array([record["tokens"] for record in records], float)
    values = np.array([math.nan if record[key] is None else record[key] for record in records], float)
    order = np.argsort(tokens, kind="stable")
    return tokens[order], values[order]


def finite(values: np.ndarray) -> np.ndarray:
    """Return the values that are finite."""
    return values[np.isfinite(values)]


def short(number: float) -> str:
    """Format a number with at most three digits: 1234567 -> 1.23M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{float(f'{number / unit:.3g}'):g}{letter}"
    return f"{number:g}"


def title(result: Record) -> str:
    """Name the model and the corpus: "Phase 3 (rope) on fables", "my_idea.py on fables"."""
    name = result["code"]["file"] if result["code"] else f"Phase {result['phase']}"
    branch = f" ({result['branch']})" if result["branch"] else ""
    return f"{name}{branch} on {result['corpus']['name']}"


def _draw_series(axes: "Axes", curve: Sequence[Record]) -> None:
    tokens, losses = series(curve, "log", "loss")
    axes.plot(tokens, losses, color=TRAIN_COLOR, linewidth=1, label="training")
    tokens, losses = series(curve, "eval", "valid_loss")
    every = max(1, len(tokens) // 25)
    marks: dict[str, Any] = {"marker": "o", "markersize": 4, "markevery": every}
    label = f"validation, best {finite(losses).min():.3f}" if len(finite(losses)) else "validation"
    axes.plot(tokens, losses, color=VALID_COLOR, linewidth=1.8, label=label, **marks)
    axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    axes.set_ylabel("loss (nats per token)")


def _draw_bounds(axes: "Axes", result: Record, curve: Sequence[Record]) -> None:
    """Draw the uniform guess and the entropy floor as horizontal lines, and set limits that hold both."""
    vocab = result["tokenizer"]["vocab_size"]
    uniform, nats, floor = math.log(vocab), _nats_per_bit(result), result["corpus"]["floor_bpb"]
    axes.axhline(uniform, color=UNIFORM_COLOR, linestyle="--", linewidth=1.2, label=f"uniform guess, ln {vocab:,}")
    bounds = [uniform]
    if floor is not None and nats is not None:
        bounds.append(floor * nats)
        axes.axhline(bounds[-1], color=FLOOR_COLOR, linestyle=":", linewidth=1.8, label="entropy floor of the text")
    losses = np.concatenate([series(curve, "log", "loss")[1], series(curve, "eval", "valid_loss")[1], bounds])
    low, high = finite(losses).min(), finite(losses).max()
    axes.set_ylim(max(0.0, low - 0.5), min(high, 1.5 * uniform) * 1.04)
    axes.set_xlim(0, 1.02 * max([1.0, *series(curve, None, "tokens")[0]]))


def _draw_clock(axes: "Axes", curve: Sequence[Record]) -> None:
    """Draw training time along the top; its ticks are uneven where the throughput changes."""
    from matplotlib.ticker import MaxNLocator

    tokens, seconds = series(curve, None, "seconds")
    end = max([0.0, *finite(seconds)])
    if end == 0:
        return
    unit, name = next(pair for pair in TIME_UNITS if end >= 3 * pair[0] or pair[0] == 1)
    ticks = np.array([tick for tick in MaxNLocator(6).tick_values(0, end / unit) if 0 <= tick * unit <= end])
    places = np.interp(ticks * unit, [0.0, *seconds], [0.0, *tokens])
    clear = [i for i in range(len(ticks)) if i == 0 or places[i] - places[i - 1] > 0.04 * places[-1]]  # do not overlap
    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    top.set_xticks(places[clear], [f"{tick:g}" for tick in ticks[clear]])
    top.set_xlabel(f"training time ({name})")


def _draw_bits(axes: "Axes", result: Record) -> None:
    nats = _nats_per_bit(result)
    if nats is not None:
        right = axes.twinx()
        right.set_ylim(*(limit / nats for limit in axes.get_ylim()))
        right.set_ylabel("bits per byte")


def _nats_per_bit(result: Record) -> float | None:
    """Return nats per token per bit per byte on the validation text; None without bits per byte."""
    loss, bits = result["best_valid_loss"], result["best_valid_bpb"]
    return loss / bits if loss and bits else None
