"""Phase 5 in PyTorch: Llama (Touvron et al. 2023), and Qwen3's normed queries and keys as a branch.

Written from the papers with what PyTorch has for it: `nn.RMSNorm`, fused attention with grouped heads, joined matrices
for queries, keys and values and for a gate and what it gates, no biases. Trained as phase 2 is, by another schedule.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.reference.phase1 import KeysValues
from bench.reference.phase2 import Decoder, Training, rules
from bench.reference.phase3 import Block, GroupedModel, Rotary, attend, rotations

__all__ = ["BRANCHES", "Decoder", "Model", "Training", "rules"]

# This model's module, inside a block or outside -> MLX's: several where this one concatenates their rows.
OURS = {
    "embedding": ["embedding"],
    "final_norm": ["final_norm"],
    "head": ["head"],
    "attention.qkv": ["mixer.q_proj", "mixer.k_proj", "mixer.v_proj"],
    "attention.q_norm": ["mixer.q_norm"],
    "attention.k_norm": ["mixer.k_norm"],
    "attention.out": ["mixer.o_proj"],
    "attention_norm": ["norms.0"],
    "ffn.gate_up": ["ffn.gate_proj", "ffn.up_proj"],
    "ffn.down": ["ffn.down_proj"],
    "ffn_norm": ["norms.1"],
}


def scale_frequencies(frequency: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    """Scale frequencies (d / 2,) as Llama 3.1 does: low ones by the factor, high ones not, with a band between."""
    wavelength = 2 * math.pi / frequency
    share = (original / wavelength - low) / (high - low)  # of the unscaled frequency, in the band between
    between = (1 - share) * frequency / factor + share * frequency
    frequency = torch.where(wavelength > original / low, frequency / factor, frequency)
    return torch.where((wavelength >= original / high) & (wavelength <= original / low), between, frequency)


class Attention(nn.Module):
    """Causal attention with grouped heads of keys and values (Ainslie et al. 2023)."""

    def __init__(self, d_model: int, head_dim: int, heads: list[int], rotary: Rotary, norm: Callable[[], nn.Module]):
        """Initialize. heads: numbers of query, key and value heads."""
        super().__init__()
        self.head_dim, self.rotary = head_dim, rotary
        self.sizes = [head_dim * n for n in heads]
        self.qkv = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.out = nn.Linear(self.sizes[0], d_model, bias=False)
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor, cache: KeysValues | None = None, start: int = 0) -> Tensor:
        """Attend. With a cache, x has the positions from start on: first the whole prompt, then one token at a time."""
        b, length, _ = x.shape
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.view(b, length, -1, self.head_dim).transpose(1, 2) for part in parts)
        q, k = self.rotary(self.q_norm(q), start), self.rotary(self.k_norm(k), start)
        o = attend(q, k, v, cache, start)
        return self.out(o.transpose(1, 2).reshape(b, length, -1))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Model(GroupedModel):
    """Tokens (B, L) int64 -> logits (B, L, V), for L up to seq_len."""

    ours = OURS

    @staticmethod
    def head_norm(head_dim: int, eps: float) -> nn.Module:
        """Return the module between the projection of a head and its rotation."""
        return nn.Identity()

    def __init__(
        self,
        *,
        head_dim: int,
        n_kv_heads: int,
        max_len: int,  # unused: there are no learned positions
        rope_theta: float,
        rope_factor: float,
        rope_low_freq_factor: float,
        rope_high_freq_factor: float,
        rope_original_len: int,
        **numbers: Any,
    ) -> None:
        super().__init__(**numbers)
        d_model, eps = numbers["d_model"], numbers["norm_eps"]
        self.head_dim, self.n_kv_heads = head_dim, n_kv_heads
        scaling = (rope_factor, rope_low_freq_factor, rope_high_freq_factor, rope_original_len)
        rotary = Rotary(numbers["seq_len"], scale_frequencies(rotations(head_dim, rope_theta), *scaling))
        heads = [self.n_heads, n_kv_heads, n_kv_heads]
        self.sizes = [head_dim * n for n in heads]
        self.blocks = nn.ModuleList(
            Block(
                Attention(d_model, head_dim, heads, rotary, lambda: type(self).head_norm(head_dim, eps)),
                SwiGLU(d_model, numbers["d_ff"]),
                lambda: nn.RMSNorm(d_model, eps),
                numbers["dropout"],
            )
            for _ in range(numbers["n_layers"])
        )
        self.final_norm = nn.RMSNorm(d_model, eps)

    def hidden(self, tokens: Tensor, cache: list[KeysValues] | None = None, start: int = 0) -> Tensor:
        """Return the last hidden states (B, L, D)."""
        x = self.dropout(self.embedding(tokens))
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start)
        return self.final_norm(x)


class Qwen3Model(Model):
    """Llama with QK norm, head by head (Yang et al. 2025)."""

    @staticmethod
    def head_norm(head_dim: int, eps: float) -> nn.Module:
        return nn.RMSNorm(head_dim, eps)


class TiedModel(Model):
    """Llama with the head tied to the embedding."""

    def __init__(self, **numbers: Any) -> None:
        super().__init__(**numbers)
        self.head.weight = self.embedding.weight


BRANCHES = {"tied": TiedModel, "qwen3": Qwen3Model}
