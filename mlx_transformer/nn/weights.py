"""Model weights on disk: safetensors files, written and read without a run."""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_transformer.nn.model import Model
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import sync_path
from mlx_transformer.utils.text import plural
from mlx_transformer.utils.trees import by_path

WEIGHTS, TABLES = "model.safetensors", "tables.safetensors"
_DTYPES = {"bool": "BOOL", "uint": "U", "int": "I", "float": "F", "bfloat": "BF"}  # of safetensors, before the bits


def save_arrays(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write arrays by name as safetensors and sync the file; equal arrays give equal bytes.

    Raises OSError if the file is incomplete.
    """
    mx.save_safetensors(str(path), dict(sorted(arrays.items())), {"format": "mlx"})
    sync_path(path)
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        names = json.loads(file.read(header))
    end = max((entry["data_offsets"][1] for name, entry in names.items() if name != "__metadata__"), default=0)
    if path.stat().st_size != 8 + header + end:  # MLX does not check that the disk took every byte
        raise OSError(f"'{path.name}' was cut short: the disk is full")


def save_parts(
    path: Path, described: dict[str, tuple[tuple[int, ...], mx.Dtype]], parts: Iterable[tuple[str, int, mx.array]]
) -> None:
    """Write, as `save_arrays`, arrays that come in parts (name, first row, rows): one part is in memory at a time.

    described: whole shape and dtype of each array, by name. The parts must make up all of them, in any order.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, (shape, dtype) in sorted(described.items()):
        begin, end = end, end + math.prod(shape) * dtype.size
        header[name] = {"dtype": _dtype_name(dtype), "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, row, values in parts:
            shape, dtype = described[name]
            before = row * math.prod(shape[1:]) * dtype.size
            file.seek(8 + len(text) + header[name]["data_offsets"][0] + before)
            file.write(np.array(mx.view(values.reshape(-1), mx.uint8)).tobytes())
    sync_path(path)


def _dtype_name(dtype: mx.Dtype) -> str:
    kind, bits = re.fullmatch(r"mlx\.core\.([a-z]+)_?(\d*)", str(dtype)).groups()  # type: ignore[union-attr]
    return _DTYPES[kind] + bits


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Return the weights in a folder by parameter path, loaded lazily. Raises BadInput if they cannot be read."""
    path = folder / WEIGHTS
    try:
        return mx.load(str(path))  # type: ignore[return-value]
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"'{path}' cannot be read ({error}): the weights are missing or damaged") from error


def load_weights(model: Model, folder: Path) -> None:
    """Load the weights in a folder into a model. Raises BadInput if they cannot be read or do not fit."""
    put_weights(model, read_weights(folder), folder / WEIGHTS)


def load_tables(model: Model, folder: Path) -> None:
    """Load what a model took from its training text, if it did. Raises BadInput if that cannot be read."""
    path = folder / TABLES
    try:
        arrays: dict[str, mx.array] = mx.load(str(path)) if path.exists() else {}  # type: ignore[assignment]
        mx.eval(arrays)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"'{path}' cannot be read ({error}): it is damaged") from error
    try:
        model.load_tables(arrays)
    except (KeyError, ValueError) as error:
        raise BadInput(f"'{path}' does not fit this model: {error}") from error


def put_weights(
    model: Model, arrays: dict[str, mx.array], path: Path, divide: Callable[[Model], object] | None = None
) -> None:
    """Set every parameter of a model; `path` is named in errors.

    divide: leaves the model a part of its parameters; of lazily loaded arrays, which are taken out of `arrays`, no more
    than one is then in memory beside that part. Raises BadInput if any path or shape differs, or as `check_finite`
    does.
    """
    own = {name: tuple(value.shape) for name, value in by_path(model.parameters()).items()}
    found = {name: tuple(value.shape) for name, value in arrays.items()}
    if own != found:
        name = sorted(set(own.items()) ^ set(found.items()))[0][0]
        expected, got = own.get(name, "no such weight"), found.get(name, "none")
        raise BadInput(f"'{path}' does not fit this model: '{name}' should be {expected} and is {got}")
    model.load_weights(list(arrays.items()))
    if divide is not None:
        arrays.clear()
        divide(model)
    own_part = by_path(model.parameters())
    for value in own_part.values():
        mx.eval(value)
    check_finite(own_part, path)


def check_depth(n_blocks: int, arrays: dict[str, mx.array], path: Path) -> None:
    """Raise BadInput if the weights have another number of blocks; call it before building the model."""
    layers = {int(match[1]) for name in arrays if (match := re.match(r"blocks\.(\d+)\.", name))}
    if len(layers) != n_blocks:
        raise BadInput(
            f"'{path}' does not fit this model: {plural(len(layers), 'layer')} in it, {n_blocks} in config.json"
        )


def check_finite(arrays: dict[str, mx.array], path: Path) -> None:
    """Raise BadInput for weights that are nan, infinite or not of a floating-point dtype."""
    for name, value in arrays.items():
        if not mx.issubdtype(value.dtype, mx.floating):
            raise BadInput(f"'{path}' holds {value.dtype} in '{name}': expected floating-point numbers")
    finite = {name: mx.isfinite(value).all() for name, value in arrays.items()}
    mx.eval(finite)
    if broken := [name for name, whole in finite.items() if not whole.item()]:
        raise BadInput(f"'{path}' holds numbers that are not finite in '{broken[0]}': expected weights of a sound run")
