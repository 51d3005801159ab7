"""One table of weights, read both ways: our modules, theirs, and how the one stands inside the other."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_transformer.utils.errors import BadInput

Weights = dict[str, mx.array]
Shape = tuple[int, ...]
_LISTED = 20  # complaints in one sentence


@dataclass(frozen=True)
class Part:
    """Our map (out, in), or bias (out,), as the nth of `of` equal parts along the output axis of theirs.

    transposed: theirs is (in, out), as Hugging Face's Conv1D has it.
    """

    nth: int = 0
    of: int = 1
    transposed: bool = False

    def shape(self, own: Shape) -> Shape:
        """Of theirs, for the shape of ours."""
        whole = (own[0] * self.of, *own[1:])
        return whole[::-1] if self.transposed else whole

    def cut(self, theirs: mx.array) -> mx.array:
        """Ours out of theirs."""
        return mx.split(theirs.T if self.transposed else theirs, self.of)[self.nth]

    def join(self, parts: list[mx.array]) -> mx.array:
        """Theirs out of all its parts, the first one first."""
        whole = mx.concatenate(parts)
        return whole.T if self.transposed else whole


@dataclass(frozen=True)
class Row:
    """A module of ours and one of theirs, {i} for the layer; what a parameter is called inside is the same in both."""

    ours: str
    theirs: str
    part: Part = Part()

    def find(self, path: str) -> str | None:
        """The name of theirs for a path of ours; None for a path of another module."""
        match = re.fullmatch(re.escape(self.ours).replace(r"\{i\}", r"(?P<i>\d+)") + r"\.(?P<leaf>\w+)", path)
        return match and f"{self.theirs}.{match['leaf']}".replace("{i}", match.groupdict().get("i", ""))


Rows = tuple[Row, ...]


def to_theirs(rows: Rows, ours: Weights) -> Weights:
    """Our parameters by path -> theirs by name. Raises ValueError that names the paths without exactly one row."""
    parts: dict[str, list[tuple[Part, mx.array]]] = {}
    for path, (name, part) in _places(rows, ours).items():
        parts.setdefault(name, []).append((part, ours[path]))
    return {
        name: own[0][0].join([value for _, value in sorted(own, key=lambda placed: placed[0].nth)])
        for name, own in parts.items()
    }


def to_ours(rows: Rows, theirs: Weights, shapes: Mapping[str, Shape]) -> Weights:
    """Their parameters by name -> ours by path, in float32, of these shapes.

    Raises BadInput that lists what is no float, is missing, has another shape, or would be left over.
    """
    places = _places(rows, shapes)
    wanted = {name: part.shape(shapes[path]) for path, (name, part) in places.items()}
    found = {name: tuple(value.shape) for name, value in theirs.items()}
    complaints = [
        f"{name} holds {str(value.dtype).removeprefix('mlx.core.')}: expected floats, not quantized"
        for name, value in theirs.items()
        if not mx.issubdtype(value.dtype, mx.floating)
    ]
    complaints += [
        f"{name} should be {wanted.get(name, 'absent')} and is {found.get(name, 'missing')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if complaints:
        more = f"; and {len(complaints) - _LISTED} more" if len(complaints) > _LISTED else ""
        raise BadInput(f"the weights do not fit: {'; '.join(complaints[:_LISTED])}{more}")
    return {path: part.cut(theirs[name]).astype(mx.float32) for path, (name, part) in places.items()}


def _places(rows: Rows, paths: Iterable[str]) -> dict[str, tuple[str, Part]]:
    """Path of ours -> the name of theirs, and which part of it."""
    found = {path: [(name, row.part) for row in rows if (name := row.find(path))] for path in paths}
    if homeless := [path for path, places in found.items() if len(places) != 1]:
        raise ValueError(f"not exactly one row of the table for {', '.join(homeless)}")
    return {path: places[0] for path, places in found.items()}
