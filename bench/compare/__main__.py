"""The command line of `python -m bench.compare`."""

from bench.compare.command import main
from mlx_transformer.utils.errors import exit_cleanly

exit_cleanly(main)
