"""Training: `fit` and what it takes and yields, `evaluate`, and the optimizers (train.optim)."""

from mlx_transformer.train.evaluate import Evaluation, evaluate
from mlx_transformer.train.recipe import BySize, Recipe
from mlx_transformer.train.trainer import (
    Eval,
    Event,
    Limits,
    Progress,
    Resumed,
    RunOptions,
    Saved,
    Step,
    Stopped,
    fit,
)

__all__ = [
    "BySize",
    "Eval",
    "Evaluation",
    "Event",
    "Limits",
    "Progress",
    "Recipe",
    "Resumed",
    "RunOptions",
    "Saved",
    "Step",
    "Stopped",
    "evaluate",
    "fit",
]
