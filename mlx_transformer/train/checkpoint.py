"""Checkpoints of a run: folders that are complete or absent, with safetensors and JSON only.

checkpoints/step_00001200/arrays.safetensors    every array that resuming needs, by dotted path
checkpoints/step_00001200/state.json            everything else
checkpoints/step_00001200/sums.json             size and checksum of both
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transformer.nn.weights import save_arrays
from mlx_transformer.utils.errors import BadInput, RankLost, RunFailed, is_out_of_memory
from mlx_transformer.utils.files import sync_path, write_json

KEEP = 2  # the newest, and the one before it in case the newest is damaged
_ARRAYS, _STATE, _SUMS = "arrays.safetensors", "state.json", "sums.json"


def save_checkpoint(
    folder: Path, step: int, arrays: dict[str, mx.array] | Callable[[Path], None], state: dict[str, Any]
) -> Path:
    """Write a checkpoint under a temporary name, sync and rename it, then delete all but the last KEEP.

    arrays: by dotted path, or what writes them to a file. Raises RunFailed if it cannot be written, and RankLost as
    `arrays` does; the earlier checkpoints are then unchanged.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    for leftover in folder.glob(".step_*.tmp"):  # of a process that was killed while it saved
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        if callable(arrays):
            arrays(temporary / _ARRAYS)
        else:
            save_arrays(temporary / _ARRAYS, arrays)
        write_json(temporary / _STATE, {"step": step, **state})
        write_json(temporary / _SUMS, {name: _fingerprint(temporary / name) for name in (_ARRAYS, _STATE)})
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_path(folder)
    except RankLost:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except (OSError, RuntimeError) as error:  # MLX reports a failed write as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        if is_out_of_memory(error):
            raise
        raise RunFailed(f"could not save to '{folder}': {error}; free some space, then resume") from error
    present = list_checkpoints(folder)
    newest = present.index(final)  # any later one was damaged and skipped, so it must not count as one to keep
    for other in present[: max(0, newest + 1 - KEEP)] + present[newest + 1 :]:
        shutil.rmtree(other, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, without temporary ones."""
    folders = (path for path in folder.glob("step_*") if path.is_dir() and re.fullmatch(r"step_\d+", path.name))
    return sorted(folders, key=step_of)


def step_of(path: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(path.name.removeprefix("step_"))


def arrays_of(name: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return one tree of a checkpoint, "model" or "best", by parameter path."""
    return {path.removeprefix(f"{name}."): value for path, value in arrays.items() if path.startswith(f"{name}.")}


def load_newest(folder: Path, *, lazily: bool = False) -> tuple[dict[str, mx.array], dict[str, Any], list[str]] | None:
    """Load the newest intact checkpoint: its arrays, its state, one sentence for each damaged one; None without any.

    lazily: read each array when it is first used, so that they are never in memory together. Raises BadInput if there
    are checkpoints and every one is damaged.
    """
    damaged: list[str] = []
    present = list_checkpoints(folder)
    for path in reversed(present):
        try:
            return *_load(path, lazily), damaged
        except (OSError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            damaged.append(f"checkpoint '{path}' is damaged ({error}): skipped")
    if present:
        raise BadInput(f"every checkpoint under '{folder}' is damaged: start again with another --out")
    return None


def _load(path: Path, lazily: bool) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Load one checkpoint. Raises OSError, ValueError or RuntimeError unless every byte is as it was saved."""
    sums = json.loads((path / _SUMS).read_text(encoding="utf-8"))
    if sums != {name: _fingerprint(path / name) for name in (_ARRAYS, _STATE)}:
        raise ValueError("its files are not as they were saved")
    arrays: dict[str, mx.array] = mx.load(str(path / _ARRAYS))  # type: ignore[assignment]
    if not lazily:
        mx.eval(arrays)  # the file may be deleted later
    return arrays, json.loads((path / _STATE).read_text(encoding="utf-8"))


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
