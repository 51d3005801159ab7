"""The command line of `python -m mlx_transformer.run`."""

from mlx_transformer.run.training import list_command
from mlx_transformer.utils.errors import exit_cleanly

exit_cleanly(list_command)
