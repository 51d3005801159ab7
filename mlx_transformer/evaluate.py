"""The command line of `python -m mlx_transformer.evaluate`; the function is in train/evaluate.py."""

from mlx_transformer.run.commands.evaluate import main
from mlx_transformer.utils.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(main)
