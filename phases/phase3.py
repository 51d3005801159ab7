"""Phase 3, 2018-2020: the architecture of GPT-2 (Radford et al. 2019).

Changes against phase 2, and what each is for:
- Pre-LN and a final norm (Xiong et al. 2020, arXiv 2002.04745): the residual stream is never normalized on its way, so
  that the gradient reaches every block undiminished and the warm-up may be short.
- GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415): a smooth ReLU with a gradient below 0 too.
- Learned positions (Radford et al. 2018): no fixed form of the position is assumed.
- GPT-2's initialization (Radford et al. 2019, sec. 2.3): the two maps of a block that write into the residual stream
  start smaller, so that its variance does not grow with depth.

The head stays untied, so that phases 1 to 3 have as many parameters; the branch `tied` is Hugging Face's GPT-2. Each
branch changes one idea.
"""

from dataclasses import replace

import mlx.core as mx

import mlx_transformer as mt
from mlx_transformer import nn
from mlx_transformer.train import ByWidth
from mlx_transformer.utils.errors import BadInput
from phases import phase2
from phases.ablations import phase3 as ablations

NAME = "architecture"

LEARNING_RATE = ByWidth(0.006, power=-1)  # the peak
EMBEDDING, HEAD_RATE = ByWidth(27.0, power=1), 4.0  # multiples of it


class Config(phase2.Config):
    """Configuration of phase 2, and the number of learned positions."""

    max_len: int = 0  # rows of the position table, at least seq_len; 0: as many as seq_len

    def __post_init__(self) -> None:
        self.derive("max_len", self.seq_len)
        super().__post_init__()
        if self.max_len < self.seq_len:
            raise BadInput(f"max_len = {self.max_len}: expected at least seq_len = {self.seq_len}")


class Model(phase2.Model):
    """GPT-2 with an untied head."""

    Config = Config
    Position: nn.Slot = nn.LearnedPosition
    FFN: nn.Slot = nn.GELUFeedForward
    Block: nn.Slot = nn.PreNormBlock

    def make_final_norm(self) -> nn.Module:
        return self.make_norm()

    def init_weight(self, path: str, value: mx.array, key: mx.array) -> mx.array:
        return nn.init.rule_for(path, nn.init.gpt2_rules(self.config.d_model, self.config.n_layers))(value, key)


RECIPE = phase2.RECIPE.with_rates(LEARNING_RATE, embedding=EMBEDDING, head=HEAD_RATE)
RECIPES = {"no_warmup": replace(RECIPE, schedule=replace(RECIPE.schedule, warmup_tokens=0))}  # 2002.04745, sec. 3.2
BRANCHES = ablations.branches(Model, phase2.Model)

mt.main(__name__)
