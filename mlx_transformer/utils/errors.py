"""What a person may see instead of a traceback: one sentence and an exit code."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class BadInput(ValueError):
    """What was asked for cannot be done: the sentence names the value, what was expected, what to do (exit code 2)."""


class RunFailed(Exception):
    """A run that started and could not go on: diverged, disk full (exit code 1)."""


class Interrupted(Exception):
    """Ctrl-C; everything is saved and the sentence says how to resume (exit code 130)."""


def exit_cleanly(command: Callable[[], None]) -> NoReturn:
    """Run a command line's body; turn the three errors above into one line on stderr and their exit code."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as it was while the command was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _fill_closed()
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal cannot show must not end a run
            stream.reconfigure(errors="replace")
    try:
        command()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _write_no_more()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _write_no_more()
        print("error: no space is left where the output goes: make room, then try again", file=sys.stderr)
        sys.exit(1)
    except (BadInput, RunFailed, Interrupted) as error:
        sentence = " ".join(str(error).splitlines())  # what other libraries say may have several
        print(sentence if isinstance(error, Interrupted) else f"error: {sentence}", file=sys.stderr)
        sys.exit(_exit_code(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _exit_code(error: Exception) -> int:
    return 2 if isinstance(error, BadInput) else 130 if isinstance(error, Interrupted) else 1


def _fill_closed() -> None:
    """A shell's `<&-` closes a standard stream: no file may take its number, as MLX reads from none that is 0."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _write_no_more() -> None:
    """What stdout still holds would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
