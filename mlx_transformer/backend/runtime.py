"""What must happen before MLX is imported, and what the device is.

`prepare()` runs when `mlx_transformer` is imported. On Linux it puts a real BLAS under MLX's matmul (blas.py), gives
it a kernel cache of its own (jit.py) and tunes the allocator; on macOS it does nothing. MLX_TRANSFORMER_PLAIN=1 turns
all of it off. `python -m mlx_transformer.runtime` prints what was found and how fast a matmul is.
"""

import argparse
import ctypes
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from mlx_transformer.backend import blas, jit, native
from mlx_transformer.backend.blas import Blas
from mlx_transformer.backend.jit import KernelCache
from mlx_transformer.utils.errors import BadInput, exit_cleanly

SLOW = "matmul runs 30-50x slower"
GET_COMPILER = "install it with `apt install g++` (Debian, Ubuntu) or `dnf install gcc-c++` (Fedora)"
# How many arrays MLX's scheduler looks ahead for: with its own 20, and still with 100, the second of two CPU streams
# starves (a step at small takes 1.5 times as long as with 1,000). One stream is neither faster nor slower for it.
SCHEDULER_WIDTH = "1000"
# glibc keeps what is freed instead of handing it back, so that the next step's arrays cost no page faults: the name in
# malloc.h, its number, our value, and the environment variable by which a person may have set it already.
_MALLOPT = (
    ("M_MMAP_MAX", -4, 0, "MALLOC_MMAP_MAX_"),
    ("M_TRIM_THRESHOLD", -1, 2**31 - 1, "MALLOC_TRIM_THRESHOLD_"),
)


@dataclass
class Prepared:
    """What `prepare` did to this process; an empty one where it did nothing."""

    threads: int = 1
    blas: Blas | None = None
    kernels: KernelCache | None = None
    allocator: bool = False
    warned: list[str] = field(default_factory=list)

    def warn(self, sentence: str) -> None:
        """Say once what was lost."""
        self.warned.append(sentence)
        warnings.warn_explicit(sentence, RuntimeWarning, "mlx_transformer", 0)  # no line of ours says more


@dataclass(frozen=True)
class Device:
    """What the arrays are computed on."""

    name: str
    backend: Literal["metal", "cuda", "cpu"]
    memory_bytes: int
    blas: str | None = None  # of the CPU: library, version and kernel; None is MLX's own
    threads: int = 1  # of one matmul on the CPU

    def describe(self) -> str:
        """One sentence, such as "AMD EPYC (cpu), 62.8 GiB, OpenBLAS 0.3.34 (Haswell kernel), 2 threads"."""
        parts = [f"{self.name} ({self.backend})", f"{self.memory_bytes / 2**30:.1f} GiB"]
        if self.backend == "cpu":
            parts += [self.blas or "MLX's own BLAS", f"{self.threads} thread{'s' if self.threads != 1 else ''}"]
        return ", ".join(parts)


def cache_dir() -> Path:
    """The folder for everything that can be made again: $MLX_TRANSFORMER_CACHE, else the user's cache folder.

    Where that cannot be written, this user's own folder in the temporary folder. Raises BadInput if neither can.
    """
    named = os.environ.get("MLX_TRANSFORMER_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    wanted = Path(named).expanduser().absolute() if named else home / "mlx_transformer"
    fallback = Path(tempfile.gettempdir()) / f"mlx_transformer-{os.getuid()}"
    if _writable(wanted):
        return wanted
    if _writable(fallback) and fallback.stat().st_uid == os.getuid():  # code is loaded from here: nobody else's folder
        return fallback
    raise BadInput(f"the cache folder {wanted} cannot be written; set MLX_TRANSFORMER_CACHE to one that can")


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


_prepared: Prepared | None = None


def prepare() -> Prepared:
    """Make MLX fast on Linux; called before `mlx.core` is imported, and harmless when called again.

    What changes in the process: glibc's allocator settings; one shim for `cblas_sgemm` and one for MLX's temporary
    folder, both in the global symbol scope; a `g++` of ours first on PATH (children get the real one through it); and,
    where they are unset, MLX_BFS_MAX_WIDTH and MLX_PTX_CACHE_DIR, and MLX_DISABLE_COMPILE where g++ does not work. On
    macOS, and with MLX_TRANSFORMER_PLAIN=1, none of that: one warning of Python's is silenced everywhere.
    """
    global _prepared
    if _prepared is None:
        _prepared = Prepared()
        if sys.platform == "linux" and not is_plain():
            _prepare_linux(_prepared)
        # `python -m` finds this module imported by its package already; main() is ready for that.
        warnings.filterwarnings("ignore", "'mlx_transformer.backend.runtime' found in sys.modules", RuntimeWarning)
    return _prepared


def is_plain() -> bool:
    """Whether MLX_TRANSFORMER_PLAIN=1 asks for every fast form to be off."""
    return os.environ.get("MLX_TRANSFORMER_PLAIN", "0") not in ("", "0")


def _prepare_linux(prepared: Prepared) -> None:
    prepared.threads = _threads()
    prepared.allocator = _tune_allocator()
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", SCHEDULER_WIDTH)
    if "mlx.core" in sys.modules:  # Python binds all symbols of a module when it loads it
        prepared.warn(
            f"mlx.core was imported before mlx_transformer, so {SLOW} and compiled kernels do not use all of this CPU; "
            "import mlx_transformer first."
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


def _threads() -> int:
    """OMP_NUM_THREADS (or the BLAS's own variable) if set, else the physical cores."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0]
        if value.isdigit() and int(value) > 0:
            return int(value)
    return native.physical_cores()


def _tune_allocator() -> bool:
    """Whether glibc took our settings; what a person has set in the environment stays theirs."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    taken = [mallopt(number, value) for _, number, value, name in _MALLOPT if name not in os.environ]
    return all(taken)


def _prepare_blas(prepared: Prepared, folder: Path) -> None:
    try:
        verdicts = blas.judge(blas.installed(), folder, prepared.threads)
        for verdict in verdicts:
            if verdict.fault:
                prepared.warn(f"{verdict.library.name} ({verdict.library.path}) is not used: it {verdict.fault}.")
        best = blas.fastest(verdicts)
        if best is None:
            prepared.warn(f"No usable BLAS was found, so {SLOW}; install one with `pip install scipy-openblas32`.")
        elif native.compiler() or blas.has_shim(folder):  # else a missing compiler is said for all
            prepared.blas = blas.activate(best, folder, prepared.threads)
    except OSError as error:
        prepared.warn(f"No BLAS could be put under MLX, so {SLOW}: {error}.")


def _prepare_kernels(prepared: Prepared, cache: Path) -> None:
    if native.compiler() is None:
        return  # MLX sees that too and leaves functions uncompiled
    os.environ.setdefault("MLX_PTX_CACHE_DIR", str(cache / "ptx"))  # CUDA's kernels: not under the shim's folder
    try:
        prepared.kernels = jit.activate(cache / "jit")
    except native.CompilerError as error:  # it is there, so MLX would use it and fail in the first step
        os.environ["MLX_DISABLE_COMPILE"] = "1"
        prepared.warn(f"mx.compile is off: {error}.")
    except OSError as error:
        prepared.warn(f"MLX's kernels stay in the temporary folder that all programs share: {error}.")


def compiles() -> bool:
    """Whether mx.compile does anything on this CPU: it takes g++ and can be turned off."""
    return native.compiler() is not None and "MLX_DISABLE_COMPILE" not in os.environ


def matmul_reaches(library: Blas) -> bool:
    """Whether MLX's matmul on the CPU is computed by `library`."""
    import mlx.core as mx

    calls = library.calls
    mx.eval(mx.matmul(mx.ones((2, 2)), mx.ones((2, 2)), stream=mx.cpu))
    return library.calls > calls


def use_device(name: str = "auto") -> Device:
    """Compute on "gpu", on "cpu", or on a GPU where there is one ("auto"); returns what that is.

    Raises BadInput for another name, and for a GPU that is not there.
    """
    import mlx.core as mx

    if name not in ("auto", "gpu", "cpu"):
        raise BadInput(f"device {name!r} is unknown; choose auto, gpu or cpu")
    has_gpu = mx.is_available(mx.gpu)
    if name == "gpu" and not has_gpu:
        raise BadInput("device 'gpu' was asked for, but MLX finds none here; choose cpu or auto")
    mx.set_default_device(mx.gpu if has_gpu and name != "cpu" else mx.cpu)
    device = device_info()
    if device.backend == "metal":
        configure_memory(mx)
    return device


def device_info() -> Device:
    """MLX's default device."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.gpu):
        info = mx.device_info()
        memory = info.get("memory_size") or info.get("total_memory") or 0
        return Device(str(info["device_name"]), "metal" if mx.metal.is_available() else "cuda", int(memory))
    if sys.platform == "darwin":
        return Device(f"{platform.machine()} CPU", "cpu", native.memory_bytes(), "Accelerate")
    library = prepare().blas
    if library is None:
        return Device(native.cpu_name(), "cpu", native.memory_bytes())
    return Device(native.cpu_name(), "cpu", native.memory_bytes(), library.describe(), library.threads)


def configure_memory(mx: Any, info: Mapping[str, Any] | None = None) -> tuple[int, int]:
    """Set Metal's limits from what the device recommends; returns (wired, cache) in bytes.

    Wired: all of the recommended working set stays resident (macOS 15 and newer; it is an error to ask for more).
    Cache: of freed buffers kept for the next step, at most half of it, so that other programs are not swapped out.
    """
    recommended = int((info or mx.device_info())["max_recommended_working_set_size"])
    wired, cache = recommended, recommended // 2
    mx.set_wired_limit(wired)
    mx.set_cache_limit(cache)
    return wired, cache


def versions() -> dict[str, str]:
    """What a result depends on: {"mlx", "python", "project"}."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        project = version("mlx-transformer")
    except PackageNotFoundError:  # run from a folder that was not installed
        project = "unknown"
    return {"mlx": version("mlx"), "python": platform.python_version(), "project": project}


def matmul_rate(seconds: float = 2.0, side: int = 2048) -> float:
    """GFLOP/s of a float32 matmul of two `side` x `side` arrays on the default device, over about `seconds`."""
    import mlx.core as mx

    a = mx.random.normal((side, side))
    mx.eval(a @ a)  # the first one also starts threads
    start = time.perf_counter()
    count = 0
    while (elapsed := time.perf_counter() - start) < seconds:
        mx.eval(a @ a)
        count += 1
    return 2 * side**3 * count / elapsed / 1e9


def report(prepared: Prepared) -> list[str]:
    """What was found, a line each."""
    import mlx.core as mx

    from mlx_transformer.backend.primitives import describe

    found = versions()
    lines = [
        f"device     {device_info().describe()}",
        f"versions   mlx {found['mlx']}, Python {found['python']}, mlx-transformer {found['project']}",
        f"cache      {cache_dir()}",
    ]
    if sys.platform != "linux" or is_plain():
        return [*lines, f"settings   MLX as installed{' (MLX_TRANSFORMER_PLAIN)' if is_plain() else ''}"]
    kernels, library = prepared.kernels, prepared.blas
    return [
        *lines,
        f"blas       {library.describe() if library and matmul_reaches(library) else 'the one MLX came with'}",
        f"threads    {prepared.threads} (physical cores here: {native.physical_cores()})",
        f"allocator  {'keeps freed memory' if prepared.allocator else 'as the system sets it'}",
        f"compile    {'on' if compiles() else 'off'}{f', g++ flags {kernels.flags}' if kernels else ''}",
        f"kernels    {f'{kernels.count} finished in {kernels.folder}' if kernels else 'in the temporary folder'}",
        f"decoding   with {describe()}",
        f"gpu        {'yes' if mx.is_available(mx.gpu) else 'none'}",
    ]


def main() -> None:
    """The command line: report and a short matmul."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_transformer.runtime", description="Print what MLX computes on here, and how fast."
    )
    parser.add_argument("--device", default="auto", help="auto, gpu or cpu (default: auto)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the matmul figure (default: 2)")
    options = parser.parse_args()
    if not options.seconds > 0:
        raise BadInput(f"--seconds {options.seconds}: expected a number above 0")
    use_device(options.device)
    print("\n".join(report(prepare())))
    print(f"matmul     {matmul_rate(options.seconds):.0f} GFLOP/s (float32, 2048 x 2048)")


if __name__ == "__main__":
    # As a program this file is a second module; what `prepare` did is known to the first.
    exit_cleanly(import_module("mlx_transformer.backend.runtime").main)
