"""Processes that measure: a worker is kept alive and driven over a pipe, a program is run to its end.

    worker = Worker(name="mlx", target="bench.workers.mlx_worker:TrainingRounds", settings={...})
    with started([worker]) as workers:
        answer = workers["mlx"].ask(steps=10)

Whatever is measured in a process of its own goes through this module.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.workers.machine import ROOT, threads
from mlx_transformer.backend import search_path
from mlx_transformer.utils.errors import RunFailed, is_out_of_memory

# The allocator settings of backend.prepare(), as environment variables for a process without it.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
# Importing `bench` prepares MLX's runtime; this keeps that from changing a process of PyTorch's.
UNTOUCHED = {"MLX_TRANSFORMER_PLAIN": "1"}
WATCH_SECONDS = 10.0  # between two lines on a program that is run to its end, at least
INTERRUPTED = 130  # exit code of a run that saved and stopped
_RECORDED = ("MALLOC_", "OPENBLAS_", "OMP_", "MKL_", "MLX_")  # prefixes of variables that affect speed


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with the threads set, without allocator settings, and with the changes."""
    variables = {name: value for name, value in os.environ.items() if name not in (*ALLOCATOR, "MLX_BFS_MAX_WIDTH")}
    variables |= {"PATH": os.pathsep.join(search_path()), "MLX_TRANSFORMER_PLAIN": "0"}
    variables |= {name: str(threads()) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return variables | changes


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A measurement: a class, as "module:Class", the settings to make it from, and the process's environment.

    ranks: processes that measure together, as a ring of MLX on this machine.
    """

    name: str
    target: str
    settings: dict[str, Any]
    environment: dict[str, str] = field(default_factory=environment)
    ranks: int = 1


class WorkerFailed(RunFailed):
    """A worker process that ended by itself. code: its exit code, negative for a signal; reason: its last words."""

    def __init__(self, name: str, code: int, reason: str) -> None:
        advice = "; try a smaller --batch-size, --seq-len or --size" if is_out_of_memory(reason) else ""
        super().__init__(f"the worker {name} failed: {reason}{advice}")
        self.code, self.reason = code, reason


@dataclass
class WorkerProcess:
    """A running worker. facts: what it answered when it was made."""

    worker: Worker
    process: subprocess.Popen
    stderr: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises WorkerFailed if the process ended."""
        self.send(request)
        return self.receive()

    def send(self, request: dict[str, Any]) -> None:
        """Send one request; `receive` raises if the process ended."""
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def receive(self) -> dict[str, Any]:
        """Wait for an answer. Raises WorkerFailed if the process ended."""
        if not (line := self.process.stdout.readline()):  # type: ignore[union-attr]
            code = self.process.wait()
            raise WorkerFailed(self.worker.name, code, last_words(code, self.stderr.read_text(errors="replace")))
        return json.loads(line)

    def describe(self) -> dict[str, Any]:
        """Return its facts and the variables of its environment that affect speed, as a log records them."""
        variables = {name: value for name, value in self.worker.environment.items() if name.startswith(_RECORDED)}
        public = {name: value for name, value in variables.items() if os.sep not in value}  # no paths
        return {**self.facts, "environment": public}


@dataclass
class RingProcess(WorkerProcess):
    """A worker of several ranks; the first one's facts and answers, with those of all as `ranks`."""

    others: list[WorkerProcess] = field(default_factory=list)

    def send(self, request: dict[str, Any]) -> None:
        for one in self.others:
            one.send(request)
        super().send(request)

    def receive(self) -> dict[str, Any]:
        answers = [super().receive(), *(one.receive() for one in self.others)]
        return {**answers[0], "ranks": answers}


def last_words(code: int, stderr: str) -> str:
    """Say why a process ended: the signal, else the last line of its stderr, else its exit code."""
    if code < 0:
        return f"ended by signal {-code}"
    lines = stderr.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"ended with code {code}, without a message"


@contextmanager
def started(workers: Sequence[Worker]) -> Iterator[dict[str, WorkerProcess]]:
    """Start workers, by name, each ready for its first round; all are killed on leaving. Raises WorkerFailed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes: dict[str, WorkerProcess] = {}
        for i, worker in enumerate(workers):
            own = [_spawn(worker, place, folder / f"{i}_{rank}.txt", stack) for rank, place in _places(worker, folder)]
            first = own[0]
            if worker.ranks > 1:
                first = RingProcess(first.worker, first.process, first.stderr, others=own[1:])
            processes[worker.name] = first
            first.facts = first.ask(**worker.settings)
        yield processes


def _spawn(worker: Worker, variables: dict[str, str], stderr: Path, stack: ExitStack) -> WorkerProcess:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.workers.worker", worker.target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stack.enter_context(stderr.open("w")),
        text=True,
        env=variables,
        cwd=ROOT,
    )
    stack.callback(_kill, process)
    return WorkerProcess(replace(worker, environment=variables), process, stderr)


def _places(worker: Worker, folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number and the environment of each process; those of a ring share the threads."""
    if worker.ranks == 1:
        yield 0, worker.environment
        return
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(worker.ranks)]
        ports = [one.getsockname()[1] for one in sockets]
    hosts = folder / f"{len(list(folder.iterdir()))}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    share = str(max(1, threads() // worker.ranks))
    own = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), share)
    for rank in range(worker.ranks):
        yield rank, {**worker.environment, **own, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}


def _kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def measure_once(worker: Worker, **request: Any) -> dict[str, Any]:
    """Start a worker for one round; its answer, with its description as `facts`. Raises WorkerFailed."""
    with started([worker]) as processes:
        return {**processes[worker.name].ask(**request), "facts": processes[worker.name].describe()}


class Ended(NamedTuple):
    """A program that ran to its end: exit code, stdout, and why it ended (its last words)."""

    code: int
    stdout: str
    reason: str


def run_to_end(
    arguments: Sequence[str],
    variables: Mapping[str, str] | None = None,
    stdin: str = "",
    watch: Callable[[float], None] | None = None,
) -> Ended:
    """Run `python ARGUMENTS` in the repository to its end.

    watch: called with the seconds so far, each WATCH_SECONDS, and later each tenth of them. Ctrl-C is passed on, so
    that the program can save; the exit code is then INTERRUPTED.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+", errors="replace") as stdout:
        given.write(stdin)
        given.seek(0)
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=given,
                stdout=stdout,
                stderr=stderr,
                env=variables,
                cwd=ROOT,
                start_new_session=True,  # else the terminal sends its Ctrl-C to both processes, and the run gets two
            )
            interrupted = False
            while process.returncode is None:
                try:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(max(WATCH_SECONDS, (time.monotonic() - started) / 10) if watch else None)
                    if watch is not None and process.returncode is None:
                        watch(time.monotonic() - started)
                except KeyboardInterrupt:
                    process.send_signal(signal.SIGINT)  # the first saves and stops, a second one stops at once
                    interrupted = True
            stdout.seek(0), stderr.seek(0)
            reason = last_words(process.returncode, stderr.read())
            return Ended(INTERRUPTED if interrupted else process.returncode, stdout.read(), reason)


def end_as_by_ctrl_c() -> None:
    """Let SIGTERM and the SIGHUP of a closed terminal do what Ctrl-C does, so that no run outlives its parent.

    A signal that this process was started to ignore stays ignored (nohup).
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
