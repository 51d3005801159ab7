"""A ladder through eight years of transformer research, written directly in Apple's MLX."""

from mlx_transformer import runtime as _runtime

_runtime.prepare()  # before anything imports mlx.core: see runtime.py
