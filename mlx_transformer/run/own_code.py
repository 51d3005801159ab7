"""Python files of one's own: loaded from a path, hashed, and copied into a run folder."""

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]  # the checkout, or site-packages
_OURS = ("mlx_transformer", "phases", "bench")
_PREFIX = "own_code_"  # of the module names that load_code gives


@dataclass(frozen=True)
class Code:
    """A Python file and the files below its folder that it imports.

    files: path relative to the folder -> content.
    """

    path: Path
    files: dict[str, bytes]

    @property
    def sha256(self) -> str:
        """Hash of all files and their names."""
        return hashlib.sha256(json.dumps(self.hashes(), sort_keys=True).encode()).hexdigest()

    def keep(self, folder: Path) -> None:
        """Copy the files into a folder."""
        for name, content in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, content)

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file by name."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.files.items())}


def record(code: Code | None) -> dict[str, Any] | None:
    """Return the value of "code" in the JSON files of a run: {"file", "sha256", "files": {name: sha256}}, or None."""
    return None if code is None else {"file": code.path.name, "sha256": code.sha256, "files": code.hashes()}


def code_of(module: ModuleType) -> Code:
    """Read the file of an imported module and the imported files below its folder.

    Installed packages and those of this project are left out. Raises BadInput for a module without a file.
    """
    if (code := getattr(module, "_code", None)) is not None:  # as it was loaded
        return code
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        raise BadInput("a model of your own has to be defined in a Python file: expected python my_idea.py")
    path = Path(file).resolve()
    return Code(path, {found.relative_to(path.parent).as_posix(): found.read_bytes() for found in _files(path)})


def load_code(path: Path) -> tuple[ModuleType, Code]:
    """Run a Python file under a unique module name, so that files of equal names do not collide.

    It can import the files of its folder while it runs. Raises BadInput if there is no such file or it fails.
    """
    path = path.resolve()
    if not path.is_file():
        raise BadInput(f"'{path}' does not exist: expected a Python file that defines a Model, a Config or a RECIPE")
    name = f"{_PREFIX}{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInput(f"'{path}' is no Python file: expected one whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    with _siblings_of(path.parent):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BadInput:
            raise
        except Exception as error:
            del sys.modules[name]
            raise BadInput(f"'{path}' cannot be run: {type(error).__name__}: {error}") from error
        code = vars(module)["_code"] = code_of(module)
        return module, code


def is_own(name: str) -> bool:
    """Whether a module was made by `load_code`."""
    return name.startswith(_PREFIX)


def _files(path: Path) -> Iterator[Path]:
    """Yield the file itself, and each file below its folder that its import statements reach, but for our packages."""
    todo, seen = [path], {path}
    while todo:
        file = todo.pop()
        yield file
        for name in imported_names(file, path.parent):
            if name.partition(".")[0] in _OURS:
                continue
            for found in _places(path.parent, name):
                if found.is_file() and found not in seen:
                    seen.add(found)
                    todo.append(found)


def imported_names(file: Path, folder: Path) -> Iterator[str]:
    """Yield the dotted names, from the folder, that a file's import statements may name as modules."""
    package = list(file.relative_to(folder).parent.parts)
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join(filter(None, (*parents, node.module)))
            yield base
            yield from (".".join(filter(None, (base, alias.name))) for alias in node.names)


def _places(folder: Path, name: str) -> Iterator[Path]:
    """Yield where a module and its packages would lie below a folder."""
    place = folder
    for part in filter(None, name.split(".")):
        place = place / part
        yield place / "__init__.py"
        yield place.with_suffix(".py")


@contextmanager
def _siblings_of(folder: Path) -> Iterator[None]:
    """Make the modules of a folder importable; sys.path and sys.modules are restored afterwards."""
    places = {*folder.glob("*.py"), *(file.parent for file in folder.glob("*/__init__.py"))}
    names = {place.stem for place in places} - {*_OURS, *sys.stdlib_module_names}

    def take() -> dict[str, ModuleType]:
        found = [name for name in sys.modules if name.partition(".")[0] in names]
        return {name: sys.modules.pop(name) for name in found if "site-packages" not in str(_file(sys.modules[name]))}

    before = take()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        take()
        sys.modules.update(before)


def _file(module: ModuleType) -> str | None:
    return getattr(module, "__file__", None)
