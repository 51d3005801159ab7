"""Comparison of finished or unfinished runs: a table of settings that differ, a table of results, one picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from mlx_transformer.run.plots import drawing, finite, series, short, write_png
from mlx_transformer.run.settings import SETTINGS, read_settings
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import flatten_settings

# Okabe & Ito 2008, in an order in which neighbors differ in lightness too
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>"
_SETTINGS = ("phase", "corpus", "tokenizer", "config", "recipe", "code")  # of settings.json, beside its flags
_OTHER_FLAGS = {"prompt", "temperature", "top_k", "top_p", "min_p", "log", "eval_every", "save_every"}  # train alike
_RESULTS = {  # key of result.json: column head, format
    "best_valid_loss": ("best loss (nats/token)", ".4f"),
    "best_valid_bpb": ("bits per byte", ".4f"),
    "tokens": ("tokens", ",d"),
    "train_seconds": ("training (s)", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "peak_memory_bytes": ("peak memory (bytes)", ",d"),
}


@dataclass(frozen=True)
class RunRecord:
    """A run folder as it was written.

    settings: everything that decided the run, flat: {"config.d_ff": 256, "recipe.schedule": "Linear", ...}.
    result: of result.json; while the run is unfinished, as far as the curve tells.
    """

    name: str
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    curve: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Read a run folder. Raises BadInput where it holds no settings, or its files are damaged."""
        if not (folder / SETTINGS).is_file():
            raise BadInput(f"'{folder}' is no run: expected a folder with {SETTINGS}")
        stored, path = read_settings(folder), folder / "curve.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        curve = [line for text in lines if (line := _parse(text))]
        path = folder / "result.json"
        finished = path.is_file()
        result = _read_json(path) if finished else _result_so_far(curve)
        if finished and "stopped" not in result:
            raise BadInput(f"'{path}' is damaged: expected the key stopped")
        if not all(isinstance(result.get(key), int | float | None) for key in _RESULTS):
            raise BadInput(f"'{path}' is damaged: expected numbers for {', '.join(_RESULTS)}")
        return cls(str(folder), _settings(stored), result, curve)


def _settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten settings.json; a flag that sets a hyperparameter or a value of the recipe is there once."""
    values: dict[str, Any] = dict(flatten_settings({key: stored[key] for key in _SETTINGS if key in stored}))
    known = {key.rsplit(".", 1)[-1] for key in values} | _OTHER_FLAGS
    flags = {"seed": 0, **stored["flags"]}
    return {**{key: value for key, value in flags.items() if key not in known}, **values}


def _result_so_far(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses, newest = finite(series(curve, "eval", "valid_loss")[1]), curve[-1] if curve else {}
    throughput = finite(series(curve, "log", "tokens_per_second")[1])
    return {
        "best_valid_loss": float(losses.min()) if len(losses) else None,
        "tokens": newest.get("tokens"),
        "train_seconds": newest.get("seconds"),
        "tokens_per_second": float(throughput[-1]) if len(throughput) else None,
    }


def _read_json(path: Path) -> dict[str, Any]:
    value = _parse(path.read_text(encoding="utf-8", errors="replace"))
    if value is None:
        raise BadInput(f"'{path}' is damaged: expected the JSON object that a run writes")
    return value


def _parse(text: str) -> dict[str, Any] | None:
    """Decode one JSON object; None for anything else, such as the cut-off last line of a killed run."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def settings_table(runs: Sequence[RunRecord]) -> Table:
    """One row for each setting that is not the same in all runs."""
    table = Table(
        Column("setting", overflow="fold"),
        *(Column(Text(run.name), overflow="fold") for run in runs),
        title="settings that differ",
        title_justify="left",
    )
    settings = [run.settings for run in runs]
    for key in dict.fromkeys(key for own in settings for key in own):
        values = [own.get(key) for own in settings]
        if any(value != values[0] for value in values):
            table.add_row(Text(key), *("" if value is None else Text(str(value)) for value in values))
    return table


def results_table(runs: Sequence[RunRecord]) -> Table:
    """One row for each run, the lowest validation loss first."""
    heads = [head for head, _ in _RESULTS.values()]
    table = Table(Column("run", overflow="fold"), *heads, "stopped", title="results", title_justify="left")
    for run in sorted(runs, key=_best_loss):
        cells = [
            "" if run.result.get(key) is None else format(run.result[key], form) for key, (_, form) in _RESULTS.items()
        ]
        table.add_row(Text(run.name), *cells, str(run.result.get("stopped", "unfinished")))
    return table


def _best_loss(run: RunRecord) -> float:
    loss = run.result.get("best_valid_loss")
    return float("inf") if loss is None else loss


@drawing()
def draw_curves(path: Path, runs: Sequence[RunRecord]) -> None:
    """Write a PNG of every run's validation loss, over tokens (left) and over training time (right).

    Raises BadInput where no run was evaluated, OSError where the file cannot be written.
    """
    from matplotlib.figure import Figure  # half a second that only pictures need

    if not any(len(finite(series(run.curve, "eval", "valid_loss")[1])) for run in runs):
        raise BadInput(
            f"none of {', '.join(run.name for run in runs)} has been evaluated yet: there is no curve to draw"
        )
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    for i, run in enumerate(runs):
        tokens, losses = series(run.curve, "eval", "valid_loss")
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        label = f"./{run.name}" if run.name.startswith("_") else run.name  # a legend omits labels that start with _
        by_tokens.plot(tokens, losses, label=label, **style)
        by_time.plot(series(run.curve, "eval", "seconds")[1], losses, **style)
    by_tokens.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    by_tokens.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    by_time.set(xlabel="training time (s)")
    for axes in (by_tokens, by_time):
        axes.grid(color="#dddddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=min(3, len(runs)), fontsize=8)
    write_png(figure, path)
