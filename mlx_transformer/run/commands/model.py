"""Loading of the model that a command line names."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.nn.model import Model
from mlx_transformer.run.saved import load


def load_model(run: Path, code: str | None, divide: Callable[[Model], object] | None = None) -> tuple[Model, Tokenizer]:
    """Load a model and its tokenizer as `load` does, and print its warnings as notes on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(run, code, divide=divide)
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    return model
