"""The command line of `python -m mlx_transformer.run`."""

from mlx_transformer.run.commands.runs import main
from mlx_transformer.utils.errors import exit_cleanly

exit_cleanly(main)
