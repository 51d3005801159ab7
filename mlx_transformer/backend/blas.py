"""A real BLAS under MLX's matmul on a Linux CPU (the wheel's own is the reference BLAS, 30-50x slower).

libmlx takes `cblas_sgemm` from the global symbol scope. A shim of one function (sgemm.cpp), loaded there before
`mlx.core`, passes every call, except products of a few rows, to the library chosen here. The library itself stays in a
scope of its own, so that NumPy, SciPy and torch keep their BLAS. The choice is the fastest library that agrees with
float64 on this CPU, measured on first use in a separate process (a BLAS made for another CPU may crash) and cached.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from mlx_transformer.backend import native
from mlx_transformer.utils.files import write_json

SHIM = Path(__file__).with_name("sgemm.cpp").read_text()
TOLERANCE = 3e-5  # largest error / sqrt(K), standard normal factors: float32 gives 2e-6, bfloat16 inside 4e-3
_SYSTEM_FOLDERS = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", f"{sys.prefix}/lib")
_KERNEL_CHOICE = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE")


@dataclass(frozen=True)
class Library:
    """A shared library with a row-major single precision matmul, called `<prefix>cblas_sgemm`."""

    name: str
    path: str
    prefix: str = ""


@dataclass(frozen=True)
class CheckResult:
    """The result of checking one library; `fault` is empty if it is right."""

    library: Library
    fault: str
    gflops: float = 0.0
    conclusive: bool = True  # whether the result may be cached


@dataclass
class Blas:
    """The BLAS behind MLX's matmul."""

    name: str
    kernel: str
    gflops: float
    library: ctypes.CDLL = field(repr=False)
    shim: ctypes.CDLL = field(repr=False)
    prefix: str = field(repr=False, default="")

    def describe(self) -> str:
        """Return name, version and kernel, such as "OpenBLAS 0.3.34 (Haswell kernel)"."""
        return f"{self.name} ({self.kernel} kernel)" if self.kernel else self.name

    @property
    def threads(self) -> int:
        """Threads of one matmul."""
        return self._function("openblas_get_num_threads", "MKL_Get_Max_Threads")()

    def set_threads(self, count: int) -> None:
        """Split every matmul over `count` threads (1 where several MLX streams compute at once)."""
        self._function("openblas_set_num_threads", "MKL_Set_Num_Threads")(count)
        ctypes.c_int.in_dll(self.shim, "mlx_transformer_threads").value = count

    def _function(self, openblas: str, mkl: str) -> Callable[..., int]:
        """Return OpenBLAS's or MKL's function, or one that does nothing for another library."""
        function = getattr(self.library, self.prefix + openblas, None)
        return function or getattr(self.library, mkl, None) or (lambda *_: 1)

    @property
    def calls(self) -> int:
        """The number of MLX's matmuls that have called the shim."""
        return ctypes.c_long.in_dll(self.shim, "mlx_transformer_calls").value

    def is_used(self) -> bool:
        """Whether MLX's matmul on the CPU calls this library: computes one and looks at the counter."""
        import mlx.core as mx

        calls = self.calls
        mx.eval(mx.matmul(mx.ones((2, 2)), mx.ones((2, 2)), stream=mx.cpu))
        return self.calls > calls


def installed() -> list[Library]:
    """List the BLAS libraries of this machine without loading any: PyPI wheels first, then the system's."""
    libraries = []
    spec = find_spec("scipy_openblas32")
    if spec and spec.origin:
        path = os.path.join(os.path.dirname(spec.origin), "lib", "libscipy_openblas.so")
        libraries.append(Library("scipy-openblas32", path, "scipy_"))
    libraries += [Library("mkl", path) for path in sorted(glob(f"{sys.prefix}/lib/libmkl_rt.so*"))[-1:]]
    system = [path for folder in _SYSTEM_FOLDERS for path in glob(f"{folder}/libopenblas.so.0")]
    libraries += [Library("system OpenBLAS", path) for path in system[:1]]
    return [library for library in libraries if os.path.exists(library.path)]


def check(library: Library, threads: int, timeout: float = 60.0) -> CheckResult:
    """Compare `library` with float64 and measure its throughput in a separate process."""
    script = str(Path(__file__).with_name("blas_check.py"))
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({script!r}, run_name='__main__')"]
    settings = {name: str(threads) for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        done = subprocess.run(
            [*command, library.path, library.prefix], env=os.environ | settings, capture_output=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return CheckResult(library, f"did not finish within {timeout:.0f} s")
    if done.returncode < 0:  # SIGKILL means too little memory, not a fault of the library
        conclusive = done.returncode != -signal.SIGKILL
        return CheckResult(library, f"crashed with signal {-done.returncode}", conclusive=conclusive)
    if done.returncode:
        message = (done.stderr.decode(errors="replace").strip() or "no message").splitlines()[-1]
        return CheckResult(library, f"could not be checked ({message})", conclusive=False)
    measured = json.loads(done.stdout)
    if not measured["error"] <= TOLERANCE:
        return CheckResult(library, f"is wrong by {measured['error']:.2g} * sqrt(K) on this CPU")
    return CheckResult(library, "", measured["gflops"])


def check_all(libraries: Iterable[Library], folder: Path, threads: int) -> list[CheckResult]:
    """Check each library, once for each version and CPU: the results are cached in `folder`."""
    libraries = list(libraries)
    stamps = [native.stamp(library.path) for library in libraries]
    kernels = [os.environ.get(name) for name in _KERNEL_CHOICE]
    path = folder / f"checks-{native.digest(native.cpu_key(), threads, kernels, libraries, stamps)}.json"
    try:
        return [CheckResult(Library(**row.pop("library")), **row) for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        pass
    folder.mkdir(parents=True, exist_ok=True)
    results = [check(library, threads) for library in libraries]
    if all(result.conclusive for result in results):
        write_json(path, [asdict(result) for result in results])
    return results


def fastest(results: Iterable[CheckResult]) -> CheckResult | None:
    """Choose a right library: a later one only if it is 20 % faster, since other programs disturb the measurement."""
    best = None
    for result in results:
        if not result.fault and (best is None or result.gflops > 1.2 * best.gflops):
            best = result
    return best


def has_shim(folder: Path) -> bool:
    """Whether the shim is compiled already, so that `activate` needs no compiler."""
    return native.is_whole(_shim(folder))


def _shim(folder: Path) -> Path:
    return folder / f"sgemm-{native.digest(SHIM, native.cpu_key(), native.cpu_flags())}.so"


def activate(checked: CheckResult, folder: Path, threads: int) -> Blas:
    """Load the library and put the shim in front of it, so that MLX, imported later, calls it.

    Raises OSError if there is no C++ compiler for the shim, or if either cannot be loaded.
    """
    chosen = checked.library
    if not has_shim(folder):
        native.compile_library(SHIM, _shim(folder), "-O3", "-pthread", *native.cpu_flags().split())
    with _openblas_settings(threads):
        library = ctypes.CDLL(chosen.path)  # RTLD_LOCAL
    shim = ctypes.CDLL(str(_shim(folder)), mode=ctypes.RTLD_GLOBAL)
    address = ctypes.cast(getattr(library, f"{chosen.prefix}cblas_sgemm"), ctypes.c_void_p)
    ctypes.c_void_p.in_dll(shim, "mlx_transformer_sgemm").value = address.value
    activated = Blas(*_describe(library, chosen), checked.gflops, library, shim, chosen.prefix)
    activated.set_threads(threads)
    return activated


@contextmanager
def _openblas_settings(threads: int) -> Iterator[None]:
    """Set the environment variables that OpenBLAS reads while it is loaded, unless the user has set them.

    The number of threads (its default: one per logical CPU), and how long they spin before they sleep: 2^18 turns
    instead of 2^26, which occupies a core for a tenth of a second.
    """
    before = dict(os.environ)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "18")
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def _describe(library: ctypes.CDLL, chosen: Library) -> tuple[str, str]:
    """Return (name with version, kernel) as the library reports them."""
    config = _text(library, f"{chosen.prefix}openblas_get_config")
    if config:  # "OpenBLAS 0.3.34  DYNAMIC_ARCH NO_AFFINITY Haswell MAX_THREADS=64"
        return " ".join(config.split()[:2]), _text(library, f"{chosen.prefix}openblas_get_corename")
    return chosen.name, ""


def _text(library: ctypes.CDLL, function: str) -> str:
    get = getattr(library, function, None)
    if get is None:
        return ""
    get.restype = ctypes.c_char_p
    return get().decode()
