"""Custom MLX primitives for a Linux CPU (primitives.cpp), compiled on first use.

A C++ extension as MLX documents it, bound with nanobind in MLX's own domain. It needs g++, Python's headers and a
nanobind with the same internals as the one that MLX was built with. Where something is missing, or the result is
wrong, MLX's operations are used, and `python -m mlx_transformer info` prints the reason.
"""

import sysconfig
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transformer.backend import native
from mlx_transformer.backend.blas import SHIM
from mlx_transformer.backend.cache import cache_dir
from mlx_transformer.backend.runtime import prepare
from mlx_transformer.utils.errors import BadInput

_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-fno-tree-loop-distribute-patterns",  # else g++ calls memcpy for rows of 16 numbers
    "-DNB_DOMAIN=mlx",
)
_INCLUDED = ("attention.cpp", "norms.cpp", "loss.cpp", "scan.cpp")


def primitives() -> Any:
    """Return the functions of primitives.cpp as a module, or None where they are not available."""
    return _load_checked()[0]


def describe_primitives() -> str:
    """Describe whether attention, norms and the loss are own operations here, and why not."""
    module, fault = _load_checked()
    return "custom primitives" if module else f"MLX's operations ({fault})"


@cache
def _load_checked() -> tuple[Any, str]:
    """Return (module, ""), or (None, the reason why there is none)."""
    if prepare().blas is None:
        return None, "they need a BLAS under MLX, and there is none"
    try:
        module = _load(_build())
        _check(module)
    except (OSError, ImportError, BadInput, ValueError, RuntimeError) as error:
        return None, str(error) or type(error).__name__
    return module, ""


def _build() -> Path:
    """Return the library's path, compiling it if needed. Raises OSError (CompilerError) and ImportError."""
    folder = Path(__file__).parent
    source = (folder / "primitives.cpp").read_text() + "\n#include <nb_combined.cpp>\n"
    included = [(folder / name).read_text() for name in _INCLUDED]
    mlx, nanobind = Path(mx.__file__).parent, _folder("nanobind")
    python = sysconfig.get_paths()["include"]
    if not (Path(python) / "Python.h").exists():
        raise OSError(f"Python's headers are not in {python} (`apt install python3-dev` on Debian and Ubuntu)")
    others = (native.stamp(str(mlx / "lib" / "libmlx.so")), _version("nanobind"), sysconfig.get_config_var("SOABI"))
    name = native.digest(source, included, SHIM, _FLAGS, others, native.cpu_key(), native.cpu_flags())
    path = cache_dir() / "primitives" / f"{name}.so"
    if not native.is_whole(path):
        theirs = (mlx / "include", nanobind / "include", nanobind / "src", nanobind / "ext/robin_map/include", python)
        includes = [f"-I{path}" for path in (folder, *theirs)]
        links = ["-Wl,--no-as-needed", f"-L{mlx / 'lib'}", "-lmlx", f"-Wl,-rpath,{mlx / 'lib'}"]
        native.compile_library(source, path, *_FLAGS, *native.cpu_flags().split(), *includes, *links)
    return path


def _folder(package: str) -> Path:
    """Return a package's folder without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _version(package: str) -> str:
    from importlib.metadata import version  # 12 ms, which only decoding needs to spend

    return version(package)


def _load(path: Path) -> Any:
    loader = ExtensionFileLoader("primitives", str(path))
    spec = spec_from_file_location("primitives", path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} is no module")
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def _check(module: Any) -> None:
    """Raise ValueError if the module computes a wrong result or cannot take MLX's arrays."""
    keys = mx.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).reshape(1, 1, 3, 2)
    query = mx.array([2.0, 0.0]).reshape(1, 1, 1, 2)
    try:
        with mx.stream(mx.cpu):
            seen = mx.array([True, True, False])
            result = module.attend_one(query, keys, keys, seen, 1.0).flatten()
            many, _ = module.attend(mx.repeat(query, 2, axis=2), keys, keys, seen, 1.0)
    except TypeError:
        raise ValueError(f"nanobind {_version('nanobind')} does not have the internals of MLX's own") from None
    expected = mx.softmax(mx.array([2.0, 0.0]))
    for found in (result, many[0, 0, 1]):
        if not mx.allclose(found, expected, rtol=0, atol=1e-5):
            raise ValueError(f"they compute {found.tolist()} where {expected.tolist()} is right")
