"""A report of what MLX computes on here."""

import sys

import mlx.core as mx

from mlx_transformer.backend import native
from mlx_transformer.backend.cache import cache_dir
from mlx_transformer.backend.device import device_info, versions
from mlx_transformer.backend.extension import describe_primitives
from mlx_transformer.backend.runtime import compiles, is_plain, prepare


def report() -> list[str]:
    """Describe the device, the versions and what `prepare` changed, one line each."""
    found = versions()
    lines = [
        f"device     {device_info().describe()}",
        f"versions   mlx {found['mlx']}, Python {found['python']}, mlx-transformer {found['project']}",
        f"cache      {cache_dir()}",
    ]
    if sys.platform != "linux" or is_plain():
        return [*lines, f"settings   MLX as installed{' (MLX_TRANSFORMER_PLAIN)' if is_plain() else ''}"]
    prepared = prepare()
    kernels, library = prepared.kernels, prepared.blas
    return [
        *lines,
        f"blas       {library.describe() if library and library.is_used() else 'the one MLX came with'}",
        f"threads    {prepared.threads} (physical cores here: {native.physical_cores()})",
        f"allocator  {'keeps freed memory' if prepared.allocator else 'as the system sets it'}",
        f"compile    {'on' if compiles() else 'off'}{f', g++ flags {kernels.flags}' if kernels else ''}",
        f"kernels    {f'{kernels.count} compiled in {kernels.folder}' if kernels else 'in the temporary folder'}",
        f"decoding   with {describe_primitives()}",
        f"gpu        {'yes' if mx.is_available(mx.gpu) else 'none'}",
    ]
