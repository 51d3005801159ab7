"""Measurements. Importing the package first prepares the runtime, before anything imports mlx.core."""

import mlx_transformer  # noqa: F401
