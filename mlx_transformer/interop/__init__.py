"""Hugging Face in and out: `python -m mlx_transformer.interop import DIR RUN`, or `export RUN DIR`.

Only safetensors and JSON. An architecture is a `Format` in `formats.py`: two tables that are read both ways.
"""

from mlx_transformer.interop.folders import export_model, import_model

__all__ = ["export_model", "import_model"]
