"""The device that arrays are computed on, its memory limits, and how fast its matmul is."""

import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_transformer.backend import native
from mlx_transformer.backend.runtime import prepare
from mlx_transformer.utils.errors import BadInput


@dataclass(frozen=True)
class Device:
    """The device that arrays are computed on."""

    name: str
    backend: Literal["metal", "cuda", "cpu"]
    memory_bytes: int
    blas: str | None = None  # on a CPU: library, version and kernel; None is MLX's own
    threads: int = 1  # of one matmul on a CPU
    tf32: bool = False  # matmuls of float32 round their inputs to 10 bits of mantissa, as MLX does by default there

    def describe(self) -> str:
        """Return one line, such as "AMD EPYC (cpu), 62.8 GiB, OpenBLAS 0.3.34 (Haswell kernel), 2 threads"."""
        parts = [f"{self.name} ({self.backend})", f"{self.memory_bytes / 2**30:.1f} GiB"]
        if self.backend == "cpu":
            parts += [self.blas or "MLX's own BLAS", f"{self.threads} thread{'s' if self.threads != 1 else ''}"]
        if self.tf32:
            parts.append("float32 matmuls in TF32")
        return ", ".join(parts)


def use_device(name: str = "auto") -> Device:
    """Make "gpu", "cpu", or a GPU where there is one ("auto") MLX's default device, and describe it.

    Raises BadInput for another name, and for a GPU that is not there.
    """
    import mlx.core as mx

    if name not in ("auto", "gpu", "cpu"):
        raise BadInput(f"device {name!r} is unknown; choose auto, gpu or cpu")
    has_gpu = mx.is_available(mx.gpu)
    if name == "gpu" and not has_gpu:
        raise BadInput("device 'gpu' was chosen, but MLX finds none here; choose cpu or auto")
    mx.set_default_device(mx.gpu if has_gpu and name != "cpu" else mx.cpu)
    device = device_info()
    if device.backend == "metal":
        configure_memory(mx)
    return device


def device_info() -> Device:
    """Describe MLX's default device."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.gpu):
        info = mx.device_info()
        memory = info.get("memory_size") or info.get("total_memory") or 0
        backend: Literal["metal", "cuda"] = "metal" if mx.metal.is_available() else "cuda"
        return Device(str(info["device_name"]), backend, int(memory), tf32=computes_in_tf32(backend, info))
    if sys.platform == "darwin":
        return Device(f"{platform.machine()} CPU", "cpu", native.memory_bytes(), "Accelerate")
    library = prepare().blas
    if library is None:
        return Device(native.cpu_name(), "cpu", native.memory_bytes())
    return Device(native.cpu_name(), "cpu", native.memory_bytes(), library.describe(), library.threads)


def computes_in_tf32(backend: str, info: Mapping[str, Any]) -> bool:
    """Whether MLX rounds the inputs of float32 matmuls to TF32: with CUDA and from M5 on, unless MLX_ENABLE_TF32=0."""
    if os.environ.get("MLX_ENABLE_TF32", "1") == "0":
        return False
    if backend == "cuda":
        return True
    generation = re.fullmatch(r"applegpu_g(\d+)(\w)", str(info.get("architecture", "")))  # MLX: metal/device.cpp
    return generation is not None and int(generation[1]) >= (18 if generation[2] == "p" else 17)


def configure_memory(mx: Any, info: Mapping[str, Any] | None = None) -> tuple[int, int]:
    """Set Metal's memory limits from what the device recommends; return (wired, cache) in bytes.

    Wired: all of the recommended working set stays resident (macOS 15 and newer; asking for more is an error).
    Cache: freed buffers kept for the next step, at most half of it, so that other programs are not swapped out.
    """
    recommended = int((info or mx.device_info())["max_recommended_working_set_size"])
    wired, cache = recommended, recommended // 2
    mx.set_wired_limit(wired)
    mx.set_cache_limit(cache)
    return wired, cache


def versions() -> dict[str, str]:
    """Return the versions that a result depends on: {"mlx", "python", "project"}."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        project = version("mlx-transformer")
    except PackageNotFoundError:  # run from a folder that was not installed
        project = "unknown"
    return {"mlx": version("mlx"), "python": platform.python_version(), "project": project}


def matmul_gflops(seconds: float = 2.0, side: int = 2048) -> float:
    """Measure a float32 matmul of two `side` x `side` arrays on the default device for `seconds`: GFLOP/s."""
    import mlx.core as mx

    a = mx.random.normal((side, side))
    mx.eval(a @ a)  # the first one also starts threads
    start = time.perf_counter()
    count = 0
    while (elapsed := time.perf_counter() - start) < seconds:
        mx.eval(a @ a)
        count += 1
    return 2 * side**3 * count / elapsed / 1e9
