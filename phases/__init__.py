"""The ladder, a module a phase."""

import mlx_transformer  # noqa: F401 - prepares the runtime before a phase imports mlx.core
