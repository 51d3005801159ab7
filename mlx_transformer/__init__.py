"""A ladder through eight years of transformer research, written directly in Apple's MLX."""

import signal
import sys
from typing import TYPE_CHECKING, Any

from mlx_transformer.backend import prepare as _prepare

if TYPE_CHECKING:
    from mlx_transformer.run.saved import load as load

__all__ = ["load", "main"]

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of a command still importing, Ctrl-C leaves no traceback behind

_prepare()  # before anything imports mlx.core: see backend/runtime.py


def main(name: str) -> None:
    """Run the command line of the file that ends in `mt.main(__name__)`, if that file is the program.

    Trains what the file defines: see run/ladder.py. Returns at once where the file is imported.
    """
    if name == "__main__":
        from mlx_transformer.run import training

        training.main(sys.modules[name])


def __getattr__(name: str) -> Any:
    """`load`, imported when it is asked for: it needs mlx.core, which not every user of this package does."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlx_transformer.run.saved import load

    return load
