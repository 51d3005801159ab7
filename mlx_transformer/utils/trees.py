"""Trees of modules, parameters and settings, by dotted path."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx import nn
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


def copy_modules(part: Any, change: Callable[[Any, str], Any], path: str = "") -> Any:
    """Copy a module and its parts, which share their arrays; change(copy, path) returns what stands in its place."""
    if isinstance(part, list):
        return [copy_modules(one, change, f"{path}.{i}") for i, one in enumerate(part)]
    if not isinstance(part, nn.Module):
        return part
    result = copy.copy(part)
    for name, own in part.items():
        result[name] = copy_modules(own, change, f"{path}.{name}".lstrip("."))
    return change(result, path)
