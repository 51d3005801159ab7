"""Optimizers, schedules and clipping: what mlx.optimizers lacks or does differently."""

from mlx_transformer.train.optim.average import EMA, Average, CheckpointAverage
from mlx_transformer.train.optim.clip import AGC, ByValue, Clip, GlobalNorm, ZClip
from mlx_transformer.train.optim.groups import (
    AdamW,
    Group,
    Matrices,
    Optimizers,
    Paths,
    Selector,
    UpdateRule,
    Vectors,
)
from mlx_transformer.train.optim.lion import Lion
from mlx_transformer.train.optim.muon import Muon
from mlx_transformer.train.optim.rigl import RigL
from mlx_transformer.train.optim.scaling import LossScale
from mlx_transformer.train.optim.schedules import (
    WSD,
    BatchWarmup,
    Constant,
    Cosine,
    CosineRestarts,
    InverseSqrt,
    Linear,
    Schedule,
)
from mlx_transformer.train.optim.sophia import Sophia
from mlx_transformer.train.optim.stopping import GeneralizationLoss, NoStop, Plateau, StopRule, SuccessiveRises

__all__ = [  # noqa: RUF022 - grouped
    # optimizers
    "AdamW",
    "Lion",
    "Muon",
    "RigL",
    "Sophia",
    "UpdateRule",
    # groups of parameters
    "Group",
    "Matrices",
    "Optimizers",
    "Paths",
    "Selector",
    "Vectors",
    # learning-rate schedules, batch warm-up
    "BatchWarmup",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "InverseSqrt",
    "Linear",
    "Schedule",
    "WSD",
    # gradient clipping
    "AGC",
    "ByValue",
    "Clip",
    "GlobalNorm",
    "ZClip",
    # the end of a run
    "GeneralizationLoss",
    "NoStop",
    "Plateau",
    "StopRule",
    "SuccessiveRises",
    # averages of the weights, and the scale of the loss in float16
    "Average",
    "CheckpointAverage",
    "EMA",
    "LossScale",
]
