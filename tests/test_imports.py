"""Imports go one way: from the numbers up to the measurements."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    {"errors", "files", "trees"},
    {"native", "blas", "blas_check", "jit", "primitives", "runtime"},
    {"config", "ops", "streams"},
    {"data"},
    {"cache", "context", "linear", "dropout", "norm", "position", "attention", "feedforward", "head", "init", "optim"},
    {"relative", "sparse", "moe", "recompute", "value", "ready"},
    {"block"},
    {"model"},
    {"recipe", "curvature"},
    {"checkpoint", "step", "trainer", "sampling"},
    {"saved", "flags", "quality", "picture", "card", "console"},
    {"generate", "interop"},
    {"plan"},
    {"folder"},
    {"run"},
    {"phases"},
    {"bench"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# A saved config.json names a phase: `load` finds it by importlib as phases.phase<1-6>, and this import is lazy.
EXCEPTIONS = {("__init__", "saved"), ("__init__", "runtime"), ("saved", "phases")}
FILES = [p for top in ("mlx_transformer", "phases", "bench") for p in sorted((ROOT / top).rglob("*.py"))]


def place(dotted):
    """The layer's name of a dotted module: mlx_transformer.ops.loss -> ops, phases.phase1 -> phases."""
    top, *rest = dotted.split(".")
    return top if top in ("phases", "bench") else (rest or ["__init__"])[0]


def imported(path):
    """Dotted names of this project's modules that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                f"{node.module}.{a.name}" if node.module == "mlx_transformer" else node.module for a in node.names
            )


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_a_module_imports_from_below(path):
    own = place(".".join(path.relative_to(ROOT).with_suffix("").parts))
    rival = "reference" in path.parts or path.name == "hf.py"
    for dotted in imported(path):
        assert not dotted.startswith("torch") or rival, f"{path} imports torch"
        if dotted.split(".")[0] not in ("mlx_transformer", "phases", "bench"):
            continue
        other = place(dotted)
        assert not rival or dotted.startswith("bench.reference"), f"{path} must stay independent"
        if (own, other) in EXCEPTIONS or dotted == "mlx_transformer":  # the package itself prepares the runtime
            continue
        assert other in RANK, f"{path} imports {dotted}, which has no place in LAYERS"
        assert RANK[other] <= RANK[own], f"{path} imports {dotted}, which stands above it"
