"""Errors that a command line prints as one sentence, with an exit code, instead of a traceback."""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

# Messages of Metal, CUDA, the allocators of MLX, C++, NumPy and PyTorch, and OpenBLAS.
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|(insufficient|not enough) memory|(unable|attempting|failed) to allocate|can(no|')t allocate|"
    r"bad_alloc|memory ?error|allocation (still )?failed|ErrorMemoryAllocation|metal::malloc\] resource limit",
    re.IGNORECASE,
)


class BadInput(ValueError):
    """Invalid input: the message names the value, what is expected and what to do (exit code 2)."""


class RunFailed(Exception):
    """A run that started and failed: diverged, disk full (exit code 1)."""


class RankLost(RuntimeError):
    """Ranks cannot exchange arrays any more: one is lost."""


class Interrupted(Exception):
    """Ctrl-C; everything is saved and the message says how to resume (exit code 130)."""


def is_out_of_memory(error: BaseException | str) -> bool:
    """Whether an error, or the message of one, means that the device or the machine ran out of memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, str | RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


@contextmanager
def explain_out_of_memory(advice: str = "try a smaller model, --batch-size or --seq-len") -> Iterator[None]:
    """Raise RunFailed where memory runs out inside; advice: what to reduce."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(f"out of memory ({str(error).rstrip('.') or 'MemoryError'}): {advice}") from error


def exit_cleanly(command: Callable[[], None]) -> NoReturn:
    """Run a command line's body and exit; print the three errors above as one line on stderr, with their exit code."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by mlx_transformer/__init__.py during the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _open_closed_streams()
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal cannot show is no error
            stream.reconfigure(errors="replace")
    try:
        with explain_out_of_memory():
            command()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        _discard_stdout()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_stdout()
        print("error: no space is left where the output goes: free some space, then try again", file=sys.stderr)
        sys.exit(1)
    except (BadInput, RunFailed, Interrupted) as error:
        sentence = " ".join(str(error).splitlines())  # another library's message may have several lines
        print(sentence if isinstance(error, Interrupted) else f"error: {sentence}", file=sys.stderr)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def exit_code(error: Exception) -> int:
    """Return the exit code of an error."""
    return 2 if isinstance(error, BadInput) else 130 if isinstance(error, Interrupted) else 1


def _open_closed_streams() -> None:
    """Open standard streams that a shell's `<&-` closed: MLX cannot read a file whose descriptor is 0."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _discard_stdout() -> None:
    """Redirect stdout to nowhere: flushing its buffer when Python exits would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
