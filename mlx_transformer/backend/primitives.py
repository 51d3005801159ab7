"""Operations of our own in MLX's graphs, for a step of decoding on a Linux CPU (primitives.cpp); built on first use.

The way that MLX documents for extensions: primitives in C++, bound with nanobind in MLX's own domain. It takes g++,
Python's headers and a nanobind with the internals of the one that MLX was built with; where something is missing, or
what was built does not work, MLX's operations stay, and `python -m mlx_transformer.runtime` says why.
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
from mlx_transformer.backend.runtime import cache_dir, prepare
from mlx_transformer.utils.errors import BadInput

_FLAGS = ("-std=c++20", "-O3", "-fopenmp-simd", "-fvisibility=hidden", "-fno-strict-aliasing", "-DNB_DOMAIN=mlx")


def primitives() -> Any:
    """The functions of primitives.cpp as a module, or None where they cannot be had."""
    return _found()[0]


def describe() -> str:
    """What decoding uses here, for people."""
    module, fault = _found()
    return "operations of our own" if module else f"MLX's operations ({fault})"


@cache
def _found() -> tuple[Any, str]:
    """The module, or why there is none."""
    if prepare().blas is None:
        return None, "products come with a BLAS of ours, and there is none"
    try:
        module = _load(_built())
        _try(module)
    except (OSError, ImportError, BadInput, ValueError, RuntimeError) as error:
        return None, str(error) or type(error).__name__
    return module, ""


def _built() -> Path:
    """The library, compiled unless it is there. Raises OSError (CompilerError) and ImportError."""
    source = Path(__file__).with_name("primitives.cpp").read_text() + "\n#include <nb_combined.cpp>\n"
    mlx, nanobind = Path(mx.__file__).parent, _folder("nanobind")
    python = sysconfig.get_paths()["include"]
    if not (Path(python) / "Python.h").exists():
        raise OSError(f"Python's headers are not in {python} (`apt install python3-dev` on Debian and Ubuntu)")
    others = (native.stamp(str(mlx / "lib" / "libmlx.so")), _version("nanobind"), sysconfig.get_config_var("SOABI"))
    name = native.digest(source, SHIM, _FLAGS, others, native.cpu_key(), native.cpu_flags())
    path = cache_dir() / "primitives" / f"{name}.so"
    if not native.is_whole(path):
        folders = (mlx / "include", nanobind / "include", nanobind / "src", nanobind / "ext/robin_map/include", python)
        includes = [f"-I{folder}" for folder in folders]
        links = ["-Wl,--no-as-needed", f"-L{mlx / 'lib'}", "-lmlx", f"-Wl,-rpath,{mlx / 'lib'}"]
        native.compile_library(source, path, *_FLAGS, *native.cpu_flags().split(), *includes, *links)
    return path


def _folder(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _version(package: str) -> str:
    from importlib.metadata import version  # 12 ms, which a program that does not decode need not wait for

    return version(package)


def _load(path: Path) -> Any:
    loader = ExtensionFileLoader("primitives", str(path))
    spec = spec_from_file_location("primitives", path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} is no module")
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def _try(module: Any) -> None:
    """Raises ValueError if it is wrong, or does not know MLX's arrays."""
    keys = mx.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).reshape(1, 1, 3, 2)
    query = mx.array([2.0, 0.0]).reshape(1, 1, 1, 2)
    try:
        with mx.stream(mx.cpu):
            found = module.attend(query, keys, keys, mx.array([True, True, False]), 1.0).flatten()
    except TypeError:
        raise ValueError(f"nanobind {_version('nanobind')} has other internals than the one of MLX") from None
    wanted = mx.softmax(mx.array([2.0, 0.0]))
    if not mx.allclose(found, wanted, rtol=0, atol=1e-5):
        raise ValueError(f"they give {found.tolist()} where {wanted.tolist()} is right")
