"""Phase 1 in PyTorch: the Transformer of Vaswani et al. (2017, arXiv 1706.03762) as a decoder-only language model.

Written from the paper with what PyTorch offers for it: fused attention, fused AdamW, torch.compile. Sections below are
the paper's. Differences: no encoder, untied head, learning rate by tokens, weight decay of matrices (AdamW).
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # two buffers (B, H, capacity, d_k) of one layer

# MLX's path -> this model's name, and the third of its rows where queries, keys and values share one matrix.
NAMES: dict[str, tuple[str, int | None]] = {
    "embedding.weight": ("embedding.weight", None),
    "head.weight": ("head.weight", None),
}
BLOCK_NAMES = {
    "mixer.q_proj": ("attention.qkv", 0),
    "mixer.k_proj": ("attention.qkv", 1),
    "mixer.v_proj": ("attention.qkv", 2),
    "mixer.o_proj": ("attention.out", None),
    "norms.0": ("attention_norm", None),
    "ffn.up_proj": ("up", None),
    "ffn.down_proj": ("down", None),
    "norms.1": ("ffn_norm", None),
}


class Attention(nn.Module):
    """Masked multi-head attention (sec. 3.2): x (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, cache: KeysValues | None = None, start: int = 0) -> Tensor:
        """Attend. With a cache, x has the positions from start on: first the whole prompt, then one token at a time."""
        b, length, d = x.shape
        q, k, v = (part.view(b, length, self.n_heads, -1).transpose(1, 2) for part in self.qkv(x).split(d, dim=-1))
        if cache is not None:
            for buffer, new in zip(cache, (k, v), strict=True):
                buffer[:, :, start : start + length] = new
            k, v = (buffer[:, :, : start + length] for buffer in cache)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)  # a single token attends to the whole cache
        return self.out(o.transpose(1, 2).reshape(b, length, d))


class Block(nn.Module):
    """Attention, then the feed-forward net, each x = LayerNorm(x + Dropout(part(x))) (sec. 3.1, 3.3, 5.4)."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.attention = Attention(d_model, n_heads)
        self.attention_norm = nn.LayerNorm(d_model, norm_eps)
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.ffn_norm = nn.LayerNorm(d_model, norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KeysValues | None = None, start: int = 0) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, cache, start)))
        return self.ffn_norm(x + self.dropout(self.down(F.relu(self.up(x)))))


class Model(nn.Module):
    """Tokens (B, L) int64 -> logits (B, L, V), for L up to seq_len."""

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_ff: int,
        seq_len: int,
        dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, d_ff, dropout, norm_eps) for _ in range(n_layers))
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", sinusoids(seq_len, d_model), persistent=False)

    def hidden(self, tokens: Tensor, cache: list[KeysValues] | None = None, start: int = 0) -> Tensor:
        """Return the last hidden states (B, L, D); embeddings are scaled by sqrt(d_model) (sec. 3.4)."""
        table: Tensor = self.positions  # type: ignore[assignment]
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        x = self.dropout(x + table[start : start + tokens.shape[1]])
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start)
        return x

    def make_cache(self, batch: int, capacity: int) -> list[KeysValues]:
        """Return empty buffers for the keys and values of so many tokens."""
        weight = self.head.weight
        shape = (batch, self.n_heads, capacity, weight.shape[1] // self.n_heads)
        return [(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.blocks]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss in nats per token."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def by_our_path(self, of: Callable[[nn.Parameter], Tensor] = lambda p: p.data) -> dict[str, Tensor]:
        """Return a view of each parameter, or of what `of` makes of it (its gradient), by MLX's parameter path."""
        table = dict(NAMES)
        for i in range(len(self.blocks)):
            for ours, (theirs, third) in BLOCK_NAMES.items():
                for kind in ("weight", "bias"):
                    table[f"blocks.{i}.{ours}.{kind}"] = (f"blocks.{i}.{theirs}.{kind}", third)
        own = {name: of(parameter) for name, parameter in self.named_parameters()}
        return {
            path: own[name] if third is None else own[name].chunk(3)[third] for path, (name, third) in table.items()
        }

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Load weights by MLX's paths. Raises ValueError if one is missing, unknown or of another shape."""
        places = self.by_our_path()
        if odd := places.keys() ^ weights.keys():
            raise ValueError(f"the name table and the weights differ in {sorted(odd)}")
        for path, place in places.items():
            if tuple(place.shape) != weights[path].shape:
                raise ValueError(f"'{path}' should be {tuple(place.shape)} and is {weights[path].shape}")
            place.copy_(torch.from_numpy(weights[path]))


def sinusoids(length: int, d_model: int) -> Tensor:
    """Return PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos (sec. 3.5): (length, d_model)."""
    frequency = 10000.0 ** -(torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :d_model].float()


Owns = dict[str, Callable[[str, nn.Parameter], bool]]

TABLES = ("embedding.weight", "positions.weight")  # the second from phase 3 on
HEAD = "head.weight"  # a tied head has none
_TABLES = r"Paths (embedding|position)\.(step_)?weight|patch_proj\.weight|.*\.relative_(keys|values)"
_HEAD = r"Paths head\.weight"
# A group's selector (see `selector_of`) -> whether it selects the parameter of a name.
OWNS: Owns = {
    f"Matrices but {_TABLES} {_HEAD}": lambda name, parameter: parameter.ndim >= 2 and name not in (*TABLES, HEAD),
    _TABLES: lambda name, parameter: name in TABLES,
    _HEAD: lambda name, parameter: name == HEAD,
    "Vectors": lambda name, parameter: parameter.ndim < 2,
}

# What the reference lacks, and the value in a recipe that disables it.
NEUTRAL: dict[str, Any] = {
    "dtype": "float32",
    "batch_warmup": None,
    "average": None,
    "accumulate": 1,
    "label_smoothing": 0.0,
    "checkpoint": "none",
}


def check(
    recipe: Mapping[str, Any],
    schedules: Collection[str],
    neutral: Mapping[str, Any],
    selectors: Collection[str],
    optimizers: Collection[str] = ("AdamW",),
) -> None:
    """Raise ValueError for a rule that a reference lacks."""
    groups = recipe["groups"]
    built = {
        recipe["schedule"]["kind"]: schedules,
        recipe["clip"]["kind"]: ["GlobalNorm"],
        **{selector_of(group["select"]): selectors for group in groups},
        **{group["optimizer"]["kind"]: optimizers for group in groups},
    }
    odd = [kind for kind, kinds in built.items() if kind not in kinds]
    odd += [f"{name} {recipe[name]}" for name, value in neutral.items() if recipe[name] != value]
    if odd:
        raise ValueError(f"this reference does not train by {', '.join(odd)}")


def selector_of(select: Mapping[str, Any]) -> str:
    """Return a selector as words: its kind, its pattern, and the selectors of what it leaves out."""
    but = [selector_of(one) for one in select.get("but", ())]
    return " ".join(
        [select["kind"], *([select["pattern"]] if "pattern" in select else []), *(["but", *but] if but else [])]
    )


def rules(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of Training for a recipe as result.json records it. Raises ValueError for a missing rule."""
    check(recipe, ["InverseSqrt"], NEUTRAL, OWNS)
    return {**numbers(recipe, OWNS), "warmup_tokens": recipe["schedule"]["warmup_tokens"]}


def numbers(recipe: Mapping[str, Any], owns: Owns) -> dict[str, Any]:
    """Return the arguments for optimizers and clipping."""
    groups = [
        {"owns": owns[selector_of(group["select"])], "lr_multiplier": group["lr_multiplier"], **group["optimizer"]}
        for group in recipe["groups"]
    ]
    return {"learning_rate": recipe["learning_rate"], "groups": groups, "max_norm": recipe["clip"]["max_norm"]}


class Training:
    """The training loop's body (sec. 5.3): warm-up, then 1 / sqrt; AdamW, matrices decayed; clipped gradients."""

    def __init__(
        self,
        model: Model,
        *,
        learning_rate: float,
        warmup_tokens: float,
        groups: list[dict[str, Any]],  # selection, lr_multiplier and hyperparameters of each optimizer
        max_norm: float,
        compiled: bool = False,
    ) -> None:
        self.model, self.learning_rate, self.max_norm = model, learning_rate, max_norm
        self.warmup_tokens = warmup_tokens
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        named = list(model.named_parameters())
        self.optimizer = self.make_optimizer(
            [{"params": [p for name, p in named if group["owns"](name, p)], **group} for group in groups]
        )
        self.loss = compile_for(self.device, model.loss) if compiled else model.loss
        self.tokens = 0

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer of groups with their parameters (`params`); each step sets their learning rates."""
        return torch.optim.AdamW(groups, fused=True)

    def prepare(self, tokens: np.ndarray) -> None:
        """Take from the training sequences (.., L + 1) what training needs."""

    def step(self, batch: np.ndarray) -> float:
        """Train on a batch (B, L + 1) int32; returns the loss before the step in nats per token."""
        sequences = torch.from_numpy(batch).to(self.device).long()
        self.tokens += sequences[:, 1:].numel()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self.factor() * group["lr_multiplier"]
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward(sequences)
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        return loss.item()

    def factor(self) -> float:
        """Return this step's share of the peak learning rate."""
        return min(self.tokens / self.warmup_tokens, (self.warmup_tokens / self.tokens) ** 0.5)

    def backward(self, sequences: Tensor) -> Tensor:
        """Return the loss of sequences (B, L + 1); its gradients are left at the parameters."""
        loss = self.loss(sequences[:, :-1], sequences[:, 1:])
        loss.backward()
        return loss


class Decoder:
    """Greedy decoding with a cache of keys and values, allocated once per call."""

    def __init__(self, model: Model, *, compiled: bool = False) -> None:
        self.model = model.eval()
        device = model.head.weight.device
        self.next = compile_for(device, self._next, dynamic=True) if compiled else self._next

    def _next(self, tokens: Tensor, cache: list[KeysValues], start: int) -> Tensor:
        """Return the most probable token (B, 1) after tokens (B, L), whose positions begin at start."""
        return self.model.head(self.model.hidden(tokens, cache, start)[:, -1]).argmax(-1, keepdim=True)

    @torch.inference_mode()
    def __call__(self, prompts: Tensor, count: int) -> Tensor:
        """Decode prompts (B, P) int64 to their next tokens (B, count)."""
        b, length = prompts.shape
        cache = self.model.make_cache(b, length + count)
        tokens = [self._next(prompts, cache, 0)]
        for i in range(count - 1):
            tokens.append(self.next(tokens[-1], cache, length + i))
        return torch.cat(tokens, dim=1)


def compile_for(device: torch.device, function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Compile a function with inductor, or run its traced graph as it is for shapes that change on MPS.

    Inductor's Metal kernels of dynamic shapes are a prototype (pytorch/pytorch issue 150121).
    """
    traced_only = device.type == "mps" and options.get("dynamic")
    return torch.compile(function, backend="aot_eager" if traced_only else "inductor", **options)
