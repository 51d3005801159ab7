"""Contestants measured interleaved, A B A B: each in a process of its own that is kept alive and driven over a pipe."""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare import stats
from mlx_transformer.backend import device_info, prepare, search_path, versions
from mlx_transformer.nn.model import Model
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.files import write_json
from mlx_transformer.utils.trees import by_path

ROOT = Path(__file__).parent.parent.parent
# What prepare() does to MLX's process by mallopt, as a process gets it that does not know of it.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
# The package `bench` prepares the runtime when it is imported; this keeps it from touching a process of PyTorch's.
UNTOUCHED = {"MLX_TRANSFORMER_PLAIN": "1"}
_TOLD = ("MALLOC_", "OPENBLAS_", "OMP_", "MKL_", "MLX_")  # environment variables that a speed may depend on
_TORCH_DEVICES = {"metal": "mps", "cuda": "cuda", "cpu": "cpu"}


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What is measured: a class `module:Class` made from settings, in an environment."""

    name: str
    target: str
    settings: dict[str, Any]
    environment: dict[str, str]


@dataclass
class Child:
    """A contestant's process."""

    worker: Worker
    process: subprocess.Popen
    said: Path  # its stderr
    facts: dict[str, Any] = field(default_factory=dict)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer. Raises RunFailed with the child's last line if it died."""
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            line = ""
        if not line:
            why = last_words(self.process.wait(), self.said.read_text(errors="replace"))
            raise RunFailed(f"the contestant {self.worker.name} failed: {why}")
        return json.loads(line)


def last_words(code: int, said: str) -> str:
    """Why a process ended: the last line that it said, unless a signal left it no time to say why."""
    if code < 0:
        return f"ended by signal {-code}"
    lines = said.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"ended with code {code}, without a message"


@contextmanager
def started(workers: Sequence[Worker]) -> Iterator[dict[str, Child]]:
    """The contestants' processes by name, each ready for its first round; all are ended on leaving."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        children = {}
        for i, one in enumerate(workers):
            said = folder / f"{i}.txt"
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.workers.child", one.target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context(said.open("w")),
                text=True,
                env=one.environment,
                cwd=ROOT,
            )
            stack.callback(_end, process)
            children[one.name] = Child(one, process, said)
            children[one.name].facts = children[one.name].ask(**one.settings)
        yield children


def _end(process: subprocess.Popen) -> None:
    process.kill()  # nothing of its is to be saved
    process.communicate()


def environment(threads: int, **changes: str) -> dict[str, str]:
    """This process's variables with the threads set, and without what prepare() and a person's own tuning put there."""
    own = {name: value for name, value in os.environ.items() if name not in (*ALLOCATOR, "MLX_BFS_MAX_WIDTH")}
    own |= {"PATH": os.pathsep.join(search_path()), "MLX_TRANSFORMER_PLAIN": "0"}
    own |= {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return own | changes


def threads() -> int:
    """Those that every contestant is given."""
    return prepare().threads if sys.platform == "linux" else os.cpu_count() or 1


def torch_device() -> str:
    """PyTorch's name of the device that MLX computes on."""
    return _TORCH_DEVICES[device_info().backend]


def interleave(
    children: dict[str, Child], rounds: int, request: dict[str, Any], say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Every round asks each child once, in turn, for the same; all answers by name."""
    return interleave_each(children, rounds, dict.fromkeys(children, request), say)


def interleave_each(
    children: dict[str, Child], rounds: int, requests: dict[str, dict[str, Any]], say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """The same with a request for each child by name."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
    for i in range(rounds):
        for name, child in children.items():
            answers[name].append(child.ask(**requests[name]))
        took = ", ".join(f"{name} {own[-1]['seconds']:.2f} s" for name, own in answers.items())
        say(f"round {i + 1} of {rounds}: {took}")
    return answers


@dataclass(frozen=True)
class Ratio:
    """How many times faster a is than b: the ratio of median seconds b / a and its 95 % interval (None: one round)."""

    a: str
    b: str
    ratio: float
    low: float | None
    high: float | None
    rounds: int

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x" + ("" if self.low is None else f" ({self.low:.2f}-{self.high:.2f})")


def compare(a: str, b: str, seconds: dict[str, list[float]]) -> Ratio:
    """The ratio of medians with its interval, paired by round: what disturbs one disturbs its neighbour."""
    count = min(len(seconds[a]), len(seconds[b]))
    if count == 1:
        return Ratio(a, b, float(np.median(seconds[b]) / np.median(seconds[a])), None, None, 1)
    found = stats.ratio_of_medians(np.array(seconds[b][:count]), np.array(seconds[a][:count]))
    return Ratio(a, b, found.value, found.low, found.high, count)


def machine() -> dict[str, Any]:
    """Where a measurement was taken, and with which code."""
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


def save_weights(path: Path, model: Model) -> None:
    """Write a model's weights as .npz, by our paths, for the reference to load."""
    weights: dict[str, Any] = {name: np.array(value) for name, value in by_path(model.parameters()).items()}
    np.savez(path, **weights)


def _commit() -> str | None:
    """Of this checkout; "-dirty" where files were changed since. None where there is no git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def told(child: Child) -> dict[str, Any]:
    """What is recorded of a contestant: its own facts and the variables that it was given."""
    told = {name: value for name, value in child.worker.environment.items() if name.startswith(_TOLD)}
    given = {name: value for name, value in told.items() if os.sep not in value}  # a folder is nobody's business
    return {**child.facts, "environment": given}


def read_numbers(flag: str, text: str | None) -> list[int]:
    """ "8,32" -> [8, 32], ascending. Raises BadInput for what is no whole number."""
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,10}", word) and 0 < int(word) < 2**31 for word in words):
        raise BadInput(f"{flag} {text!r}: expected whole numbers of at least 1, with commas")
    return sorted(set(map(int, words)))


def read_names(text: str | None, known: Sequence[str], default: Sequence[str]) -> list[str]:
    """--against: names with commas, each once. Raises BadInput for an unknown one."""
    names = list(default) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise BadInput(f"--against {name!r}: expected some of {', '.join(known)}, with commas")
    return list(dict.fromkeys(names))


def has_torch() -> bool:
    return find_spec("torch") is not None


def check_torch(phase: int | None = None) -> None:
    """Raises BadInput if PyTorch or the phase's reference is missing."""
    if not has_torch():
        raise BadInput(
            "PyTorch is not installed: make test installs it, or pip install -e '.[bench]' -c constraints.txt"
        )
    if phase is None:
        return
    if not (ROOT / "bench" / "reference" / f"phase{phase}.py").is_file():
        raise BadInput(f"phase {phase} has no reference in PyTorch: expected bench/reference/phase{phase}.py")


def check_json(path: Path) -> None:
    """Raises BadInput for a log that a picture of the same name, which ends with .png, would replace."""
    if path.suffix != ".json":
        raise BadInput(f"--out {path}: expected a name that ends with .json")


def check_out(path: Path | None) -> None:
    """Raises BadInput if a log cannot be put there."""
    if path is None:
        return
    if is_there(path):
        raise BadInput(f"--out {path} is there already: a log is not overwritten, give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp").close()  # as write_json's
    except OSError as error:
        raise BadInput(f"--out {path} cannot be written ({error.strerror}): give another place") from error


def is_there(path: Path) -> bool:
    """Whether --out is there. Raises BadInput where nobody can tell."""
    try:
        return path.exists()
    except OSError as error:
        raise BadInput(f"--out {path} cannot be used ({error.strerror}): give another place") from error


def write_log(path: Path | None, log: dict[str, Any]) -> None:
    """Write a log. Raises RunFailed if the disk refuses."""
    if path is None:
        return
    try:
        write_json(path, log)
    except OSError as error:
        raise RunFailed(f"'{path}' could not be written: {error}") from error
