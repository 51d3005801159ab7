"""The command line of `python -m mlx_transformer.serve`."""

from mlx_transformer.serve.command import main
from mlx_transformer.utils.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(main)
