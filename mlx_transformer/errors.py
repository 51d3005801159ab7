"""What a person may see instead of a traceback: one sentence and an exit code."""

import sys
from collections.abc import Callable
from typing import NoReturn


class BadInput(ValueError):
    """What was asked for cannot be done; the sentence names the value, what was expected and what to do (exit code 2)."""


class RunFailed(Exception):
    """A run that started and could not go on: diverged, disk full (exit code 1)."""


class Interrupted(Exception):
    """Ctrl-C; everything is saved and the sentence says how to resume (exit code 130)."""


_EXIT_CODES = {BadInput: 2, RunFailed: 1, Interrupted: 130}


def exit_cleanly(command: Callable[[], None]) -> NoReturn:
    """Run a command line's body; turn the three errors above into one line on stderr and their exit code."""
    try:
        command()
    except tuple(_EXIT_CODES) as error:
        print(f"error: {error}" if not isinstance(error, Interrupted) else str(error), file=sys.stderr)
        sys.exit(_EXIT_CODES[type(error)])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
