"""The command line of `python -m mlx_transformer.interop`."""

from mlx_transformer.run.commands.interop import main
from mlx_transformer.utils.errors import exit_cleanly

exit_cleanly(main)
