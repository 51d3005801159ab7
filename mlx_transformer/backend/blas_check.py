"""Check a library's matmul on this CPU and measure its throughput; a program of its own, since the library may crash.

`python blas_check.py LIBRARY PREFIX` prints {"error": largest error / sqrt(K), "gflops": throughput}.
"""

import ctypes
import json
import sys
import time
from itertools import product

import numpy as np

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112
# Kernels have separate code for edges, for short sides and for more than one cache block: a few shapes of each.
SHAPES = [(1, 1, 1), (1, 64, 33), (3, 5, 7), (17, 31, 64), (33, 70, 129), (64, 64, 16), (130, 257, 400), (513, 96, 769)]


def sgemm(library: ctypes.CDLL, prefix: str, a, b, ta: bool, tb: bool, out) -> None:
    """Compute out = op(a) @ op(b), row-major float32; op transposes where ta or tb is true."""
    m, n = out.shape
    k = a.shape[0] if ta else a.shape[1]
    pointer = ctypes.POINTER(ctypes.c_float)
    flags = [ROW_MAJOR, TRANSPOSED if ta else PLAIN, TRANSPOSED if tb else PLAIN]
    factors = [a.ctypes.data_as(pointer), a.shape[1], b.ctypes.data_as(pointer), b.shape[1]]
    one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
    getattr(library, f"{prefix}cblas_sgemm")(*flags, m, n, k, one, *factors, zero, out.ctypes.data_as(pointer), n)


def worst_error(library: ctypes.CDLL, prefix: str) -> float:
    """Return the largest difference from a float64 product, divided by sqrt(K), over all shapes and transpositions."""
    random = np.random.default_rng(0)
    worst = 0.0
    for (m, n, k), ta, tb in product(SHAPES, (False, True), (False, True)):
        a = random.standard_normal((k, m) if ta else (m, k), dtype=np.float32)
        b = random.standard_normal((n, k) if tb else (k, n), dtype=np.float32)
        out = np.full((m, n), np.nan, dtype=np.float32)  # nan: an element left unwritten is an error
        sgemm(library, prefix, a, b, ta, tb, out)
        left, right = (a.T if ta else a).astype(np.float64), (b.T if tb else b).astype(np.float64)
        exact = np.einsum("mk,kn->mn", left, right)  # NumPy's own loop: no BLAS involved
        error = float(np.abs(out - exact).max()) / k**0.5
        worst = max(worst, error if error == error else float("inf"))
    return worst


def throughput(library: ctypes.CDLL, prefix: str, side: int = 1024, seconds: float = 0.2) -> float:
    """Measure square products for `seconds`; return the GFLOP/s of the fastest."""
    a, b, out = (np.ones((side, side), dtype=np.float32) for _ in range(3))
    best, started = float("inf"), time.perf_counter()
    while (start := time.perf_counter()) < started + seconds:
        sgemm(library, prefix, a, b, False, True, out)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e9


if __name__ == "__main__":
    path, prefix = sys.argv[1:]
    library = ctypes.CDLL(path)
    print(json.dumps({"error": worst_error(library, prefix), "gflops": throughput(library, prefix)}))
