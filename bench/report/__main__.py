"""The command line of `python -m bench report`."""

from bench.report.report import main
from mlx_transformer.utils.errors import exit_cleanly

exit_cleanly(main)
