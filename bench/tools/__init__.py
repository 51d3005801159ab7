"""The tools of the bench."""

import mlx_transformer  # noqa: F401 - prepares the runtime before a tool imports mlx.core
