"""The few functions a transformer spends its elementwise time in, each under one name on every device."""

from mlx_transformer.ops.activations import gelu, gelu_tanh, relu, sigmoid, silu
from mlx_transformer.ops.dropout import dropout
from mlx_transformer.ops.loss import cross_entropy, mean_cross_entropy
from mlx_transformer.ops.norms import layer_norm, rms_norm
from mlx_transformer.ops.softmax import softmax

__all__ = [
    "cross_entropy",
    "dropout",
    "gelu",
    "gelu_tanh",
    "layer_norm",
    "mean_cross_entropy",
    "relu",
    "rms_norm",
    "sigmoid",
    "silu",
    "softmax",
]
