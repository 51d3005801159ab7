"""A kernel cache for mx.compile on a Linux CPU, with kernels compiled for this CPU.

MLX writes each kernel's C++ to `<temporary folder>/mlx/<version>/cpu`, runs `g++` there (found on PATH, with fixed
flags, 0.5 s a kernel) and from then on loads the library of the kernel's name, whatever flags and CPU it was compiled
for. Here that folder is `<cache>/jit/<key>`, where the key identifies MLX, g++, its flags and the CPU, and a `g++` of
ours stands first on PATH. It adds the flags and a precompiled header (0.13 s a kernel); any other call of it, from this
process or its children, is passed to g++ unchanged. A shim in the global symbol scope (as in blas.py) gives the folder
to MLX alone, so TMPDIR is unchanged.

Since 0.32.4 MLX compiles to a temporary name and renames, so concurrent or killed processes do no harm. Files damaged
by a power cut or a full disk are removed when the next process starts.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from mlx_transformer.backend import native
from mlx_transformer.utils.files import atomic_write

SHIM = r"""
#include <cstring>
#include <dlfcn.h>
#include <filesystem>
#include <string>

static std::string& folder() { static auto* path = new std::string; return *path; }

extern "C" void mlx_transformer_set_folder(const char* path) { folder() = path; }

std::filesystem::path std::filesystem::temp_directory_path() {
    Dl_info caller;
    if (dladdr(__builtin_return_address(0), &caller) && std::strstr(caller.dli_fname, "libmlx.so"))
        return folder();
    using function = std::filesystem::path (*)();
    return ((function)dlsym(RTLD_NEXT, "_ZNSt10filesystem19temp_directory_pathB5cxx11Ev"))();
}
"""
WRAPPER = """#!/bin/sh
# MLX's kernels are compiled for this CPU and with a precompiled header; any other call goes to g++ as it is.
for output; do :; done  # the last argument
case "$output" in {folder}/mlx/*) ;; *) exec {gxx} "$@" ;; esac
trap '' INT TERM  # these are for the program, which may want to save first
exec {gxx} -I {folder}/headers "$@" {flags}
"""
MLX_FLAGS = "-std=c++17 -O3 -Wall -fPIC -shared"  # of MLX 0.32; with others g++ ignores the precompiled header
HEADER = "mlx/backend/cpu/compiled_preamble.h"
_SYMBOL = "_ZNSt10filesystem19temp_directory_pathB5cxx11Ev"
_HOUR = 3600.0


@dataclass(frozen=True)
class KernelCache:
    """The folder of MLX's compiled kernels, and their compiler flags."""

    folder: Path  # <cache>/jit/<key>
    flags: str
    version: str  # of MLX
    shim: ctypes.CDLL = field(repr=False)

    @property
    def kernels(self) -> Path:
        """The folder that MLX reads and writes."""
        return self.folder / "mlx" / self.version / "cpu"

    @property
    def count(self) -> int:
        """The number of compiled kernels."""
        return len(list(self.kernels.glob("lib*.so")))


def activate(cache: Path) -> KernelCache:
    """Give MLX, imported later, a kernel cache under `cache`.

    Raises native.CompilerError if g++ does not work, and OSError if it is missing, if `cache` cannot be used, or if
    the shim cannot take effect on this system.
    """
    gxx, mlx = native.compiler(), _mlx()
    if gxx is None or mlx is None:
        raise OSError("g++ or MLX was not found")
    package, version = mlx
    flags = native.cpu_flags()
    stamps = [native.stamp(gxx), native.stamp(f"{package}/include/{HEADER}")]
    folder = cache / native.digest(version, stamps, flags, native.cpu_key(), SHIM, WRAPPER, cache)
    if any(character in str(folder) for character in '"$`\\\n'):
        raise OSError(f"MLX would misread the folder name {folder}")
    if not native.is_whole(folder / "shim.so"):
        _make_folder(folder, gxx, flags, package)
    shim = ctypes.CDLL(str(folder / "shim.so"), mode=ctypes.RTLD_GLOBAL)
    if _address(ctypes.CDLL(None)) != _address(shim):
        raise OSError("another library provides temp_directory_path")
    os.utime(folder)  # for _remove_unused
    cache_of_mlx = KernelCache(folder, flags, version, shim)
    _remove_damaged(cache_of_mlx.kernels)
    shim.mlx_transformer_set_folder(os.fsencode(folder))
    os.environ["PATH"] = os.pathsep.join([str(folder / native.WRAPPER_FOLDER), *native.search_path()])
    return cache_of_mlx


def _mlx() -> tuple[str, str] | None:
    """Return (folder, version) of the installed MLX without importing it."""
    spec = find_spec("mlx")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for info in Path(folder).parent.glob("mlx-*.dist-info"):
            return folder, info.name.removeprefix("mlx-").removesuffix(".dist-info")
    return None


def _make_folder(folder: Path, gxx: str, flags: str, package: str) -> None:
    """Make the folder of a key. The shim comes last: it marks the folder as complete, and tests g++ and its flags."""
    _remove_unused(folder.parent)
    wrapper = folder / native.WRAPPER_FOLDER / "g++"
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    script = WRAPPER.format(folder=shlex.quote(str(folder)), gxx=shlex.quote(gxx), flags=flags)
    atomic_write(wrapper, script)
    wrapper.chmod(0o755)
    _precompile_header(folder / "headers" / f"{HEADER}.gch", gxx, flags, package)
    native.compile_library(SHIM, folder / "shim.so", *flags.split())


def _precompile_header(path: Path, gxx: str, flags: str, package: str) -> None:
    """Precompile the header that every kernel includes (52 MB); if that fails, kernels only compile more slowly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{os.getpid()}.part")
    source = ["-I", f"{package}/include", "-x", "c++-header", f"{package}/include/{HEADER}", "-o", str(part)]
    done = subprocess.run([gxx, *MLX_FLAGS.split(), *flags.split(), *source], capture_output=True)
    if done.returncode == 0:
        os.replace(part, path)
    else:
        part.unlink(missing_ok=True)


def _remove_damaged(kernels: Path) -> None:
    """Remove truncated libraries and the temporary files of killed processes."""
    for path in kernels.glob("*") if kernels.exists() else ():
        if path.name.startswith("tmp_"):
            damaged = _age(path) > _HOUR
        else:
            damaged = path.suffix == ".so" and not native.is_whole(path)
        if damaged:
            path.unlink(missing_ok=True)


def _remove_unused(cache: Path) -> None:
    """Remove the folders of keys not used for a month: other versions of MLX, g++ or this file."""
    for folder in cache.glob("*"):
        if _age(folder) > 30 * 24 * _HOUR:
            shutil.rmtree(folder, ignore_errors=True)


def _age(path: Path) -> float:
    """Return the seconds since a file changed; 0 if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _address(library: ctypes.CDLL) -> int | None:
    return ctypes.cast(getattr(library, _SYMBOL), ctypes.c_void_p).value
