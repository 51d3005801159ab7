"""A real BLAS under MLX's matmul on a Linux CPU (the wheel's own is the reference BLAS, 30-50x slower).

libmlx takes `cblas_sgemm` from the global symbol scope. A shim of one function (sgemm.cpp), loaded there before
`mlx.core`, hands every call but those of a few rows on to the library chosen here; the library itself stays in a scope
of its own, so that NumPy, SciPy and torch keep the BLAS they came with. Which library: the fastest of those that agree
with float64 on this CPU, measured on first use in a process of its own (a BLAS made for another CPU may crash) and then
remembered.
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
class Verdict:
    """What the check of one library found; `fault` is empty if it is right."""

    library: Library
    fault: str
    gflops: float = 0.0
    sure: bool = True  # worth remembering


@dataclass
class Blas:
    """A BLAS that MLX's matmul is handed to."""

    name: str
    kernel: str
    gflops: float
    library: ctypes.CDLL = field(repr=False)
    shim: ctypes.CDLL = field(repr=False)
    prefix: str = field(repr=False, default="")

    def describe(self) -> str:
        """Such as "OpenBLAS 0.3.34 (Haswell kernel)"."""
        return f"{self.name} ({self.kernel} kernel)" if self.kernel else self.name

    @property
    def threads(self) -> int:
        """Threads of one matmul."""
        return self._function("openblas_get_num_threads", "MKL_Get_Max_Threads")()

    def set_threads(self, count: int) -> None:
        """Split every matmul over `count` threads (1 where several MLX streams compute at the same time)."""
        self._function("openblas_set_num_threads", "MKL_Set_Num_Threads")(count)
        ctypes.c_int.in_dll(self.shim, "mlx_transformer_threads").value = count

    def _function(self, openblas: str, mkl: str) -> Callable[..., int]:
        """Both makers' libraries say the same with other names; a third one keeps its own counsel."""
        ours = getattr(self.library, self.prefix + openblas, None)
        return ours or getattr(self.library, mkl, None) or (lambda *_: 1)

    @property
    def calls(self) -> int:
        """How often MLX's matmul has come here: the proof that it does."""
        return ctypes.c_long.in_dll(self.shim, "mlx_transformer_calls").value


def installed() -> list[Library]:
    """The BLAS libraries found here, without loading any: PyPI wheels first, then the system's."""
    found = []
    spec = find_spec("scipy_openblas32")
    if spec and spec.origin:
        path = os.path.join(os.path.dirname(spec.origin), "lib", "libscipy_openblas.so")
        found.append(Library("scipy-openblas32", path, "scipy_"))
    found += [Library("mkl", path) for path in sorted(glob(f"{sys.prefix}/lib/libmkl_rt.so*"))[-1:]]
    system = [path for folder in _SYSTEM_FOLDERS for path in glob(f"{folder}/libopenblas.so.0")]
    found += [Library("system OpenBLAS", path) for path in system[:1]]
    return [library for library in found if os.path.exists(library.path)]


def check(library: Library, threads: int, timeout: float = 60.0) -> Verdict:
    """Compare `library` with float64 and time it, in a process of its own."""
    script = str(Path(__file__).with_name("blas_check.py"))
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({script!r}, run_name='__main__')"]
    settings = {name: str(threads) for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        done = subprocess.run(
            [*command, library.path, library.prefix], env=os.environ | settings, capture_output=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return Verdict(library, f"did not answer within {timeout:.0f} s")
    if done.returncode < 0:  # SIGKILL is the system's answer to too little memory, not the library's
        return Verdict(library, f"crashed with signal {-done.returncode}", sure=done.returncode != -signal.SIGKILL)
    if done.returncode:
        complaint = (done.stderr.decode(errors="replace").strip() or "no message").splitlines()[-1]
        return Verdict(library, f"could not be checked ({complaint})", sure=False)
    found = json.loads(done.stdout)
    if not found["error"] <= TOLERANCE:
        return Verdict(library, f"is wrong by {found['error']:.2g} * sqrt(K) on this CPU")
    return Verdict(library, "", found["gflops"])


def judge(libraries: Iterable[Library], folder: Path, threads: int) -> list[Verdict]:
    """The verdict on each library, measured on first use of a version on a CPU and kept in `folder`."""
    libraries = list(libraries)
    stamps = [native.stamp(library.path) for library in libraries]
    kernels = [os.environ.get(name) for name in _KERNEL_CHOICE]
    path = folder / f"verdicts-{native.digest(native.cpu_key(), threads, kernels, libraries, stamps)}.json"
    try:
        return [Verdict(Library(**row.pop("library")), **row) for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        pass
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = [check(library, threads) for library in libraries]
    if all(verdict.sure for verdict in verdicts):
        write_json(path, [asdict(verdict) for verdict in verdicts])
    return verdicts


def fastest(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The right library to use: an earlier one unless a later one is a fifth faster, since other programs disturb."""
    best = None
    for verdict in verdicts:
        if not verdict.fault and (best is None or verdict.gflops > 1.2 * best.gflops):
            best = verdict
    return best


def has_shim(folder: Path) -> bool:
    """Whether `activate` can do without a compiler."""
    return native.is_whole(_shim(folder))


def _shim(folder: Path) -> Path:
    return folder / f"sgemm-{native.digest(SHIM, native.cpu_key(), native.cpu_flags())}.so"


def activate(verdict: Verdict, folder: Path, threads: int) -> Blas:
    """Load the library and put the shim in front of it, so that MLX, imported later, calls it.

    Raises OSError if there is no C++ compiler for the shim, or if either cannot be loaded.
    """
    chosen = verdict.library
    if not has_shim(folder):
        native.compile_library(SHIM, _shim(folder), "-O3", "-pthread", *native.cpu_flags().split())
    with _told(threads):
        library = ctypes.CDLL(chosen.path)  # RTLD_LOCAL
    shim = ctypes.CDLL(str(_shim(folder)), mode=ctypes.RTLD_GLOBAL)
    address = ctypes.cast(getattr(library, f"{chosen.prefix}cblas_sgemm"), ctypes.c_void_p)
    ctypes.c_void_p.in_dll(shim, "mlx_transformer_sgemm").value = address.value
    activated = Blas(*_describe(library, chosen), verdict.gflops, library, shim, chosen.prefix)
    activated.set_threads(threads)
    return activated


@contextmanager
def _told(threads: int) -> Iterator[None]:
    """What OpenBLAS asks the environment for while it is loaded, unless that says otherwise already.

    The threads: else one for every logical CPU. And how long they wait for work before they sleep, 2^18 turns of a loop
    instead of 2^26, a tenth of a second in which they take a core from others.
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
    """(name with version, kernel) as the library tells them."""
    config = _text(library, f"{chosen.prefix}openblas_get_config")
    if config:  # "OpenBLAS 0.3.34  DYNAMIC_ARCH NO_AFFINITY Haswell MAX_THREADS=64"
        return " ".join(config.split()[:2]), _text(library, f"{chosen.prefix}openblas_get_corename")
    return chosen.name, ""


def _text(library: ctypes.CDLL, function: str) -> str:
    found = getattr(library, function, None)
    if found is None:
        return ""
    found.restype = ctypes.c_char_p
    return found().decode()
