"""A training command as several ranks on this machine, and as one process."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.workers.machine import ROOT
from mlx_transformer.utils.errors import RunFailed

# The words of MLX's ring: threads write them in pieces, so that they come in any order, and before a line of ours.
_RING = re.compile(
    r"^(\[ring\]|Socket|Receiving from socket|Sending to socket|was closed by the peer|failed with errno"
    r"|made no progress|Too many send/recv errors\. Failing pending tasks\.\.\.|\d+|\s)+"
)
LONGEST = 600  # seconds until a run that hangs is an error


class Ring:
    """The running processes, by rank, and what they print."""

    def __init__(self, processes: list[subprocess.Popen], folder: Path) -> None:
        self.processes, self.folder = processes, folder

    def wait(self, ranks: Sequence[int] | None = None) -> list[int]:
        """Return the exit codes of some ranks, by default of all."""
        return [self.processes[rank].wait(LONGEST) for rank in ranks or range(len(self.processes))]

    def said(self, rank: int) -> str:
        """Return the last line of a rank's stderr that is not of MLX's own ring; "" without one."""
        return (own_lines((self.folder / f"{rank}.txt").read_text(errors="replace")) or [""])[-1]


def own_lines(text: str) -> list[str]:
    """Return what a rank wrote to stderr, by line, without the words of MLX's own ring."""
    return [own for line in text.splitlines() if (own := _RING.sub("", line))]


@contextmanager
def started(command: Sequence[object], size: int) -> Iterator[Ring]:
    """Start `python COMMAND` as so many ranks with one thread each; kill what is left at the end."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(size)]))
        processes = []
        for rank in range(size):
            own = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} if size > 1 else {}
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stack.enter_context((folder / f"{rank}.txt").open("w")),
                env={**os.environ, "OMP_NUM_THREADS": "1", **own},
                cwd=ROOT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield Ring(processes, folder)


def run(command: Sequence[object], size: int) -> None:
    """Run `python COMMAND` as so many ranks to its end. Raises RunFailed if one fails."""
    with started(command, size) as ring:
        codes = ring.wait()
        if any(codes):
            raise RunFailed(f"{' '.join(map(str, command))} as {size} ranks ended with {codes}: {ring.said(0)}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
