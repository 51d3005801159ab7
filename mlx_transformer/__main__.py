"""The command line of `python -m mlx_transformer`."""

import sys
from pathlib import Path

from mlx_transformer.run.commands import dispatch
from mlx_transformer.utils.errors import exit_cleanly

_PACKAGE = "mlx_transformer.run.commands"
COMMANDS = {
    "generate": (f"{_PACKAGE}.generate:main", "generate text with a trained model"),
    "evaluate": (f"{_PACKAGE}.evaluate:main", "compute a model's loss, perplexity and bits per byte over a text"),
    "serve": ("mlx_transformer.serve.command:main", "open a page to play with a trained model"),
    "runs": (f"{_PACKAGE}.runs:main", "list past runs, or compare some of them"),
    "import": (f"{_PACKAGE}.interop:import_command", "convert a Hugging Face folder to a run"),
    "export": (f"{_PACKAGE}.interop:export_command", "convert a run to a Hugging Face folder"),
    "info": (f"{_PACKAGE}.info:main", "print versions and device, or a saved model's configuration"),
}


def main() -> None:
    """Run a command; without one, list them. Also the console script `mlx-transformer`."""
    name = Path(sys.argv[0]).name
    prog = "python -m mlx_transformer" if name == "__main__.py" else name
    exit_cleanly(lambda: dispatch(COMMANDS, prog, sys.argv[1:] or ["--help"]))


if __name__ == "__main__":
    main()
