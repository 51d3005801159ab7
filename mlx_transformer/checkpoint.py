"""Checkpoints: folders that are whole or not there. Only safetensors and JSON.

checkpoints/step_00001200/arrays.safetensors    every array that resuming needs, by dotted path
checkpoints/step_00001200/state.json            everything else, and the arrays' size and checksum
"""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transformer.errors import BadInput, RunFailed
from mlx_transformer.files import sync_folder, write_json

KEEP = 2  # the last two: should the newest be damaged, the one before it is still there
_ARRAYS, _STATE = "arrays.safetensors", "state.json"


def save_checkpoint(folder: Path, step: int, arrays: dict[str, mx.array], state: dict[str, Any]) -> Path:
    """Write a checkpoint under a temporary name, sync it, rename it; then drop all but the last two.

    Raises RunFailed if the disk refuses; the earlier checkpoints stay as they were.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_arrays(temporary / _ARRAYS, arrays)
        write_json(temporary / _STATE, {"step": step, "arrays": _fingerprint(temporary / _ARRAYS), **state})
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # MLX reports a failed write as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFailed(f"could not save to '{folder}': {error}; free some space, then resume") from error
    for old in list_checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints there, oldest first; temporary ones do not count."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def load_newest(folder: Path) -> tuple[dict[str, mx.array], dict[str, Any], list[str]] | None:
    """Arrays, state and one sentence for each damaged checkpoint passed over; None if no checkpoint was ever complete.

    Raises BadInput if there are checkpoints and every one is damaged.
    """
    damaged: list[str] = []
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            state = json.loads((path / _STATE).read_text())
            expected = state.pop("arrays")
            if _fingerprint(path / _ARRAYS) != expected:
                raise ValueError("its arrays are not those that were saved")
            arrays = mx.load(str(path / _ARRAYS))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            damaged.append(f"checkpoint '{path}' is damaged ({error}): passed over")
            continue
        return arrays, state, damaged  # type: ignore[return-value]
    if found:
        raise BadInput(f"every checkpoint under '{folder}' is damaged: start again with another --out")
    return None


def save_arrays(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write safetensors and sync it; the same arrays give the same bytes. Raises OSError if it did not get whole."""
    mx.save_safetensors(str(path), dict(sorted(arrays.items())), {"format": "mlx"})
    with path.open("rb") as file:
        os.fsync(file.fileno())
        (header,) = struct.unpack("<Q", file.read(8))
        names = json.loads(file.read(header))
    end = max((entry["data_offsets"][1] for name, entry in names.items() if name != "__metadata__"), default=0)
    if path.stat().st_size != 8 + header + end:  # MLX does not look whether the disk took every byte
        raise OSError(f"'{path.name}' was cut short: the disk is full")


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
