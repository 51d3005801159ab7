"""What the comparison's tests share: the budget, a tiny model, and the schema of compare.json."""

import importlib.util
import json
from pathlib import Path

import pytest

from bench.compare import command

BUDGET = 100_000
TINY = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "seq_len": 24, "vocab_size": 384, "batch_size": 3}
STEPS_OF_100 = {"recipe": {"batch_tokens": 115}, "config": {"seq_len": 20}}  # of a result: steps of 100 tokens
SCHEMA = json.loads((Path(command.__file__).parent / "compare.schema.json").read_text())
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed: make test installs it"
)
