"""Trees of parameters and settings, by dotted path."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

Tree = dict[str, Any]


def by_path(tree: Tree) -> dict[str, mx.array]:
    """Flatten a tree: {"blocks": [{"ffn": {"bias": b}}]} -> {"blocks.0.ffn.bias": b}."""
    return dict(tree_flatten(tree))


def flatten_settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted paths: {"clip": {"kind": "ByValue", "max_value": 1}} -> ("clip", "ByValue"), ("clip.max_value", 1).

    Items of a list of objects go by their "name", else by their index.
    """
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {
            item["name"] if isinstance(item, dict) and "name" in item else i: (
                {key: part for key, part in item.items() if key != "name"} if isinstance(item, dict) else item
            )
            for i, item in enumerate(value)
        }
    if not isinstance(value, dict):
        yield path, value
        return
    for name, item in value.items():
        yield from flatten_settings(item, path if name == "kind" and path else f"{path}.{name}".lstrip("."))
