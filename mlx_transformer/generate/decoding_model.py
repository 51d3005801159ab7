"""A copy of a model for decoding: the same outputs from fewer operations.

A step of one token takes as long as the host needs to dispatch its operations. So weights are transposed once,
queries, keys and values come from one product, and attention is one operation where the device has it.
"""

import copy
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.latent import LatentAttention


def decoding_model(module: Any) -> Any:
    """Copy a module with its present weights; the module itself does not change."""
    if isinstance(module, list):
        return [decoding_model(part) for part in module]
    if isinstance(module, nn.Linear):
        return TransposedLinear(module)
    if not isinstance(module, nn.Module):
        return module
    result = copy.copy(module)
    for name, part in module.items():
        result[name] = decoding_model(part)
    if isinstance(module, Attention) and not isinstance(module, LatentAttention):  # which has other projections
        kind = type(module)
        result.__class__ = (
            FusedQKVAttention if kind is Attention else type(kind.__name__, (kind, FusedQKVAttention), {})
        )
        result.qkv_proj = TransposedLinear(module.q_proj, module.k_proj, module.v_proj)
    return result


class TransposedLinear(nn.Module):
    """Linear maps of the same input as one product: x (..., d_in) -> (..., sum of their d_out)."""

    def __init__(self, *maps: nn.Linear) -> None:
        super().__init__()
        self.matrix = mx.concatenate([one.weight for one in maps]).T if len(maps) > 1 else maps[0].weight.T
        self.bias = mx.concatenate([one.bias for one in maps]) if "bias" in maps[0] else None

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.matrix if self.bias is None else mx.addmm(self.bias, x, self.matrix)


class FusedQKVAttention(Attention):
    """Self-attention with one product for queries, keys and values; heads of a single token need no transposition."""

    def project(self, x: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array, mx.array]:
        if ctx.memory is not None:
            return super().project(x, ctx)
        heads = self.split(self.qkv_proj(x))
        n_kv_heads = (heads.shape[1] - self.n_heads) // 2
        q, k, v = mx.split(heads, [self.n_heads, self.n_heads + n_kv_heads], axis=1)
        return q, k, v

    def split(self, x: mx.array) -> mx.array:
        return x.reshape(x.shape[0], -1, 1, self.head_dim) if x.shape[1] == 1 else super().split(x)

    def mix(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
        return ops.grouped_attention(q, k, v, self.scale, mask)

    def merge(self, o: mx.array) -> mx.array:
        return self.o_proj(o.reshape(o.shape[0], 1, -1)) if o.shape[2] == 1 else super().merge(o)
