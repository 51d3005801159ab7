"""The machine that measurements are taken on, and what is installed there."""

import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_transformer.backend import device_info, prepare, versions
from mlx_transformer.utils.errors import BadInput

ROOT = Path(__file__).parent.parent.parent
_TORCH_DEVICES = {"metal": "mps", "cuda": "cuda", "cpu": "cpu"}


def shown_bytes(size: float) -> str:
    """Format bytes: "2.51 GB", "36 MB", "3.1 MB"."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def threads() -> int:
    """Return the number of threads that every worker gets."""
    return prepare().threads if sys.platform == "linux" else os.cpu_count() or 1


def torch_device() -> str:
    """Return PyTorch's name of the device that MLX computes on; $BENCH_TORCH_DEVICE overrides it."""
    return os.environ.get("BENCH_TORCH_DEVICE") or _TORCH_DEVICES[device_info().backend]


def describe_machine() -> dict[str, Any]:
    """Describe device, system, versions, commit and load, as a log records them."""
    device = device_info()
    return {
        "device": device.describe(),
        "backend": device.backend,
        "memory_bytes": device.memory_bytes,
        "system": platform.platform(),
        "threads": threads(),
        "versions": versions(),
        "commit": _commit(),
        "load": os.getloadavg(),
    }


def _commit() -> str | None:
    """Return this checkout's commit, with "-dirty" where files were changed; None without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return find_spec("torch") is not None


def check_torch(phase: int | None = None) -> None:
    """Raise BadInput if PyTorch, or the reference of a phase, is missing."""
    if not has_torch():
        raise BadInput(
            "PyTorch is not installed: make test installs it, or pip install -e '.[bench]' -c constraints.txt"
        )
    if phase is not None and not (ROOT / "bench" / "reference" / f"phase{phase}.py").is_file():
        raise BadInput(f"phase {phase} has no reference in PyTorch: expected bench/reference/phase{phase}.py")
