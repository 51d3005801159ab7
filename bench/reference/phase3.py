"""Phase 3 in PyTorch: GPT-2 (Radford et al. 2019) with an untied head, and branches in fused forms.

Written from the papers with what PyTorch has for it: fused attention with grouped heads, `nn.RMSNorm`, joined matrices
for queries, keys and values, and for a gate and what it gates. Trained as phase 2 is.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.reference import phase1
from bench.reference.phase1 import KeysValues
from bench.reference.phase2 import Decoder, Training, rules

__all__ = ["BRANCHES", "Decoder", "Model", "Training", "rules"]

# This model's module, inside a block or outside -> MLX's: several where this one concatenates their rows.
OURS = {
    "embedding": ["embedding"],
    "positions": ["position"],
    "final_norm": ["final_norm"],
    "head": ["head"],
    "attention.qkv": ["mixer.q_proj", "mixer.k_proj", "mixer.v_proj"],
    "attention.out": ["mixer.o_proj"],
    "attention_norm": ["norms.0"],
    "ffn.up": ["ffn.up_proj"],
    "ffn.gate_up": ["ffn.gate_proj", "ffn.up_proj"],
    "ffn.down": ["ffn.down_proj"],
    "ffn_norm": ["norms.1"],
}


def rotations(head_dim: int, theta: float) -> Tensor:
    """Return the rotation of each pair of a head per position (Su et al. 2021, eq. 15): (d / 2,)."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021, eq. 34), pairs half a head apart: x (B, H, L, d) from position start on."""

    def __init__(self, length: int, frequency: Tensor) -> None:
        super().__init__()
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor, start: int) -> Tensor:
        here = slice(start, start + x.shape[2])
        cos, sin = self.cos[here], self.sin[here]  # type: ignore[index]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, cache: KeysValues | None, start: int) -> Tensor:
    """Compute causal attention of q (B, H, L, d_k), from position start on, to all keys so far."""
    length = q.shape[2]
    if cache is not None:
        for buffer, new in zip(cache, (k, v), strict=True):
            buffer[:, :, start : start + length] = new
        k, v = (buffer[:, :, : start + length] for buffer in cache)
    return F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, enable_gqa=k.shape[1] < q.shape[1])


class Attention(nn.Module):
    """Causal attention; several query heads may share a head of keys and values (Ainslie et al. 2023)."""

    def __init__(self, head_dim: int, sizes: list[int], rotary: Rotary | None) -> None:
        """Initialize. sizes: the widths of all queries, keys and values."""
        super().__init__()
        self.head_dim, self.sizes, self.rotary = head_dim, sizes, rotary
        self.qkv = nn.Linear(sizes[0], sum(sizes))
        self.out = nn.Linear(sizes[0], sizes[0])

    def forward(self, x: Tensor, cache: KeysValues | None = None, start: int = 0) -> Tensor:
        """Attend. With a cache, x has the positions from start on: first the whole prompt, then one token at a time."""
        b, length, d = x.shape
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.view(b, length, -1, self.head_dim).transpose(1, 2) for part in parts)
        if self.rotary is not None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        o = attend(q, k, v, cache, start)
        return self.out(o.transpose(1, 2).reshape(b, length, d))


class GELU(nn.Module):
    """The feed-forward part of GPT-2."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """A gated linear unit (Shazeer 2020) of two thirds of the width."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        width = round(d_ff * 2 / 3)
        self.gate_up = nn.Linear(d_model, 2 * width)
        self.down = nn.Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + Dropout(part(norm(x))) for attention, then for the feed-forward part."""

    def __init__(self, attention: nn.Module, ffn: nn.Module, norm: Callable[[], nn.Module], dropout: float) -> None:
        super().__init__()
        self.attention, self.attention_norm = attention, norm()
        self.ffn, self.ffn_norm = ffn, norm()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KeysValues | None = None, start: int = 0) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache, start))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class GroupedModel(phase1.Model):
    """Base of models with joined projections and grouped heads: caches and parameter names."""

    ours: dict[str, list[str]]  # this model's module -> MLX's paths
    head_dim: int
    n_kv_heads: int
    sizes: list[int]  # rows of queries, keys and values in their joint matrix

    def make_cache(self, batch: int, capacity: int) -> list[KeysValues]:
        """Return empty buffers for the keys and values of so many tokens."""
        shape = (batch, self.n_kv_heads, capacity, self.head_dim)
        return [(self.head.weight.new_empty(shape), self.head.weight.new_empty(shape)) for _ in self.blocks]

    def by_our_path(self, of: Callable[[nn.Parameter], Tensor] = lambda p: p.data) -> dict[str, Tensor]:
        """Return a view of each parameter, or of what `of` makes of it (its gradient), by MLX's parameter path."""
        table = {}
        for name, parameter in self.named_parameters():
            block, module, kind = re.fullmatch(r"(blocks\.\d+\.)?(.+)\.(weight|bias)", name).groups()  # type: ignore
            paths = self.ours[module]
            sizes = self.sizes if len(paths) == 3 else len(parameter) // len(paths)
            for path, part in zip(paths, of(parameter).split(sizes), strict=True):
                table[f"{block or ''}{path}.{kind}"] = part
        return table


class Model(GroupedModel):
    """Tokens (B, L) int64 -> logits (B, L, V), for L up to max_len (with rotary positions: seq_len)."""

    ours = OURS
    Norm: Callable[..., nn.Module] = nn.LayerNorm
    FFN: Callable[..., nn.Module] = GELU

    def __init__(
        self, *, max_len: int, rope_theta: float | None = None, n_kv_heads: int | None = None, **numbers: Any
    ) -> None:
        super().__init__(**numbers)
        d_model, eps = numbers["d_model"], numbers["norm_eps"]
        self.head_dim = d_model // self.n_heads
        self.n_kv_heads = n_kv_heads or self.n_heads
        self.sizes = [d_model, self.n_kv_heads * self.head_dim, self.n_kv_heads * self.head_dim]
        rotary = None if rope_theta is None else Rotary(numbers["seq_len"], rotations(self.head_dim, rope_theta))
        self.positions = None if rotary else nn.Embedding(max_len, d_model)  # instead of phase 1's sinusoids
        self.blocks = nn.ModuleList(
            Block(
                Attention(self.head_dim, self.sizes, rotary),
                type(self).FFN(d_model, numbers["d_ff"]),
                lambda: type(self).Norm(d_model, eps),
                numbers["dropout"],
            )
            for _ in range(numbers["n_layers"])
        )
        self.final_norm = type(self).Norm(d_model, eps)

    def hidden(self, tokens: Tensor, cache: list[KeysValues] | None = None, start: int = 0) -> Tensor:
        """Return the last hidden states (B, L, D)."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[start : start + tokens.shape[1]]
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start)
        return self.final_norm(x)


class SwiGLUModel(Model):
    FFN = SwiGLU


class RMSNormModel(Model):
    Norm = nn.RMSNorm


class TiedModel(Model):
    """GPT-2 itself, with the head tied to the embedding."""

    def __init__(self, **numbers: Any) -> None:
        super().__init__(**numbers)
        self.head.weight = self.embedding.weight


BRANCHES = {
    "rope": Model,  # by rope_theta
    "gqa": Model,  # by n_kv_heads
    "swiglu": SwiGLUModel,
    "rms_norm": RMSNormModel,
    "tied": TiedModel,
}
