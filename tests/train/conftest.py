"""Fixtures of the training tests."""

import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_transformer.train.evaluate import Evaluator


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations that give the scripted losses, and the weights that each of them saw."""

    def script(*losses):
        left, seen = iter(losses), []

        def evaluate(self):
            seen.append({path: np.array(value) for path, value in tree_flatten(self.model.parameters())})
            return next(left)

        monkeypatch.setattr(Evaluator, "__call__", evaluate)
        return seen

    return script
