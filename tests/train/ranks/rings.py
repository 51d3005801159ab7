"""Rings of real processes on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.workers.ring import own_lines

ROOT = Path(__file__).parent.parent.parent.parent
LONGEST = 120  # seconds until a process that hangs fails its test


@dataclass
class Ring:
    """Running ranks, and the folder with what they print."""

    processes: list[subprocess.Popen]
    folder: Path

    def wait(self) -> list[int]:
        """Return the exit codes, by rank."""
        return [process.wait(LONGEST) for process in self.processes]

    def out(self, rank: int) -> str:
        return (self.folder / f"{rank}.out").read_text()

    def err(self, rank: int) -> str:
        """What a rank wrote to stderr, without the words of MLX's own ring."""
        return "\n".join(own_lines((self.folder / f"{rank}.err").read_text()))


@contextmanager
def ring(folder: Path, *commands: list, **variables: str):
    """Start one rank for each command line of Python, on free ports; kill what is left at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(len(commands))]))
    own = {**os.environ, "MLX_HOSTFILE": str(hosts), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    with ExitStack() as stack:
        processes = []
        for rank, command in enumerate(commands):
            out, err = (stack.enter_context((folder / f"{rank}.{end}").open("w")) for end in ("out", "err"))
            if rank == len(commands) - 1 > 0:
                time.sleep(0.25)  # the last rank connects first, and MLX waits 1 s if rank 0 does not listen yet
            words = [sys.executable, *map(str, command)]
            own["MLX_RANK"] = str(rank)
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=own,
                cwd=ROOT,
                start_new_session=True,  # a group of its own, for `_end`
            )
            stack.callback(_end, process)
            processes.append(process)
        yield Ring(processes, folder)


def _end(process: subprocess.Popen) -> None:
    """Kill a rank, running or stopped, with the processes that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
