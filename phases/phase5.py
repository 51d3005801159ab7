"""Phase 5, 2022-2024: modern. Llama (Touvron et al. 2023, arXiv 2302.13971), and on top of it Mistral and Qwen3.

The trunk is Llama 3: RMSNorm, SwiGLU, RoPE, grouped heads, no biases. The window is Mistral's branch, since no text of
the ladder is longer than one. Each is Hugging Face's to the letter, with a head of its own or, as `tied`, without.
"""

from dataclasses import replace

import mlx_transformer as mt
from mlx_transformer.nn import linear
from mlx_transformer.nn.attention import FusedAttention, QKNorm
from mlx_transformer.nn.feedforward import SwiGLU
from mlx_transformer.nn.head import TiedHead
from mlx_transformer.nn.model import Slot
from mlx_transformer.nn.norm import RMSNorm
from mlx_transformer.nn.position import ScaledRotaryPosition
from mlx_transformer.nn.sparse import WindowAttention
from mlx_transformer.train.optim.lion import Lion
from mlx_transformer.train.optim.schedules import WSD
from mlx_transformer.train.optim.sophia import Sophia
from mlx_transformer.train.recipe import BySize, Recipe
from phases import phase4

NAME = "modern"


class Config(phase4.Config):
    """The numbers of phase 4, those of the rotary positions, and the width of a head."""

    head_dim: int = 0  # width of a head; 0: d_model / n_heads
    rope_theta: float = 10_000.0  # the base of the wavelengths; Llama 3 has 500,000
    rope_factor: float = 1.0  # how much longer than rope_original_len texts become; Llama 3.1 has 8
    rope_low_freq_factor: float = 1.0  # a pair with fewer turns in rope_original_len is stretched
    rope_high_freq_factor: float = 4.0  # one with more is not
    rope_original_len: int = 8192  # tokens of the texts that were read before

    def __post_init__(self) -> None:
        if self.head_dim == 0:
            self.derive("head_dim", self.default_head_dim())
        super().__post_init__()


class Attention(FusedAttention):
    """Without biases (Touvron et al. 2023, as in PaLM, Chowdhery et al. 2022, arXiv 2204.02311, sec. 2)."""

    Linear = linear.Linear


class FFN(SwiGLU):
    """Without biases; d_ff is the width inside, so that its three maps have half as many weights again as two."""

    Linear = linear.Linear


class Model(phase4.Model):
    """Llama."""

    Config = Config
    Norm: Slot = RMSNorm  # Zhang & Sennrich 2019, arXiv 1910.07467
    Position: Slot = ScaledRotaryPosition  # Su et al. 2021, arXiv 2104.09864
    Mixer: Slot = Attention
    FFN: Slot = FFN  # Shazeer 2020, arXiv 2002.05202


class MistralConfig(Config):
    window: int = 0  # tokens that a token sees, its own among them; 0: as many as seq_len

    def __post_init__(self) -> None:
        self.derive("window", self.seq_len)
        super().__post_init__()


class MistralAttention(WindowAttention, Attention):
    """A sliding window (Jiang et al. 2023, arXiv 2310.06825, sec. 2)."""


class Qwen3Attention(QKNorm, Attention):
    """Normed queries and keys (Yang et al. 2025, arXiv 2505.09388, sec. 2)."""


class Mistral(Model):
    """Llama that sees a window."""

    Config = MistralConfig
    Mixer = MistralAttention


class Qwen3(Model):
    """Llama with normed queries and keys."""

    Mixer = Qwen3Attention


def tied(kind: type[Model]) -> type[Model]:
    """The same without a head of its own (Press & Wolf 2017, arXiv 1608.05859)."""
    return type("Tied", (kind,), {"Head": TiedHead})


RECIPE = replace(
    phase4.RECIPE,  # its rates are the best here too: tune/phase5_nano.json, phase5_small.json
    schedule=WSD(  # Hu et al. 2024, arXiv 2404.06395; to half the bench's budget
        warmup_tokens=phase4.RECIPE.schedule.warmup_tokens,
        decay_tokens=BySize(nano=400_000, small=1_000_000, base=4_000_000),
        total_tokens=BySize(nano=1_000_000, small=2_500_000, base=10_000_000),
    ),
)


def by(rule: Lion | Sophia, learning_rate: BySize) -> Recipe:
    """The trunk's recipe with another optimizer, whose decay is that of the matrices alone, as AdamW's is."""
    *matrices, vectors = (replace(group, optimizer=rule) for group in RECIPE.groups)
    groups = (*matrices, replace(vectors, optimizer=replace(rule, weight_decay=0.0)))
    return replace(RECIPE, groups=groups, learning_rate=learning_rate)


RECIPES: dict[str, Recipe] = {
    # arXiv 2302.06675, sec. 5; tune/phase5_lion_nano.json
    "lion": by(Lion(weight_decay=0.05), BySize(nano=1.2e-3, small=6e-4, base=3e-4)),
    # arXiv 2305.14342; tune/phase5_sophia_nano.json
    "sophia": by(Sophia(weight_decay=0.1), BySize(nano=1e-3, small=1e-3, base=5e-4)),
}
BRANCHES: dict[str, type[Model]] = {
    "tied": tied(Model),
    "mistral": Mistral,
    "mistral_tied": tied(Mistral),
    "qwen3": Qwen3,
    "qwen3_tied": tied(Qwen3),
}

mt.main(__name__)
