"""Acceleration of MLX on a Linux CPU, and the device: the names that other packages may import.

Those that need mlx.core are imported on first use, since `prepare` must run before it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_transformer.backend.apple import gpu_cores
from mlx_transformer.backend.cache import cache_dir
from mlx_transformer.backend.device import Device, device_info, matmul_gflops, use_device, versions
from mlx_transformer.backend.launch import Launch, launched
from mlx_transformer.backend.native import search_path
from mlx_transformer.backend.runtime import compiles, is_plain, prepare

if TYPE_CHECKING:
    from mlx_transformer.backend.cpu_streams import divide, divided_blas, in_parts, split, streams
    from mlx_transformer.backend.extension import describe_primitives, primitives
    from mlx_transformer.backend.info import report

__all__ = [
    "Device",
    "Launch",
    "cache_dir",
    "compiles",
    "describe_primitives",
    "device_info",
    "divide",
    "divided_blas",
    "gpu_cores",
    "in_parts",
    "is_plain",
    "launched",
    "matmul_gflops",
    "prepare",
    "primitives",
    "report",
    "search_path",
    "split",
    "streams",
    "use_device",
    "versions",
]
_LAZY = {
    **dict.fromkeys(("divide", "divided_blas", "in_parts", "split", "streams"), "cpu_streams"),
    **dict.fromkeys(("describe_primitives", "primitives"), "extension"),
    "report": "info",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
