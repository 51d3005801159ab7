"""What the launcher of several processes, such as `mlx.launch`, tells each of them in its environment."""

import json
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that one command started."""

    backend: str  # ring, jaccl, nccl, mpi
    addresses: tuple[str, ...]  # of rank 0, the best first; () where the launcher does not say
    local: int  # ranks on this machine, which share its cores


def launched() -> Launch | None:
    """Read the environment; None: this process is alone."""
    if "MLX_RANK" in os.environ and (hosts := _ring_hosts()):
        own = hosts[min(int(os.environ["MLX_RANK"]), len(hosts) - 1)]
        return Launch("ring", tuple(hosts[0]), sum(host[0] == own[0] for host in hosts)) if len(hosts) > 1 else None
    if (coordinator := os.environ.get("MLX_JACCL_COORDINATOR")) and "MLX_RANK" in os.environ:
        return Launch("jaccl", (coordinator.rpartition(":")[0],), 1)
    if int(os.environ.get("MLX_WORLD_SIZE", "1")) > 1 and "NCCL_HOST_IP" in os.environ:
        return Launch("nccl", (os.environ["NCCL_HOST_IP"],), 1)
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return Launch("mpi", (), int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")))
    return None


def _ring_hosts() -> list[list[str]]:
    """Return the addresses of each rank of a ring, without ports; `mlx.launch -n 1` leaves an empty file."""
    try:
        with open(os.environ.get("MLX_HOSTFILE", ""), encoding="utf-8") as file:
            return [[place.rpartition(":")[0] for place in host] for host in json.loads(file.read() or "[]")]
    except (OSError, ValueError, TypeError, AttributeError):
        return []  # MLX names what is wrong with it
