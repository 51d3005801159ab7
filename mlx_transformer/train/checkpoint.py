"""Checkpoints: folders that are whole or not there. Only safetensors and JSON.

checkpoints/step_00001200/arrays.safetensors    every array that resuming needs, by dotted path
checkpoints/step_00001200/state.json            everything else
checkpoints/step_00001200/sums.json             size and checksum of both
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transformer.nn.weights import save_arrays
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.files import sync_folder, write_json

KEEP = 2  # the last two: should the newest be damaged, the one before it is still there
_ARRAYS, _STATE, _SUMS = "arrays.safetensors", "state.json", "sums.json"


def save_checkpoint(folder: Path, step: int, arrays: dict[str, mx.array], state: dict[str, Any]) -> Path:
    """Write a checkpoint under a temporary name, sync it, rename it; then drop all but it and the one before.

    Raises RunFailed if the disk refuses; the earlier checkpoints stay as they were.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    for left in folder.glob(".step_*.tmp"):  # by a process that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_arrays(temporary / _ARRAYS, arrays)
        write_json(temporary / _STATE, {"step": step, **state})
        write_json(temporary / _SUMS, {name: _fingerprint(temporary / name) for name in (_ARRAYS, _STATE)})
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # MLX reports a failed write as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFailed(f"could not save to '{folder}': {error}; free some space, then resume") from error
    found = list_checkpoints(folder)
    here = found.index(final)  # what stands behind it was damaged and passed over: it must not count as one to keep
    for other in found[: max(0, here + 1 - KEEP)] + found[here + 1 :]:
        shutil.rmtree(other, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints there, oldest first; temporary ones do not count."""
    found = {path: re.fullmatch(r"step_(\d+)", path.name) for path in folder.glob("step_*") if path.is_dir()}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(path.name[5:]))


def load_newest(folder: Path) -> tuple[dict[str, mx.array], dict[str, Any], list[str]] | None:
    """Arrays, state and one sentence for each damaged checkpoint passed over; None if no checkpoint was ever complete.

    Raises BadInput if there are checkpoints and every one is damaged.
    """
    damaged: list[str] = []
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            return *_load(path), damaged
        except (OSError, ValueError, RuntimeError) as error:
            damaged.append(f"checkpoint '{path}' is damaged ({error}): passed over")
    if found:
        raise BadInput(f"every checkpoint under '{folder}' is damaged: start again with another --out")
    return None


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Raises OSError, ValueError or RuntimeError unless every byte is as it was saved."""
    sums = json.loads((path / _SUMS).read_text(encoding="utf-8"))
    if sums != {name: _fingerprint(path / name) for name in (_ARRAYS, _STATE)}:
        raise ValueError("its files are not as they were saved")
    arrays: dict[str, mx.array] = mx.load(str(path / _ARRAYS))  # type: ignore[assignment]
    mx.eval(arrays)  # MLX reads a file when it needs it, and by then it may be gone
    return arrays, json.loads((path / _STATE).read_text(encoding="utf-8"))


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
