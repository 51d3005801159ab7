"""Hugging Face folders to models and back.

Only safetensors and JSON are read. An architecture is a `Format` in `formats.py`: tables that serve both directions.
"""

from mlx_transformer.interop.folders import ImportedModel, read_model, write_model

__all__ = ["ImportedModel", "read_model", "write_model"]
