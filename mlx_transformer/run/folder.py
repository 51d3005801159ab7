"""A run's folder: whether it may be written, who writes it, and what is said when that fails."""

from __future__ import annotations

import fcntl
import json
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mlx_transformer.run.flags import TrainFlags
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.run.plan import SETTINGS, read_settings
from mlx_transformer.train.checkpoint import list_checkpoints
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed
from mlx_transformer.utils.files import check_place, usable

RESULTS = Path("results/phases")
_FILES = (SETTINGS, "result.json", "curve.jsonl", "report.md", "stories.md", "loss.png", "log.txt")
_FOLDERS = ("model", "checkpoints", "code", "recipe_code")


def check_folder(flags: TrainFlags) -> None:
    """Raises BadInput if --out must not be overwritten or cannot be made, or if --resume has nothing to go on from."""
    with usable(flags.resume or flags.out):
        if flags.resume is not None:
            _check_resume(flags.resume)
        elif flags.out is not None:
            _check_out(flags.out)


def _check_resume(folder: Path) -> None:
    if _is_finished(folder) and not list_checkpoints(folder / "checkpoints"):
        raise BadInput(
            f"'{folder}' holds a finished run without its checkpoints, so it cannot go on: "
            f"start a new one from its weights with --init-from {shlex.quote(str(folder))}"
        )


def _check_out(out: Path) -> None:
    check_place(out)
    if out.is_dir() and any(not _is_begun(path) for path in out.iterdir()):
        if not _is_run(out):
            raise BadInput(f"--out '{out}' is not empty and holds no run: expected a folder that is new or empty")
        if _is_finished(out):
            raise BadInput(
                f"--out '{out}' holds a finished run: give another folder, or --resume it with a larger limit"
            )
        if list_checkpoints(out / "checkpoints"):
            raise BadInput(
                f"--out '{out}' holds an unfinished run: go on with --resume {shlex.quote(str(out))}, "
                "or give another folder"
            )


def _is_begun(path: Path) -> bool:
    """Whether this is all that a run killed before its first file leaves."""
    return path.name == ".lock" or re.fullmatch(rf"\.{re.escape(SETTINGS)}\.\d+\.tmp", path.name) is not None


def _is_run(folder: Path) -> bool:
    try:
        return bool(read_settings(folder))
    except BadInput:
        return False


def _is_finished(folder: Path) -> bool:
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))["stopped"] != "interrupted"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def new_folder(experiment: Experiment, branch: str | None) -> Path:
    """Return a folder below results/phases that does not exist yet, for a run without --out."""
    place = f"phase_{experiment.phase}" if experiment.code is None else ""
    name = "_".join(filter(None, (place, experiment.name, branch, time.strftime("%Y%m%d_%H%M%S"))))
    folder, nth = RESULTS / name, 2
    while folder.exists():
        folder, nth = RESULTS / f"{name}_{nth}", nth + 1
    return folder


@contextmanager
def owned(folder: Path, flags: TrainFlags) -> Iterator[None]:
    """Make the folder and hold it for this process alone. Raises BadInput if it cannot be made or another holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: IO[str] = (folder / ".lock").open("w")
    except OSError as error:
        raise BadInput(f"'{folder}' cannot be written ({error.strerror}): give another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"'{folder}' is being trained by another process: wait for it, or stop it") from None
        for left in (*folder.glob(".*.[0-9]*.tmp"), *folder.glob("model/.*.[0-9]*.tmp")):  # by a killed process
            left.unlink()
        if flags.resume is None:
            check_folder(flags)  # again: until now another process may have trained here
            _empty(folder)
        yield


def _empty(folder: Path) -> None:
    """Clear away what a run without a checkpoint left, and nothing else."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def explained(resume: str, folder: Path) -> Iterator[None]:
    """Turn what stops a run from outside into one sentence; resume is the command that goes on with it.

    Raises RunFailed for a disk that refuses or memory that is gone, Interrupted for Ctrl-C.
    """
    try:
        yield
    except OSError as error:
        raise RunFailed(f"could not write to '{folder}': {error}; free some space, then: {resume}") from error
    except KeyboardInterrupt:
        raise Interrupted(f"stopped at once; what was saved before stays; go on with: {resume}") from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):  # as MLX says that there is no memory
            raise
        raise RunFailed(f"out of memory ({error}): try a smaller --batch-size, --seq-len or --d-model") from error
