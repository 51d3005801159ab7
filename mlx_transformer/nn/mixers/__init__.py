"""Mixers that are not attention: recurrences whose memory of the past has a constant size."""

from mlx_transformer.nn.mixers.base import RecurrentMixer, check_mixers
from mlx_transformer.nn.mixers.convolution import ShortConvolution
from mlx_transformer.nn.mixers.delta import GatedDeltaNet
from mlx_transformer.nn.mixers.linear import LinearAttention, SquaredReLUAttention
from mlx_transformer.nn.mixers.mamba2 import Mamba2
from mlx_transformer.nn.mixers.mlstm import MLSTM
from mlx_transformer.nn.mixers.recurrence import chunkwise, linear_recurrence, parallel, recurrent
from mlx_transformer.nn.mixers.retention import Retention
from mlx_transformer.nn.mixers.ssm import S4D, Mamba

__all__ = [
    "MLSTM",
    "S4D",
    "GatedDeltaNet",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "RecurrentMixer",
    "Retention",
    "ShortConvolution",
    "SquaredReLUAttention",
    "check_mixers",
    "chunkwise",
    "linear_recurrence",
    "parallel",
    "recurrent",
]
