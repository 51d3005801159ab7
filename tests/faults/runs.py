"""Tiny runs in this process, or in a process of their own that is killed."""

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from mlx_transformer.run import training
from mlx_transformer.run.commands import generate as generate_command
from mlx_transformer.run.commands import runs as runs_command
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.utils.errors import exit_cleanly

ROOT = Path(__file__).parent.parent.parent
_NUMBERS = {"d-model": 16, "n-layers": 1, "n-heads": 2, "d-ff": 32, "seq-len": 24, "vocab-size": 384, "batch-size": 3}
TINY = ["--size", "nano", *(part for name, value in _NUMBERS.items() for part in (f"--{name}", str(value)))]
ON_CPU = [*TINY, "--device", "cpu"]  # where a repeated run must be equal bit for bit: a GPU adds in any order
CLOCKS = (  # of result.json: what differs between equal runs
    *("train_seconds", "preparation_seconds", "compile_seconds", "eval_seconds"),
    *("tokens_per_second", "peak_memory_bytes"),
)
TEXT_BYTES = 30_000
_WORDS = [first + rest for first in ("the", "ca", "do", "sa", "mu", "tree") for rest in ("", "t", "g", "nd", "ry")]


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def write_text(path: Path, *, size: int = TEXT_BYTES, seed: int = 0) -> Path:
    """Write about `size` bytes of documents of random words, the same for the same seed."""
    draw = random.Random(seed)
    documents = (" ".join(draw.choices(_WORDS, k=30)) + "." for _ in range(size // 130))
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


def command(body, *args) -> Outcome:
    """Run the body of a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["command", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            body()
            code = 0
        except SystemExit as end:
            code = end.code
    return Outcome(code, out.getvalue(), err.getvalue())


def merged(args: Sequence[object]) -> list[str]:
    """Drop every flag, with its value, that comes again: a test changes some of the flags that many tests share."""
    words = [*map(str, args)]
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    flags = [words[start:end] for start, end in zip(starts, [*starts[1:], len(words)], strict=True)]
    later = {flag[0]: flag for flag in flags}
    return words[: min(starts, default=len(words))] + [
        word for flag in flags if flag is later[flag[0]] or flag[0] == "--prompt" for word in flag
    ]


def train(*args) -> Outcome:
    """`python -m phases.phase1 ARGS` in this process; of a flag that is there twice the last one."""
    return command(lambda: training.main(find_phase(1)), *merged(args))


def generate(*args) -> Outcome:
    """`python -m mlx_transformer.generate ARGS` in this process."""
    return command(lambda: exit_cleanly(generate_command.main), *args)


def list_runs(*args) -> Outcome:
    """`python -m mlx_transformer.run ARGS` in this process."""
    return command(lambda: exit_cleanly(runs_command.main), *args)


def spawn(*args, **options) -> subprocess.Popen:
    """`python -m phases.phase1 ARGS` in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-m", "phases.phase1", *merged(args)], cwd=ROOT, **pipes)


def train_and_die(pattern: str, nth: int, *args) -> int:
    """Train in a process that kills itself at the nth disk operation that matches the pattern; return its exit code."""
    line = [sys.executable, "-m", "tests.faults.runs", pattern, str(nth), *merged(args)]
    return subprocess.run(line, cwd=ROOT, capture_output=True).returncode


def count_disk_operations(*args) -> int:
    """Count the disk operations of a run that is not killed."""
    line = [sys.executable, "-m", "tests.faults.runs", "", "0", *merged(args)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1])


def assert_bad(ended: Outcome, *words: object) -> None:
    """Check that stderr is one sentence that contains these words, with exit code 2."""
    assert ended.code == 2, ended
    assert ended.err.startswith("error: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    for part in words:
        assert str(part) in ended.err, ended.err


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def curve(folder: Path) -> list[dict]:
    """Read curve.jsonl without measured times."""
    clocks = ("seconds", "tokens_per_second", "data_wait_share")
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


def result(folder: Path) -> dict:
    """Read result.json without measured times and memory."""
    return {key: v for key, v in json.loads((folder / "result.json").read_text()).items() if key not in CLOCKS}


def assert_same_run(folder: Path, reference: Path) -> None:
    """Check that two runs are equal in all but measured times."""
    assert weights(folder) == weights(reference)
    assert curve(folder) == curve(reference)
    assert result(folder) == result(reference)
    assert (folder / "stories.md").read_bytes() == (reference / "stories.md").read_bytes()


def _die_at(pattern: str, nth: int, folder: str) -> list[int]:
    """Kill this process at the nth matching disk operation; return a list that holds the count."""
    seen = [0]

    def hook(event: str, values: tuple) -> None:
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        described = f"{event} {' '.join(str(value) for value in values[:2])}"
        ours = folder in described or (event == "os.remove" and "/" not in described)  # rmtree says only the name
        if ours and re.search(pattern, described):
            seen[0] += 1
            if seen[0] == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


if __name__ == "__main__":
    pattern, nth, *args = sys.argv[1:]
    seen = _die_at(pattern, int(nth), next(args[i + 1] for i, flag in enumerate(args) if flag in ("--out", "--resume")))
    sys.argv[1:] = args
    try:
        training.main(find_phase(1))
    finally:
        print(seen[0], file=sys.stderr)
