"""Phase 6, 2023-2025: the speed run. Llama trained to a target loss in the least time, after modded-nanogpt (2024).

Changes against phase 5, and what each is for:
- Value embeddings (modded-nanogpt; Zhou et al. 2024, arXiv 2410.17897): more parameters for next to no arithmetic.
- Squared ReLU (So et al. 2021, arXiv 2109.08668): two maps in place of SwiGLU's three, so less arithmetic.
- Feed-forward layers half as wide: the value embeddings hold part of what they would learn.
- Token shift (RWKV: Peng et al. 2023, arXiv 2305.13048; modded-nanogpt): the first block has the last tokens too.
- Sampled softmax (Jean et al. 2015, arXiv 1412.2007): training over a part of a large vocabulary.
- Zero initialization of the maps that write into the residual stream and of the head (Zhang et al. 2019, arXiv
  1901.09321; Yang et al. 2022, arXiv 2203.03466): every block starts as the identity, and the first prediction uniform.
- Muon for the matrices of the blocks (Jordan et al. 2024): the update follows all directions of a gradient equally far.
- A short schedule: a sixth of the budget, over whose last 65 % the learning rate decays linearly to 0.

The ablations remove each of these from phase 6 or add it to phase 5. Three further ideas are branches, and batch-size
warm-up is a recipe: in the model of nano the branches cost more time than they save, and the recipe makes no difference
(RESULTS.md).
"""

from dataclasses import dataclass, replace

import mlx.core as mx

import mlx_transformer as mt
from mlx_transformer import nn
from mlx_transformer.train import BySize, optim
from phases import phase5
from phases.ablations import phase6 as ablations

NAME = "speed_run"

# fmt: off
DECAY_TOKENS  = BySize(nano=221_000, small=  552_500, base=2_210_000)  # the last ones, from the peak down to 0
TOTAL_TOKENS  = BySize(nano=340_000, small=  850_000, base=3_400_000)
EVAL_TOKENS   = BySize(nano= 68_608, small=  172_032, base=  688_128)  # five evaluations, the last one at the end
# fmt: on
LEARNING_RATE = 0.0336  # the peak, for every width: Muon's update is as large in each
EMBEDDINGS, HEAD_RATE = BySize(nano=6.58, small=15.0, base=15.0), 0.4  # multiples of it; base: as small


class Config(nn.TokenShiftConfig, nn.SampledSoftmaxConfig, phase5.Config):
    """Configuration of phase 5, of the token shift and of the sampled softmax."""


class ValueAttention(nn.ValueEmbedding, phase5.Attention):
    """Llama's attention with value embeddings."""


class FFN(nn.HalfWidth, nn.ReLUSquaredFeedForward):
    """Squared ReLU, half of d_ff wide inside: a third of the weights of phase 5's."""


class Model(nn.SampledSoftmax, nn.TokenShift, phase5.Model):
    """Llama, built for speed."""

    Config = Config
    Mixer: nn.Slot = ValueAttention
    FFN: nn.Slot = FFN

    def init_weight(self, path: str, value: mx.array, key: mx.array) -> mx.array:
        if path.endswith(("o_proj.weight", "down_proj.weight", "head.weight")):
            return nn.init.zeros(value, key)
        return super().init_weight(path, value, key)


_EMBEDDINGS = optim.Paths(r"(.*\.)?((value|gram)_)?embedding\.weight|patch_proj\.weight")
_MATRICES = optim.Paths(r"(?!patch_).*_proj\.weight")
_FILTERS = optim.Paths(r".*\.mixer\.([a-z]+_)*(conv\.weight|a_log|a_imag|c_real|c_imag)")


@dataclass(frozen=True)
class Vectors(optim.Vectors):
    """Vectors, and the tables of a recurrent mixer, which map no vector to another: filters, decays."""

    def __call__(self, path: str, parameter: mx.array) -> bool:
        return super().__call__(path, parameter) or _FILTERS(path, parameter)


# As in modded-nanogpt of November 2024.
_ADAM = optim.AdamW(betas=(0.8, 0.95), eps=1e-10)

RECIPE = replace(
    phase5.RECIPE,
    learning_rate=LEARNING_RATE,
    schedule=optim.WSD(warmup_tokens=0, decay_tokens=DECAY_TOKENS, total_tokens=TOTAL_TOKENS),
    eval_tokens=EVAL_TOKENS,
    groups=(
        optim.Group(name="matrices", select=_MATRICES, optimizer=optim.Muon()),
        optim.Group(name="embeddings", select=_EMBEDDINGS, optimizer=_ADAM, lr_multiplier=EMBEDDINGS),
        optim.Group(name="head", select=optim.Paths(r"head\.weight"), optimizer=_ADAM, lr_multiplier=HEAD_RATE),
        optim.Group(name="vectors", select=Vectors(), optimizer=_ADAM),
    ),
)
RECIPES = ablations.recipes(RECIPE, phase5.RECIPE)
BRANCHES = ablations.branches(Model, phase5.Model)

mt.main(__name__)
