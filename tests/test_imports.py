"""Imports go one way, package by package (LAYERS, lowest first), and form no cycle."""

import ast
from graphlib import CycleError, TopologicalSorter
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
    {"serve"},
    {"phases"},
    {"bench"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
PROJECT = ("mlx_transformer", "phases", "bench")
FILES = [p for top in PROJECT for p in sorted((ROOT / top).rglob("*.py"))]
# The package's entry points import from any layer.
TOP = ROOT / "mlx_transformer"
DOORS = [p for p in FILES if p.name == "__main__.py" or p in (TOP / "__init__.py", TOP / "evaluate.py")]


def dotted(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path) for path in FILES}


def package(module):
    """mlx_transformer.ops.loss -> ops, phases.phase1 -> phases."""
    top, *rest = module.split(".")
    return rest[0] if rest and top == "mlx_transformer" else top


def imported(path):
    """Modules that a file imports, at any place in it and also for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


@pytest.mark.parametrize("path", [p for p in FILES if p not in DOORS], ids=dotted)
def test_a_module_imports_from_its_own_package_or_from_below(path):
    own = RANK[package(dotted(path))]
    for module in imported(path):
        if module.split(".")[0] in PROJECT and module != "mlx_transformer":
            assert RANK[package(module)] <= own, f"{path} imports {module}, which is of a higher layer"
        if module.startswith("mlx_transformer.backend."):
            assert "backend" in path.parts, f"{path} imports a part of the backend: see backend/__init__.py"


def test_imports_form_no_cycle():
    graph = {dotted(path): {m for m in imported(path) if m in MODULES and m != dotted(path)} for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_only_the_reference_imports_pytorch_and_it_imports_nothing_else_of_the_project(path):
    independent = "reference" in path.parts
    for module in imported(path):
        top = module.split(".")[0]
        assert top != "torch" or independent, f"{path} imports torch"
        if independent and top in PROJECT:
            assert module.startswith("bench.reference"), f"{path} must stay independent"
