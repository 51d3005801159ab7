"""Parameter trees by path."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

Tree = dict[str, Any]


def by_path(tree: Tree) -> dict[str, mx.array]:
    """{"blocks": [{"ffn": {"bias": b}}]} -> {"blocks.0.ffn.bias": b}."""
    return dict(tree_flatten(tree))
