"""Preparation of a process before MLX is imported.

`prepare()` runs when `mlx_transformer` is imported. On Linux it puts a real BLAS under MLX's matmul (blas.py), gives
MLX a kernel cache of its own (jit.py) and tunes the allocator; on macOS it does nothing. MLX_TRANSFORMER_PLAIN=1 turns
all of it off. `python -m mlx_transformer info` prints what was found and how fast a matmul is.
"""

import ctypes
import os
import sys
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from mlx_transformer.backend import blas, jit, native
from mlx_transformer.backend.blas import Blas
from mlx_transformer.backend.cache import cache_dir
from mlx_transformer.backend.jit import KernelCache
from mlx_transformer.backend.launch import launched
from mlx_transformer.utils.errors import BadInput

SLOW = "matmul runs 30-50x slower"
GET_COMPILER = "install it with `apt install g++` (Debian, Ubuntu) or `dnf install gcc-c++` (Fedora)"
# How many arrays MLX's scheduler looks ahead for. With its own 20, and still with 100, the second of two CPU streams
# starves (a step at small takes 1.5x as long as with 1,000). A single stream is not affected.
SCHEDULER_WIDTH = "1000"
_BACKENDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")  # wheels on Linux, of which each installs mlx/lib/libmlx.so
# glibc keeps freed memory instead of returning it, so that the next step's arrays cost no page faults: the name in
# malloc.h, its number, our value, and the environment variable by which a user may have set it already.
_MALLOPT = (
    ("M_MMAP_MAX", -4, 0, "MALLOC_MMAP_MAX_"),
    ("M_TRIM_THRESHOLD", -1, 2**31 - 1, "MALLOC_TRIM_THRESHOLD_"),
)


@dataclass
class Prepared:
    """The changes that `prepare` made in this process; the defaults where it changed nothing."""

    threads: int = 1
    blas: Blas | None = None
    kernels: KernelCache | None = None
    allocator: bool = False
    late: bool = False  # mlx.core was imported before: no other BLAS can be put under it in this process
    warned: list[str] = field(default_factory=list)

    def warn(self, sentence: str) -> None:
        """Warn about something that could not be prepared."""
        self.warned.append(sentence)
        warnings.warn_explicit(sentence, RuntimeWarning, "mlx_transformer", 0)  # a line of our source would not help


_prepared: Prepared | None = None


def prepare() -> Prepared:
    """Make MLX fast on Linux; called before `mlx.core` is imported, later calls return the same object.

    What changes in the process: glibc's allocator settings; one shim for `cblas_sgemm` and one for MLX's temporary
    folder, both in the global symbol scope; a `g++` of ours first on PATH (children get the real one through it); and,
    where they are unset, MLX_BFS_MAX_WIDTH and MLX_PTX_CACHE_DIR, and MLX_DISABLE_COMPILE where g++ does not work.
    Nothing changes on macOS or with MLX_TRANSFORMER_PLAIN=1. Raises ImportError if MLX has no backend on Linux.
    """
    global _prepared
    if _prepared is None:
        prepared = Prepared()
        if sys.platform == "linux":
            _check_backend(prepared)
            if not is_plain():
                _prepare_linux(prepared)
        _prepared = prepared
    return _prepared


def is_plain() -> bool:
    """Whether MLX_TRANSFORMER_PLAIN=1 turns every fast form off."""
    return os.environ.get("MLX_TRANSFORMER_PLAIN", "0") not in ("", "0")


def compiles() -> bool:
    """Whether mx.compile does anything on this CPU: it needs g++ and can be turned off."""
    return native.compiler() is not None and "MLX_DISABLE_COMPILE" not in os.environ


def _check_backend(prepared: Prepared) -> None:
    """Raise ImportError if MLX is installed without a backend; warn of two, which overwrite each other's files."""
    installed = _installed_backends()
    if len(installed) > 1:
        prepared.warn(
            f"{' and '.join(installed)} are both installed and own the same files: keep one, "
            f"with `pip uninstall {' '.join(installed)}` and then `pip install 'mlx[cpu]'` or `'mlx[cuda]'`."
        )
    spec = None if installed else find_spec("mlx")
    if spec and not any(Path(folder, "lib", "libmlx.so").exists() for folder in spec.submodule_search_locations or ()):
        raise ImportError(
            "MLX has no backend here: `pip install 'mlx[cpu]'`, or `pip install 'mlx[cuda]'` for an NVIDIA GPU"
        )


def _installed_backends() -> list[str]:
    """Return the backends' wheels beside MLX, by their folders: importlib.metadata would take longer than all else."""
    spec = find_spec("mlx")
    places = [Path(folder).parent for folder in (spec.submodule_search_locations or ())] if spec else []
    return [name for name in _BACKENDS if any(any(place.glob(_dist_info(name))) for place in places)]


def _dist_info(name: str) -> str:
    return f"{name.replace('-', '_')}-*.dist-info"


def _prepare_linux(prepared: Prepared) -> None:
    prepared.threads = _threads(prepared)
    prepared.allocator = _tune_allocator()
    if not any("cuda" in name for name in _installed_backends()):  # a GPU has one stream, and needs the memory
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", SCHEDULER_WIDTH)
    if "mlx.core" in sys.modules:  # Python binds all symbols of a module when it loads it
        prepared.late = True
        prepared.warn(
            f"mlx.core was imported before mlx_transformer, so {SLOW} and compiled kernels do not use all of this CPU; "
            "import mlx_transformer first (mt.main starts the file again to do so)."
        )
        return
    try:
        cache = cache_dir()
    except BadInput as error:
        prepared.warn(f"Nothing was made faster ({SLOW}): {error}.")
        return
    _prepare_blas(prepared, cache / "blas")
    _prepare_kernels(prepared, cache)
    if native.compiler() is None:
        lost = ["mx.compile does nothing"] + [SLOW] * (prepared.blas is None)
        prepared.warn(f"g++ was not found, so {' and '.join(lost)}; {GET_COMPILER}.")


def _threads(prepared: Prepared) -> int:
    """OMP_NUM_THREADS (or the BLAS's own variable) if set, at most one per CPU; else this rank's physical cores."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        value, present = os.environ.get(name, "").split(",")[0], len(os.sched_getaffinity(0))
        if value.isdigit() and int(value) > 0:
            if int(value) > present:
                prepared.warn(f"{name}={value} is more than the CPUs here: {present} threads are used.")
            return min(int(value), present)
    launch = launched()
    return max(1, native.physical_cores() // (launch.local if launch else 1))


def _tune_allocator() -> bool:
    """Whether glibc took our settings; the user's own, in the environment, have precedence."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    taken = [mallopt(number, value) for _, number, value, name in _MALLOPT if name not in os.environ]
    return all(taken)


def _prepare_blas(prepared: Prepared, folder: Path) -> None:
    try:
        results = blas.check_all(blas.installed(), folder, prepared.threads)
        for result in results:
            if result.fault:
                prepared.warn(f"{result.library.name} ({result.library.path}) is not used: it {result.fault}.")
        best = blas.fastest(results)
        if best is None:
            prepared.warn(f"No usable BLAS was found, so {SLOW}; install one with `pip install scipy-openblas32`.")
        elif native.compiler() or blas.has_shim(folder):  # without a compiler one warning covers everything
            prepared.blas = blas.activate(best, folder, prepared.threads)
    except OSError as error:
        prepared.warn(f"No BLAS could be put under MLX, so {SLOW}: {error}.")


def _prepare_kernels(prepared: Prepared, cache: Path) -> None:
    if native.compiler() is None:
        return  # MLX sees that too and leaves functions uncompiled
    os.environ.setdefault("MLX_PTX_CACHE_DIR", str(cache / "ptx"))  # CUDA's kernels: not under the shim's folder
    try:
        prepared.kernels = jit.activate(cache / "jit")
    except native.CompilerError as error:  # MLX would use this g++ and fail in the first step
        os.environ["MLX_DISABLE_COMPILE"] = "1"
        prepared.warn(f"mx.compile is off: {error}.")
    except OSError as error:
        prepared.warn(f"MLX's kernels stay in the temporary folder that all programs share: {error}.")
