"""The CPU, its cores, the memory and the C++ compiler of this machine (Linux only)."""

import functools
import hashlib
import math
import os
import shutil
import struct
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

WRAPPER_FOLDER = "mlx_transformer-g++"  # put on PATH by jit.py; not the compiler itself
_SECTION_FIELDS = (("<Q", 0x28), ("<H", 0x3A), ("<H", 0x3C))  # ELF header: e_shoff, e_shentsize, e_shnum


class CompilerError(OSError):
    """g++ is installed but does not compile (missing headers, for example)."""


def _cpuinfo() -> dict[str, str]:
    """Read the first processor of /proc/cpuinfo (the others repeat it, and may be hundreds of kilobytes)."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = file.read(16384).split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


@functools.cache
def cpu_name() -> str:
    """Return the CPU's model name, such as "AMD EPYC 9654".

    /proc/cpuinfo has none on arm64: there it is what lscpu makes of its numbers, such as "ARM Neoverse-N1".
    """
    info = _cpuinfo()
    return info.get("model name") or info.get("Model") or _name_by_lscpu()


def _name_by_lscpu() -> str:
    """Join vendor and kinds of cores, such as "ARM Cortex-A55 + Cortex-A76"; the architecture for unknown cores."""
    try:
        command = ["lscpu"]
        shown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
    except OSError:
        return os.uname().machine
    fields = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in shown.splitlines())]
    vendor = next((value for key, value in fields if key == "Vendor ID"), "")
    cores = dict.fromkeys(value for key, value in fields if key == "Model name" and value not in ("", "-"))
    return f"{vendor} {' + '.join(cores) or os.uname().machine}".strip()


def cpu_key() -> str:
    """Return a hash of this CPU's instruction set: code compiled under another hash may not run here."""
    info = _cpuinfo()
    fields = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features")
    return digest(os.uname().machine, *(info.get(field, "") for field in fields))


def digest(*parts: object) -> str:
    """Hash the parts: 16 hexadecimal digits."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def stamp(path: str) -> tuple[str, int, int]:
    """Return (path, bytes, time) of a file with links resolved, which change when another version replaces it."""
    real = os.path.realpath(path)
    status = os.stat(real)
    return real, status.st_size, status.st_mtime_ns


def physical_cores() -> int:
    """Count the cores this process may use: hyper-threads once, within the affinity mask and cgroup quota (v2, v1)."""
    cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _cgroup_quota()))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _cgroup_quota() -> int:
    """Return the container's quota in CPUs, rounded up; a very large number if there is none."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((Path("/sys/fs/cgroup") / name).read_text() for name in files).split()
            if quota not in ("max", "-1"):
                return max(1, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):
            continue
    return 1 << 30


def memory_bytes() -> int:
    """Return the memory of this machine, or of this container if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroup v2, v1
        with suppress(OSError, ValueError):  # no limit: the file holds "max" or is missing
            total = min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
    return total


def cpu_flags() -> str:
    """Return the g++ flags for all of this CPU's instructions; none on an unknown architecture."""
    return {"x86_64": "-march=native", "aarch64": "-march=native"}.get(os.uname().machine, "")


def search_path() -> list[str]:
    """Return PATH without the folders that jit.py added in this process or its parents."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return [folder for folder in folders if os.path.basename(folder) != WRAPPER_FOLDER]


def compiler() -> str | None:
    """Return the absolute path of g++, or None. MLX runs a program of exactly this name, so no other compiler helps."""
    return shutil.which("g++", path=os.pathsep.join(search_path()))


def compile_library(source: str, path: Path, *flags: str) -> None:
    """Compile C++ `source` to the shared library `path`, which is never incomplete.

    Raises CompilerError with g++'s first message, and OSError if there is no g++ or the folder cannot be written.
    """
    gxx = compiler()
    if gxx is None:
        raise OSError("g++ was not found")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        library = Path(folder) / path.name
        command = [gxx, "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", *flags, "-", "-o", str(library), "-ldl"]
        done = subprocess.run(command, input=source, capture_output=True, text=True)
        if done.returncode:
            raise CompilerError(f"{gxx} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}")
        os.replace(library, path)


def is_whole(path: Path) -> bool:
    """Whether `path` is a complete 64-bit ELF file, by the size in its header."""
    try:
        with open(path, "rb") as file:
            header = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    section_table, entry_size, entries = (struct.unpack_from(f, header, at)[0] for f, at in _SECTION_FIELDS)
    return 0 < section_table <= size - entry_size * entries  # the table is the last thing in the file
