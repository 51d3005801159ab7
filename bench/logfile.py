"""The JSON log of a tool: its path is checked before anything is measured, and no log is overwritten."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.files import as_bad_input, check_place, write_json


def check_json(path: Path) -> None:
    """Raise BadInput unless the name ends with .json: the tool's plot has the same name and .png."""
    if path.suffix != ".json":
        raise BadInput(f"--out {path}: expected a name that ends with .json")


def check_out(path: Path | None) -> None:
    """Raise BadInput if a log cannot be written there."""
    if path is None:
        return
    if exists(path):
        raise BadInput(f"--out {path} is there already: a log is not overwritten, give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp").close()  # as write_json's
    except OSError as error:
        raise BadInput(f"--out {path} cannot be written ({error.strerror}): give another place") from error


def check_folder(out: Path, log: str, same: Mapping[str, Any]) -> None:
    """Raise BadInput if a folder cannot be used, or holds anything but results whose log has these values.

    log: the name of its file.
    """
    with as_bad_input(out):
        check_place(out)
        taken = out.is_dir() and any(out.iterdir())
    try:
        known = json.loads((out / log).read_text(encoding="utf-8"))
        equal = all(known[name] == value for name, value in same.items())
    except (OSError, ValueError, KeyError, TypeError):
        equal = False
    if taken and not equal:
        raise BadInput(f"--out '{out}' holds something else, or results by other settings or code: give another")


def exists(path: Path) -> bool:
    """Whether --out exists. Raises BadInput where the system refuses to say."""
    try:
        return path.exists()
    except OSError as error:
        raise BadInput(f"--out {path} cannot be used ({error.strerror}): give another place") from error


def write_log(path: Path | None, log: dict[str, Any]) -> None:
    """Write a log. Raises RunFailed if the disk refuses."""
    if path is None:
        return
    try:
        write_json(path, log)
    except OSError as error:
        raise RunFailed(f"'{path}' could not be written: {error}") from error
