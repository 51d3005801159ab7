"""The command line of `python -m mlx_transformer.generate`."""

from mlx_transformer.run.commands.generate import main
from mlx_transformer.utils.errors import exit_cleanly

exit_cleanly(main)
