"""Phase 5, 2022-2024: modern. Llama 3 (Touvron et al. 2023, arXiv 2302.13971; Grattafiori et al. 2024, 2407.21783).

Changes against phase 4, and what each is for:
- RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467): no mean and no bias, and as good as LayerNorm.
- SwiGLU (Shazeer 2020, arXiv 2002.05202): a gate in the feed-forward part lowers the loss.
- RoPE (Su et al. 2021, arXiv 2104.09864): attention depends on distances, which no table has to learn; its frequencies
  can be stretched for longer texts (Llama 3.1).
- No biases (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, sec. 2): more stable, and as good without.
- Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): a run can be prolonged from any step before the decay.

Llama, Mistral and Qwen3 load from Hugging Face and export to it, with a head of their own or tied. Mistral's window is
a branch, since no sequence of the ladder is longer than one.
"""

from dataclasses import replace

import mlx_transformer as mt
from mlx_transformer import nn
from mlx_transformer.train import BySize, ByWidth, optim
from phases import phase4
from phases.ablations import phase5 as ablations

NAME = "modern"

# fmt: off
DECAY_TOKENS = BySize(nano=320_000, small=  800_000, base=3_200_000)  # the last ones, from the peak down to 0
TOTAL_TOKENS = BySize(nano=800_000, small=2_000_000, base=8_000_000)
# fmt: on
LEARNING_RATE = ByWidth(0.00424, power=-1)  # the peak
EMBEDDING, HEAD_RATE = ByWidth(15.6, power=1), 12.0  # multiples of it


class Config(phase4.Config):
    """Configuration of phase 4, of the rotary positions, and the width of a head."""

    head_dim: int = 0  # width of a head; 0: d_model / n_heads
    rope_theta: float = 10_000.0  # base of the wavelengths; Llama 3 has 500,000
    rope_factor: float = 1.0  # length of the texts relative to rope_original_len; Llama 3.1 has 8
    rope_low_freq_factor: float = 1.0  # pairs that turn less often in rope_original_len are stretched
    rope_high_freq_factor: float = 4.0  # pairs that turn more often are not
    rope_original_len: int = 8192  # tokens of a text in the training before

    def __post_init__(self) -> None:
        if self.head_dim == 0:
            self.derive("head_dim", self.default_head_dim())
        super().__post_init__()


class Attention(nn.FusedAttention):
    """Grouped-query attention without biases."""

    Linear = nn.Linear


class FFN(nn.SwiGLU):
    """SwiGLU without biases, d_ff wide inside: half as many weights again as phase 4's two maps."""

    Linear = nn.Linear


class Model(phase4.Model):
    """Llama."""

    Config = Config
    Norm: nn.Slot = nn.RMSNorm
    Position: nn.Slot = nn.ScaledRotaryPosition
    Mixer: nn.Slot = Attention
    FFN: nn.Slot = FFN


RECIPE = replace(
    phase4.RECIPE.with_rates(LEARNING_RATE, embedding=EMBEDDING, head=HEAD_RATE),
    schedule=optim.WSD(
        warmup_tokens=phase4.RECIPE.schedule.warmup_tokens, decay_tokens=DECAY_TOKENS, total_tokens=TOTAL_TOKENS
    ),
)
RECIPES = ablations.recipes(RECIPE)
BRANCHES = ablations.branches(Model)

mt.main(__name__)
