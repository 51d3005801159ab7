"""Phase 3, 2018-2020: GPT-2 (Radford et al. 2019), and what else was tried on the architecture.

The trunk is GPT-2: pre-LN with a final norm, GELU, learned positions, its initialisation. The head alone stays untied,
so that phases 1 to 3 have as many parameters. A branch is one idea on top of it.
"""

from dataclasses import replace

import mlx.core as mx
from mlx import nn

import mlx_transformer as mt
from mlx_transformer.nn import init
from mlx_transformer.nn.attention import GroupedAttention
from mlx_transformer.nn.block import PostNormBlock, PreNormBlock
from mlx_transformer.nn.feedforward import GEGLU, GLU, FeedForward, GELUFeedForward, ReGLU, SiLUFeedForward, SwiGLU
from mlx_transformer.nn.head import TiedHead
from mlx_transformer.nn.model import Slot, class_for_layer
from mlx_transformer.nn.norm import RMSNorm, ScaleNorm
from mlx_transformer.nn.position import ALiBi, LearnedPosition, Position, RotaryPosition, SinusoidalPosition, T5Position
from mlx_transformer.nn.relative import ShawAttention, TransformerXLAttention
from mlx_transformer.nn.sparse import LongformerAttention
from mlx_transformer.train.recipe import BySize
from mlx_transformer.utils.errors import BadInput
from phases import phase2

NAME = "architecture"


class Config(phase2.Config):
    """The numbers of phase 2, and how many positions are learned."""

    max_len: int = 0  # rows of the position table, at least seq_len; 0: as many as seq_len

    def __post_init__(self) -> None:
        self.derive("max_len", self.seq_len)
        super().__post_init__()
        if self.max_len < self.seq_len:
            raise BadInput(f"max_len = {self.max_len}: expected at least seq_len = {self.seq_len}")


class Model(phase2.Model):
    """GPT-2 with an untied head."""

    Config = Config
    Position: Slot = LearnedPosition
    FFN: Slot = GELUFeedForward
    Block: Slot = PreNormBlock

    def make_final_norm(self) -> nn.Module:
        return self.make_norm()

    def init_weight(self, path: str, value: mx.array, key: mx.array) -> mx.array:
        return init.rule_for(path, init.gpt2_rules(self.config.d_model, self.config.n_layers))(value, key)


def leaf(**slots: Slot) -> type[Model]:
    """A branch: the trunk with these slots filled otherwise."""
    return type("Leaf", (Model,), slots)


def gated(ffn: Slot) -> type[Model]:
    """A branch whose feed-forward part has a gate, and two thirds of the width: three maps with the weights of two."""

    class Gated(Model):
        FFN = ffn

        def make_ffn(self, i: int) -> nn.Module:
            return class_for_layer(self.FFN, i)(
                replace(self.config, d_ff=max(1, round(self.config.d_ff * 2 / 3)))
            )  # 2002.05202, sec. 2

    return Gated


class PostNorm(Model):
    """Post-LN, as in phases 1 and 2: each block ends with a norm, so that none stands behind the last."""

    Block = PostNormBlock

    def make_final_norm(self) -> nn.Module:
        return nn.Identity()


class RoPEConfig(Config):
    rope_theta: float = 10_000.0  # the base of the wavelengths, sec. 3.2.2


class T5Config(Config):
    n_buckets: int = 32  # of distances, a learned number each
    max_distance: int = 128  # where the last of them begins at the latest


class ShawConfig(Config):
    max_distance: int = 16  # with a vector of its own, which all greater ones share; k of sec. 3.2


class TransformerXLConfig(Config):
    segment_len: int = 0  # tokens; 0: half of seq_len, so that a row is a segment and its memory

    def __post_init__(self) -> None:
        self.derive("segment_len", max(1, self.seq_len // 2))
        super().__post_init__()


class GQAConfig(Config):
    n_kv_heads: int = 2  # heads of keys and values


class MQAConfig(Config):
    n_kv_heads: int = 1  # heads of keys and values


class LongformerConfig(Config):
    window: int = 32  # tokens that a token sees, its own among them
    n_global: int = 1  # first tokens of a row that all see


# tune/phase3_nano.json, phase3_small.json; base: a guess
RECIPE = replace(phase2.RECIPE, learning_rate=BySize(nano=3e-3, small=1.5e-3, base=7.5e-4))
RECIPES = {"no_warmup": replace(RECIPE, schedule=replace(RECIPE.schedule, warmup_tokens=0))}  # 2002.04745, sec. 3.2
BRANCHES: dict[str, type[Model]] = {
    "tied": leaf(Head=TiedHead),  # Hugging Face's GPT-2: the same logits and file; its start and dropout differ
    "silu": leaf(FFN=SiLUFeedForward),  # Elfwing et al. 2017, arXiv 1702.03118
    "glu": gated(GLU),  # Dauphin et al. 2016, arXiv 1612.08083; in a Transformer: Shazeer 2020, arXiv 2002.05202
    "reglu": gated(ReGLU),  # Shazeer 2020
    "geglu": gated(GEGLU),  # Shazeer 2020
    "swiglu": gated(SwiGLU),  # Shazeer 2020
    "no_position": leaf(Position=Position),  # the control: the causal mask alone tells the order
    "rope": leaf(Config=RoPEConfig, Position=RotaryPosition),  # Su et al. 2021, arXiv 2104.09864
    "alibi": leaf(Position=ALiBi),  # Press et al. 2021, arXiv 2108.12409
    "t5": leaf(Config=T5Config, Position=T5Position),  # Raffel et al. 2019, arXiv 1910.10683
    "shaw": leaf(Config=ShawConfig, Position=Position, Mixer=ShawAttention),  # Shaw et al. 2018, arXiv 1803.02155
    "transformer_xl": leaf(Config=TransformerXLConfig, Position=Position, Mixer=TransformerXLAttention),  # 1901.02860
    "mqa": leaf(Config=MQAConfig, Mixer=GroupedAttention),  # Shazeer 2019, arXiv 1911.02150
    "gqa": leaf(Config=GQAConfig, Mixer=GroupedAttention),  # Ainslie et al. 2023, arXiv 2305.13245
    "longformer": leaf(Config=LongformerConfig, Mixer=LongformerAttention),  # Beltagy et al. 2020, arXiv 2004.05150
    "rms_norm": leaf(Norm=RMSNorm),  # Zhang & Sennrich 2019, arXiv 1910.07467
    "scale_norm": leaf(Norm=ScaleNorm),  # Nguyen & Salazar 2019, arXiv 1910.05895
    "no_norm": leaf(Norm=nn.Identity),  # the control
    "post_norm": PostNorm,  # this and the next three turn back what the trunk changed; against it: arXiv 2002.04745
    "sinusoid": leaf(Position=SinusoidalPosition),
    "relu": leaf(FFN=FeedForward),
    "xavier": leaf(init_weight=phase2.Model.init_weight),
}

mt.main(__name__)
