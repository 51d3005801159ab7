"""Imports go one way, package by package: LAYERS has one line for each step up."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    {"backend", "utils"},
    {"ops"},
    {"nn", "data"},
    {"train"},
    {"generate", "interop"},
    {"run"},
    {"phases"},
    {"bench"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = [p for top in ("mlx_transformer", "phases", "bench") for p in sorted((ROOT / top).rglob("*.py"))]
# The package's entry points import from any layer.
TOP = ROOT / "mlx_transformer"
DOORS = [p for p in FILES if p.name == "__main__.py" or p in (TOP / "__init__.py", TOP / "evaluate.py")]


def place(dotted):
    """The package of a dotted module: mlx_transformer.ops.loss -> ops, phases.phase1 -> phases."""
    top, *rest = dotted.split(".")
    return top if top in ("phases", "bench") else rest[0]


def imported(path):
    """Dotted names of this project's modules that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                f"{node.module}.{a.name}" if node.module == "mlx_transformer" else node.module for a in node.names
            )


@pytest.mark.parametrize("path", [p for p in FILES if p not in DOORS], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_from_its_own_package_or_from_below(path):
    own = RANK[place(".".join(path.relative_to(ROOT).with_suffix("").parts))]
    for dotted in imported(path):
        if dotted.split(".")[0] in ("mlx_transformer", "phases", "bench") and dotted != "mlx_transformer":
            assert RANK[place(dotted)] <= own, f"{path} imports {dotted}, which stands above it"
        if dotted.startswith("mlx_transformer.backend."):
            assert "backend" in path.parts, f"{path} imports a part of the backend: see backend/__init__.py"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pytorch_stays_in_the_reference_which_knows_nothing_of_ours(path):
    independent = "reference" in path.parts
    for dotted in imported(path):
        top = dotted.split(".")[0]
        assert top != "torch" or independent, f"{path} imports torch"
        if independent and top in ("mlx_transformer", "phases", "bench"):
            assert dotted.startswith("bench.reference"), f"{path} must stay independent"
