"""What the system's own programs print about its GPU and CPU, parsed."""

import subprocess
from types import SimpleNamespace

import pytest

from mlx_transformer.backend import apple, native

IOREG = """\
+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X, id 0x1000004fd, registered, matched, active, busy 0>
    {
      "IOClass" = "AGXAcceleratorG13X"
      "model" = "Apple M1 Max"
      "GPUConfigurationVariable" = {"num_gps"=4,"gpu_gen"=13,"usc_gen"=1,"num_cores"=24,"num_mgpus"=2,"num_frags"=32}
      "gpu-core-count" = 24
      "PerformanceStatistics" = {"In use system memory"=734879744,"Device Utilization %"=5}
    }

"""
SYSTEM_PROFILER = """\
Graphics/Displays:

    Apple M3 Max:

      Chipset Model: Apple M3 Max
      Type: GPU
      Bus: Built-In
      Total Number of Cores: 30
      Vendor: Apple (0x106b)
      Metal Support: Metal 3
"""
LSCPU = {
    "ARM Neoverse-N1": """\
Architecture:             aarch64
  CPU op-mode(s):         32-bit, 64-bit
  Byte Order:             Little Endian
CPU(s):                   4
  On-line CPU(s) list:    0-3
Vendor ID:                ARM
  BIOS Vendor ID:         AWS
  Model name:             Neoverse-N1
    BIOS Model name:      AWS Graviton2 AWS Graviton2 CPU @ 2.5GHz
    Model:                1
    Thread(s) per core:   1
Caches (sum of all):
  L1d:                    256 KiB (4 instances)
""",
    "ARM Cortex-A55 + Cortex-A76": """\
Architecture:                    aarch64
CPU(s):                          8
Vendor ID:                       ARM
Model name:                      Cortex-A55
Model:                           0
Model name:                      Cortex-A76
Model:                           0
""",
    "Apple aarch64": """\
Architecture:          aarch64
CPU(s):                4
Vendor ID:             Apple
Model name:            -
Model:                 0
""",
    "aarch64": "",
}


@pytest.fixture
def programs(monkeypatch):
    """Replace the system's programs by what they print; one that is missing raises FileNotFoundError."""

    def install(platform, **printed):
        def run(command, **_):
            if command[0] not in printed:
                raise FileNotFoundError(command[0])
            return SimpleNamespace(stdout=printed[command[0]])

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(apple.sys, "platform", platform)
        monkeypatch.setattr(native, "_cpuinfo", lambda: {"BogoMIPS": "243.75", "CPU implementer": "0x41"})
        monkeypatch.setattr(native.os, "uname", lambda: SimpleNamespace(machine="aarch64"))
        apple.gpu_cores.cache_clear(), native.cpu_name.cache_clear()

    yield install
    apple.gpu_cores.cache_clear(), native.cpu_name.cache_clear()


def test_the_gpu_cores_of_a_mac(programs):
    programs("darwin", ioreg=IOREG, system_profiler=SYSTEM_PROFILER)
    assert apple.gpu_cores() == 24
    programs("darwin", ioreg="", system_profiler=SYSTEM_PROFILER)
    assert apple.gpu_cores() == 30
    programs("darwin", system_profiler=SYSTEM_PROFILER)
    assert apple.gpu_cores() == 30
    programs("darwin")
    assert apple.gpu_cores() is None
    programs("linux", ioreg=IOREG)
    assert apple.gpu_cores() is None


@pytest.mark.parametrize("name", LSCPU)
def test_an_arm_cpu_has_a_name(programs, name):
    programs("linux", lscpu=LSCPU[name])
    assert native.cpu_name() == name


def test_without_lscpu_it_is_the_architecture(programs):
    programs("linux")
    assert native.cpu_name() == "aarch64"


def test_the_name_in_cpuinfo_has_precedence(programs, monkeypatch):
    programs("linux", lscpu=LSCPU["ARM Neoverse-N1"])
    monkeypatch.setattr(native, "_cpuinfo", lambda: {"model name": "AMD EPYC 9654"})
    assert native.cpu_name() == "AMD EPYC 9654"
