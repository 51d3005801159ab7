"""The ladder: one module for each phase."""

import mlx_transformer  # noqa: F401 - prepares the runtime before a phase imports mlx.core
