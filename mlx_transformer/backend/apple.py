"""Facts about a Mac's GPU that MLX does not report."""

import functools
import re
import subprocess
import sys

_SOURCES = (
    (("ioreg", "-r", "-d", "1", "-c", "AGXAccelerator"), r'"gpu-core-count"\s*=\s*(\d+)'),
    (("system_profiler", "SPDisplaysDataType"), r"Total Number of Cores:\s*(\d+)"),  # takes seconds
)


@functools.cache
def gpu_cores() -> int | None:
    """Count the GPU's cores, which chips of one name have different numbers of (M1 Max: 24 or 32); None elsewhere."""
    if sys.platform != "darwin":
        return None
    for command, pattern in _SOURCES:
        try:
            shown = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired):
            continue
        if match := re.search(pattern, shown):
            return int(match[1])
    return None
