"""Conversion of weights in both directions by one table: our modules, theirs, and how one is a part of the other."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_transformer.utils.errors import BadInput

Weights = dict[str, mx.array]
Shape = tuple[int, ...]
_LISTED = 20  # mismatches in one sentence


@dataclass(frozen=True)
class Part:
    """Our matrix (out, in) or bias (out,) as the nth of `of` equal parts of theirs, along its output axis.

    transposed: theirs is (in, out), as in Hugging Face's Conv1D.
    """

    nth: int = 0
    of: int = 1
    transposed: bool = False

    def shape(self, own: Shape) -> Shape:
        """Return their shape for our shape."""
        whole = (own[0] * self.of, *own[1:])
        return whole[::-1] if self.transposed else whole

    def cut(self, hf: mx.array) -> mx.array:
        """Cut our part from their array."""
        return mx.split(hf.T if self.transposed else hf, self.of)[self.nth]

    def join(self, parts: list[mx.array]) -> mx.array:
        """Join all parts, in order, to their array."""
        whole = mx.concatenate(parts)
        return whole.T if self.transposed else whole


@dataclass(frozen=True)
class Row:
    """Path of one of our modules and name of theirs, {i} for the layer; parameters inside have equal names."""

    ours: str
    hf: str
    part: Part = Part()

    def find(self, path: str) -> str | None:
        """Return their name for the path of our parameter; None if it is of another module."""
        match = re.fullmatch(re.escape(self.ours).replace(r"\{i\}", r"(?P<i>\d+)") + r"\.(?P<leaf>\w+)", path)
        return match and f"{self.hf}.{match['leaf']}".replace("{i}", match.groupdict().get("i", ""))


Rows = tuple[Row, ...]


def to_hf(rows: Rows, ours: Weights) -> Weights:
    """Convert our parameters by path to theirs by name. Raises ValueError for paths without exactly one row."""
    parts: dict[str, list[tuple[Part, mx.array]]] = {}
    for path, (name, part) in _places(rows, ours).items():
        parts.setdefault(name, []).append((part, ours[path]))
    return {
        name: own[0][0].join([value for _, value in sorted(own, key=lambda placed: placed[0].nth)])
        for name, own in parts.items()
    }


def from_hf(rows: Rows, hf: Weights, shapes: Mapping[str, Shape]) -> Weights:
    """Convert their parameters by name to ours by path, in float32, with these shapes.

    Raises BadInput that lists every name that is no float, missing, left over, or of another shape.
    """
    places = _places(rows, shapes)
    expected = {name: part.shape(shapes[path]) for path, (name, part) in places.items()}
    actual = {name: tuple(value.shape) for name, value in hf.items()}
    mismatches = [
        f"{name} holds {str(value.dtype).removeprefix('mlx.core.')}: expected floats, not quantized"
        for name, value in hf.items()
        if not mx.issubdtype(value.dtype, mx.floating)
    ]
    mismatches += [
        f"{name} should be {expected.get(name, 'absent')} and is {actual.get(name, 'missing')}"
        for name in sorted(expected.keys() | actual.keys())
        if expected.get(name) != actual.get(name)
    ]
    if mismatches:
        more = f"; and {len(mismatches) - _LISTED} more" if len(mismatches) > _LISTED else ""
        raise BadInput(f"the weights do not fit: {'; '.join(mismatches[:_LISTED])}{more}")
    return {path: part.cut(hf[name]).astype(mx.float32) for path, (name, part) in places.items()}


def _places(rows: Rows, paths: Iterable[str]) -> dict[str, tuple[str, Part]]:
    """Map our paths to their names and the part of each."""
    candidates = {path: [(name, row.part) for row in rows if (name := row.find(path))] for path in paths}
    if unmatched := [path for path, places in candidates.items() if len(places) != 1]:
        raise ValueError(f"not exactly one row of the table for {', '.join(unmatched)}")
    return {path: places[0] for path, places in candidates.items()}
