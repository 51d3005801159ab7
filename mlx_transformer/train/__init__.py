"""Training: `fit` and what it takes and yields, `evaluate`, and the optimizers (train.optim)."""

from mlx_transformer.train.evaluate import Evaluation, evaluate
from mlx_transformer.train.events import (
    Eval,
    Event,
    Limits,
    Prepared,
    Progress,
    Resumed,
    RunOptions,
    Saved,
    Step,
    Stopped,
)
from mlx_transformer.train.recipe import BySize, ByWidth, Recipe, check_groups
from mlx_transformer.train.trainer import fit

__all__ = [
    "BySize",
    "ByWidth",
    "Eval",
    "Evaluation",
    "Event",
    "Limits",
    "Prepared",
    "Progress",
    "Recipe",
    "Resumed",
    "RunOptions",
    "Saved",
    "Step",
    "Stopped",
    "check_groups",
    "evaluate",
    "fit",
]
