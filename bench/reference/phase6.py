"""Phase 6 in PyTorch: phase 5's Llama with what modded-nanogpt (Jordan et al. 2024) added, and Muon.

Squared ReLU in layers half as wide, value embeddings, a token shift, and a softmax over a sample in training (Jean et
al. 2015); as branches normed queries and keys, blocks whose input is mixed with the embeddings, and softly bounded
logits. Muon is written from its authors' description, in float32, matrices of one shape in one batched product;
everything that is no matrix of a block goes to fused AdamW.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.reference import phase1, phase2, phase5
from bench.reference.phase1 import KeysValues, Owns
from bench.reference.phase2 import Decoder
from bench.reference.phase3 import attend

__all__ = ["BRANCHES", "Decoder", "Model", "Training", "rules"]

OURS = {**phase5.OURS, "ffn.up": ["ffn.up_proj"], "attention.values": ["mixer.value_embedding"]}
OWNS: Owns = {
    r"Paths (?!patch_).*_proj\.weight": lambda name, _: name.endswith(
        ("qkv.weight", "out.weight", "up.weight", "down.weight")
    ),
    r"Paths (.*\.)?((value|gram)_)?embedding\.weight|patch_proj\.weight": lambda name, _: name.endswith(
        ("embedding.weight", "values.weight")
    ),
    r"Paths head\.weight": lambda name, _: name == "head.weight",
    "Vectors": phase1.OWNS["Vectors"],
}


class Attention(phase5.Attention):
    """Phase 5's attention with value embeddings."""

    def __init__(self, values: nn.Embedding, *parts: Any) -> None:
        super().__init__(*parts)
        self.values = values

    def forward(  # type: ignore[override]
        self, x: Tensor, tokens: Tensor, cache: KeysValues | None = None, start: int = 0
    ) -> Tensor:
        """Attend. With a cache, x has the positions from start on: first the whole prompt, then one token at a time."""
        b, length, _ = x.shape
        q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.view(b, length, -1, self.head_dim).transpose(1, 2) for part in (q, k, v + self.values(tokens)))
        q, k = self.rotary(self.q_norm(q), start), self.rotary(self.k_norm(k), start)
        o = attend(q, k, v, cache, start)
        return self.out(o.transpose(1, 2).reshape(b, length, -1))


class ReLUSquared(nn.Module):
    """down(max(0, up x)^2) (So et al. 2021)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(phase5.Block):
    """Phase 5's block, which passes the tokens to its attention."""

    def forward(  # type: ignore[override]
        self, x: Tensor, x0: Tensor, tokens: Tensor, cache: KeysValues | None = None, start: int = 0
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), tokens, cache, start))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class MixedBlock(Block):
    """A block on a learned mixture of the residual stream and the embeddings."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.residual_lambda = nn.Parameter(torch.ones(1))
        self.x0_lambda = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, x0: Tensor, *more: Any) -> Tensor:  # type: ignore[override]
        return super().forward(self.residual_lambda * x + self.x0_lambda * x0, x0, *more)


class Shift(nn.Module):
    """A factor for each channel of an earlier token's embedding."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.shift_lambda = nn.Parameter(torch.zeros(d_model))


class Model(phase5.Model):
    """Tokens (B, L) int64 -> logits (B, L, V), for L up to seq_len."""

    block: type[Block] = Block

    def __init__(self, *, n_shifts: int = 0, sample_ratio: float = 0.0, **numbers: Any) -> None:
        super().__init__(**numbers)
        self.sample_ratio = sample_ratio
        self.shifts = nn.ModuleList(Shift(numbers["d_model"]) for _ in range(n_shifts))
        d_model, eps = numbers["d_model"], numbers["norm_eps"]
        rotary = self.blocks[0].attention.rotary  # type: ignore[union-attr]
        heads = [self.n_heads, self.n_kv_heads, self.n_kv_heads]

        def make_block() -> Block:
            values = nn.Embedding(numbers["vocab_size"], self.sizes[2])
            attention = Attention(
                values, d_model, self.head_dim, heads, rotary, lambda: type(self).head_norm(self.head_dim, eps)
            )
            ffn = ReLUSquared(d_model, max(1, numbers["d_ff"] // 2))
            return self.block(attention, ffn, lambda: nn.RMSNorm(d_model, eps), numbers["dropout"])

        self.blocks = nn.ModuleList(make_block() for _ in range(numbers["n_layers"]))

    def hidden(self, tokens: Tensor, cache: list[KeysValues] | None = None, start: int = 0) -> Tensor:
        """Return the last hidden states (B, L, D)."""
        x = x0 = self.dropout(self.embed(tokens, cache, start))
        for i, block in enumerate(self.blocks):
            x = block(x, x0, tokens, None if cache is None else cache[i], start)
        return self.final_norm(x)

    def embed(self, tokens: Tensor, cache: list[KeysValues] | None, start: int) -> Tensor:
        """Return the embeddings of tokens (B, L), each with those of the tokens before it added."""
        n, length = len(self.shifts), tokens.shape[1]
        known = min(start, n)  # of the tokens before, those of the cache
        if cache is not None:
            seen = cache[-1][0]
            seen[:, start : start + length] = tokens
            tokens = seen[:, start - known : start + length]
        rows = F.pad(self.embedding(tokens), (0, 0, n - known, 0))
        x = rows[:, n:]
        for i, shift in enumerate(self.shifts, 1):
            x = x + shift.shift_lambda * rows[:, n - i : n - i + length]  # type: ignore[operator]
        return x

    def make_cache(self, batch: int, capacity: int) -> list[KeysValues]:
        seen = self.head.weight.new_zeros((batch, capacity), dtype=torch.long)
        return [*super().make_cache(batch, capacity), (seen, seen)]

    def by_our_path(self, of: Callable[[nn.Parameter], Tensor] = lambda p: p.data) -> dict[str, Tensor]:
        """Return a view of each parameter, or of what `of` makes of it (its gradient), by MLX's parameter path."""
        table = {name: of(p) for name, p in self.named_parameters() if name.endswith("_lambda")}
        for name, parameter in self.named_parameters():
            if name not in table:
                block, module = re.fullmatch(r"(blocks\.\d+\.)?(.+)\.weight", name).groups()  # type: ignore[union-attr]
                for path, part in zip(OURS[module], of(parameter).split(self.rows(name, parameter)), strict=True):
                    table[f"{block or ''}{path}.weight"] = part
        return table

    def rows(self, name: str, parameter: nn.Parameter) -> list[int]:
        """Return the numbers of rows of the matrices that a parameter concatenates."""
        return self.sizes if name.endswith("qkv.weight") else [len(parameter)]


class NormedModel(Model):
    """Phase 6 with QK norm, head by head."""

    head_norm = phase5.Qwen3Model.head_norm


class MixedModel(Model):
    """Phase 6 with mixed block inputs, by learned factors."""

    block = MixedBlock


class CappedModel(Model):
    """Phase 6 with soft-capped logits (Gemma 2, 2024)."""

    def __init__(self, *, softcap: float, **numbers: Any) -> None:
        super().__init__(**numbers)
        self.softcap = softcap

    def forward(self, tokens: Tensor) -> Tensor:
        return self.softcap * torch.tanh(super().forward(tokens) / self.softcap)


BRANCHES = {"with_qk_norm": NormedModel, "with_lambdas": MixedModel, "with_softcap": CappedModel}


def rules(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of Training for a recipe as result.json records it. Raises ValueError for a missing rule."""
    return phase2.rules(recipe, OWNS, ("AdamW", "Muon"))


class MuonAndAdamW(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for groups with `momentum`, AdamW for the others.

    A parameter of Muon concatenates matrices (`rows`: the numbers of their rows), which are orthogonalized separately.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if "momentum" in group:
                self._muon(group)
        super().step()  # for parameters that still have a gradient

    def _muon(self, group: dict[str, Any]) -> None:
        maps: list[Tensor] = []
        directions: list[Tensor] = []
        for parameter, rows in zip(group["params"], group["rows"], strict=True):
            state, gradient = self.state[parameter], parameter.grad
            if not state:
                state["step"], state["velocity"] = torch.zeros(()), torch.zeros_like(parameter)
            state["step"] += 1
            risen = min(1, state["step"].item() / group["warmup_steps"])
            momentum = group["first_momentum"] + risen * (group["momentum"] - group["first_momentum"])
            state["velocity"].lerp_(gradient, 1 - momentum)
            maps += parameter.split(rows)
            directions += gradient.lerp(state["velocity"], momentum).split(rows)
            parameter.grad = None
        for w, u in zip(maps, orthogonalised(directions, group["iterations"]), strict=True):
            w.mul_(1 - group["lr"] * group["weight_decay"])
            w.add_(u, alpha=-group["lr"] * max(1, w.shape[0] / w.shape[1]) ** 0.5)


def orthogonalised(matrices: list[Tensor], iterations: int) -> list[Tensor]:
    """Orthogonalize matrices by Newton-Schulz iterations of the fifth order with Jordan's coefficients."""
    alike = defaultdict(list)
    for i, x in enumerate(matrices):
        alike[tuple(sorted(x.shape))].append(i)
    found = list(matrices)
    for places in alike.values():
        wide = [matrices[i].T if matrices[i].shape[0] > matrices[i].shape[1] else matrices[i] for i in places]
        x = torch.stack(wide)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(iterations):
            a = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        for i, u in zip(places, x, strict=True):
            found[i] = u.T if matrices[i].shape[0] > matrices[i].shape[1] else u
    return found


class Training(phase2.Training):
    """Phase 2's training with Muon and a softmax over a sample of the vocabulary."""

    model: Model
    least = 512  # tokens in a sample

    def __init__(self, model: Model, **numbers: Any) -> None:
        super().__init__(model, **numbers)
        self.prepare(np.arange(len(model.head.weight)))

    def prepare(self, tokens: np.ndarray) -> None:
        """Count the tokens of the training sequences, for the samples."""
        counts = np.bincount(tokens.reshape(-1), minlength=len(self.model.head.weight)) + 1.0
        self.shares = counts / counts.sum()
        self.frequency = torch.from_numpy(self.shares).float().to(self.device)

    def make_optimizer(self, groups: list[dict[str, Any]]) -> MuonAndAdamW:
        rows = {parameter: self.model.rows(name, parameter) for name, parameter in self.model.named_parameters()}
        return MuonAndAdamW([{"rows": [rows[p] for p in group["params"]], **group} for group in groups], fused=True)

    def sample_size(self, n_targets: int) -> int:
        """Return the number of tokens in the sample for so many targets; V: the softmax is the full one."""
        distinct = (1 - (1 - self.shares) ** n_targets).sum()
        n = max(self.least, math.ceil(self.model.sample_ratio * distinct))
        return n if self.model.sample_ratio > 0 and 2 * n < len(self.shares) else len(self.shares)

    def draw(self, targets: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Draw n tokens, the targets (N,) first and others by frequency: ids, log-probability of being drawn (n,)."""
        noise = -torch.log(-torch.log(torch.rand_like(self.frequency).clamp(1e-7, 1 - 1e-7)))
        value = (self.frequency.log() + noise).index_fill(0, targets, math.inf)
        largest, order = value.topk(n + 1)
        sample = order[:n]
        inclusion = -torch.expm1(-self.frequency[sample] * (len(targets) + torch.exp(-largest[n])))
        return sample, inclusion.log()

    def _smoothed(self, tokens: Tensor, targets: Tensor) -> Tensor:
        targets = targets.flatten()
        n, weight = self.sample_size(len(targets)), self.model.head.weight
        if n == len(weight) or self.label_smoothing or isinstance(self.model, CappedModel):
            return super()._smoothed(tokens, targets)
        return self.sampled(self.model.hidden(tokens).flatten(0, 1), targets, *self.draw(targets, n))

    def sampled(self, h: Tensor, targets: Tensor, sample: Tensor, log_q: Tensor) -> Tensor:
        """Return the mean loss over the sample; a target that is not in it is not counted."""
        weight = self.model.head.weight
        place = targets.new_full((len(weight),), -100)  # cross_entropy leaves these out
        place[sample] = torch.arange(len(sample), device=place.device)
        return F.cross_entropy(h @ weight[sample].T - log_q, place[targets])
