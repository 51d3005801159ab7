"""`python -m mlx_transformer.run list [FOLDER] | compare RUN RUN ...`: tables and a picture of past runs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_transformer.run.commands import dispatch
from mlx_transformer.run.compare import RunRecord, draw_curves, results_table, settings_table
from mlx_transformer.run.flags import Argument, Arguments, File, parse
from mlx_transformer.run.folder import CACHED_RUNS, RESULTS
from mlx_transformer.run.settings import SETTINGS, read_settings
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.terminal import Terminal

COMMANDS = {
    "list": ("mlx_transformer.run.commands.runs:list_command", "show past runs, newest first"),
    "compare": ("mlx_transformer.run.commands.runs:compare_command", "show how runs differ, in settings and results"),
}
_PIPE_WIDTH = 200  # characters of a row where the output is no terminal
_HEADS = ("run", "model", "size", "corpus", "loss", "bpb", "tokens/s", "stopped", "MB")
_WORTH = ("loss", "model", "stopped", "size", "bpb", "corpus", "tokens/s", "MB")  # beside the name


def main(prog: str = "python -m mlx_transformer.run", args: list[str] | None = None) -> None:
    """Run the command line."""
    dispatch(COMMANDS, prog, args)


@dataclass
class CompareFlags:
    """Show the settings in which runs differ and their results, and draw their validation losses."""

    runs: Arguments
    """two or more run folders, finished or not"""
    out: File = None
    """picture to write (default: results/compare_runs.png)"""


@dataclass
class ListFlags:
    """Show past runs, newest first."""

    folder: Argument = RESULTS.parent
    """folder that holds run folders, at any depth"""


def list_command(prog: str, args: list[str]) -> None:
    """Print `list_runs` of a folder."""
    flags = parse(ListFlags, prog, args=args)
    if not flags.folder.is_dir():
        raise BadInput(f"'{flags.folder}' is no folder: train something first, e.g. python -m phases.phase1")
    rows = list_runs(flags.folder)
    columns = {head: [row[i] for row in rows] for i, head in enumerate(_HEADS)}
    Terminal().print_columns(columns, _WORTH)


def compare_command(prog: str, args: list[str]) -> None:
    """Print `settings_table` and `results_table` of runs and write the picture of `draw_curves`."""
    flags = parse(CompareFlags, prog, args=args)
    if len(flags.runs) < 2:
        raise BadInput(f"fewer than two runs cannot be compared: expected {prog} RUN RUN")
    out = flags.out or RESULTS.parent / "compare_runs.png"
    if out.suffix != ".png":
        raise BadInput(f"--out {out}: expected a file name that ends in .png")
    runs = [RunRecord.read(folder) for folder in flags.runs]
    console = _console()
    for table in (settings_table(runs), results_table(runs)):
        console.print(table)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(out, runs)
    except OSError as error:
        raise BadInput(f"'{out}' cannot be written ({error.strerror}): give another --out") from error
    print(f"picture: {out}")


def _console() -> Terminal:
    console = Terminal()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def list_runs(folder: Path) -> list[list[str]]:
    """Describe the runs in or below a folder, newest first: name, phase, size, loss, tokens/s, size on disk.

    The runs of comparisons, which nobody named, only where their folder is asked for.
    """
    cached = CACHED_RUNS.resolve()
    asked = folder.resolve().is_relative_to(cached)
    runs = [path.parent for path in folder.rglob(SETTINGS) if asked or not path.resolve().is_relative_to(cached)]
    rows = []
    for path in sorted(runs, key=lambda run: (run / SETTINGS).stat().st_mtime, reverse=True):
        try:
            cells = _cells(path)
        except (BadInput, AttributeError, KeyError, TypeError, ValueError):
            cells = ["", "", "", "", "", "", "damaged"]
        name = folder.name if path == folder else str(path.relative_to(folder))
        rows.append([name, *cells, f"{sum(map(_bytes, path.rglob('*'))) / 1e6:,.1f}"])
    return rows


def _bytes(path: Path) -> int:
    """File size; 0 for a folder, and for a checkpoint that a training process deletes meanwhile."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def _cells(path: Path) -> list[str]:
    settings = read_settings(path)
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [
            _model(settings, settings["flags"]),
            str(settings["flags"].get("size", "")),
            "",
            "",
            "",
            "",
            "unfinished",
        ]

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        _model(result, result),
        result["size"],
        result["corpus"]["name"],
        shown(result["best_valid_loss"], ".4f"),
        shown(result["best_valid_bpb"], ".4f"),
        shown(result["tokens_per_second"], ",.0f"),
        result["stopped"],
    ]


def _model(record: dict[str, Any], named: dict[str, Any]) -> str:
    """Return the phase, or the file of one's own, and the branch."""
    name = record["code"]["file"] if record.get("code") else f"phase {record['phase']}"
    return f"{name} {named.get('branch') or ''}".rstrip()
