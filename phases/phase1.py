"""Phase 1, 2017: "Attention Is All You Need" (Vaswani et al., arXiv 1706.03762), as a decoder-only language model.

What the paper combines, and what each part is for:
- Multi-head scaled dot-product attention (sec. 3.2): a token reads every earlier one in one step, without recurrence.
- Sinusoidal positions (sec. 3.5): attention by itself does not see the order of tokens.
- A ReLU feed-forward part for each position (sec. 3.3), and LayerNorm after each residual sum (post-LN, sec. 3.1).
- Dropout against overfitting (sec. 5.4).
- Adam with a linear warm-up and an inverse square-root decay of the learning rate (sec. 5.3).

Differs from the paper: the decoder alone, as a language model has no source text; an untied head; weight decay of
matrices (AdamW, Loshchilov & Hutter 2017, arXiv 1711.05101); gradient clipping; a learning rate of its own for the
head, tuned as every phase's is. The branch `translator` is the paper's own encoder-decoder (docs/translator.md).
"""

from dataclasses import replace

import mlx_transformer as mt
from mlx_transformer import nn
from mlx_transformer.train import BySize, ByWidth, Recipe, optim
from phases.ablations import phase1 as ablations

NAME = "attention_is_all_you_need"

# Learning rates of all phases: results/published/tune/, at nano; wider models have those of muP (ByWidth).
# Warm-up: 50 steps at nano, 120 at the others: after only 50, the four layers of small fail to train with a learning
# rate above 0.004 (phase1_small_short_warmup.json).
# fmt: off
BATCH_TOKENS  = BySize(nano=  2_048, small=    8_192, base=   32_768)  # the paper's 25,000 (sec. 5.1), scaled
WARMUP_TOKENS = BySize(nano=100_000, small=1_000_000, base=4_000_000)
EVAL_TOKENS   = BySize(nano=100_000, small=  250_000, base=1_000_000)  # between two evaluations
# fmt: on
LEARNING_RATE = ByWidth(0.0113, power=-1)  # the peak; that of the embeddings is the same for every width
EMBEDDING, HEAD_RATE = ByWidth(1.0, power=1), 9.0  # multiples of it

Config = nn.Config


class Model(nn.Model):
    """The Transformer decoder of 2017."""

    Config = Config
    Norm: nn.Slot = nn.LayerNorm
    Position: nn.Slot = nn.SinusoidalPosition
    Head: nn.Slot = nn.Head
    Mixer: nn.Slot = nn.Attention
    FFN: nn.Slot = nn.FeedForward
    Block: nn.Slot = nn.PostNormBlock


# What a token, a patch, a position or a distance adds to the input.
TABLES = optim.Paths(r"(embedding|position)\.(step_)?weight|patch_proj\.weight|.*\.relative_(keys|values)")
HEAD = optim.Paths(r"head\.weight")
INNER = optim.Matrices(but=(TABLES, HEAD))
ADAM = optim.AdamW(betas=(0.9, 0.98), eps=1e-9)  # sec. 5.3
DECAYED = replace(ADAM, weight_decay=0.01)

RECIPE = Recipe(
    batch_tokens=BATCH_TOKENS,
    learning_rate=LEARNING_RATE,
    schedule=optim.InverseSqrt(warmup_tokens=WARMUP_TOKENS),
    groups=(
        optim.Group(name="matrices", select=INNER, optimizer=DECAYED),
        optim.Group(name="embedding", select=TABLES, optimizer=DECAYED, lr_multiplier=EMBEDDING),
        optim.Group(name="head", select=HEAD, optimizer=DECAYED, lr_multiplier=HEAD_RATE, optional=True),
        optim.Group(name="vectors", select=optim.Vectors(), optimizer=ADAM),
    ),
    clip=optim.GlobalNorm(max_norm=1.0),
    stop=optim.Plateau(patience=5, min_improvement=0.001),
    eval_tokens=EVAL_TOKENS,
)
RECIPES: dict[str, Recipe] = ablations.recipes(RECIPE)
BRANCHES: dict[str, type[Model]] = ablations.branches(Model)

mt.main(__name__)
