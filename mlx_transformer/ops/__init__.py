"""Numerical functions of a transformer, each with the fastest form of the device behind one name.

The plain form is used on a GPU, on macOS, and everywhere with MLX_TRANSFORMER_PLAIN=1.
"""

from mlx_transformer.ops.activations import elu_plus_one, gelu_tanh, relu, relu_squared, sigmoid, silu, softplus
from mlx_transformer.ops.attention import attention, dense_attention, grouped_attention
from mlx_transformer.ops.dropout import dropout
from mlx_transformer.ops.fastmath import exp_decay, keeps_scores
from mlx_transformer.ops.gather import (
    CastWeight,
    fixed_order,
    gather_by_distance,
    gather_matmul,
    gather_rows,
    put_tokens,
    take_tokens,
)
from mlx_transformer.ops.loss import cross_entropy, mean_and_token_losses, mean_cross_entropy, n_logits
from mlx_transformer.ops.norms import layer_norm, rms_norm
from mlx_transformer.ops.scan import CHUNK as SCAN_CHUNK
from mlx_transformer.ops.scan import linear_scan, selective_scan
from mlx_transformer.ops.softmax import softmax
from mlx_transformer.ops.triangular import unit_lower_inverse

__all__ = [
    "SCAN_CHUNK",
    "CastWeight",
    "attention",
    "cross_entropy",
    "dense_attention",
    "dropout",
    "elu_plus_one",
    "exp_decay",
    "fixed_order",
    "gather_by_distance",
    "gather_matmul",
    "gather_rows",
    "gelu_tanh",
    "grouped_attention",
    "keeps_scores",
    "layer_norm",
    "linear_scan",
    "mean_and_token_losses",
    "mean_cross_entropy",
    "n_logits",
    "put_tokens",
    "relu",
    "relu_squared",
    "rms_norm",
    "selective_scan",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "take_tokens",
    "unit_lower_inverse",
]
