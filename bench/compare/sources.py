"""A checksum of the source code that a run's losses and times depend on."""

import ast
import functools
import hashlib
from pathlib import Path

from bench.workers.machine import ROOT
from mlx_transformer.run.own_code import imported_names

_PACKAGES = ("backend", "utils", "ops", "nn", "data", "train", "generate")
_MODULES = ("run/plan.py",)


def checksum(phase: int | None, files: tuple[Path, ...], backend: str) -> str:
    """Hash mlx_transformer's computing packages, the phases that a phase or files import, and the reference's code.

    Comments, docstrings and layout of Python files do not count.
    """
    package = ROOT / "mlx_transformer"
    sources = {path for name in _PACKAGES for path in (package / name).rglob("*.py")}
    sources |= {package / name for name in _MODULES}
    roots = list(files) if phase is None else [*files, ROOT / "phases" / f"phase{phase}.py"]
    sources |= _phases(roots)
    sources |= set() if backend == "mlx" else set((ROOT / "bench" / "reference").rglob("*.py"))
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(f"{path.relative_to(ROOT)}\n{_statements(path)}\n".encode())
    for path in sorted(package.rglob("*.cpp")) if backend == "mlx" else ():
        digest.update(path.read_bytes())
    return digest.hexdigest()


planned_checksum = functools.cache(checksum)  # as it was when the first run of its kind was planned


def _statements(path: Path) -> str:
    """Return what a source file does: without layout, comments and docstrings."""
    found = path.stat()
    return _dumped(path, found.st_ino, found.st_mtime_ns, found.st_size)


@functools.cache  # a comparison hashes all sources twice for each run, and none of them changes
def _dumped(path: Path, *version: int) -> str:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _phases(roots: list[Path]) -> set[Path]:
    """Return the files of `phases` among some files, and those that they import, directly or not."""
    found: set[Path] = set()
    todo = list(roots)
    while todo:
        path = todo.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for name in imported_names(path, path.parent):
            if name.split(".")[0] == "phases":
                module = ROOT.joinpath(*name.split("."))
                todo.append(module / "__init__.py" if module.is_dir() else module.with_suffix(".py"))
    return {path for path in found if path.is_relative_to(ROOT / "phases")}
