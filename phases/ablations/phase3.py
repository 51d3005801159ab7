"""Branches of phase 3: one idea each on top of GPT-2, and one each that undoes a change of phase 3."""

from dataclasses import replace

from mlx import nn

from mlx_transformer.nn.attention import GroupedAttention
from mlx_transformer.nn.block import PostNormBlock
from mlx_transformer.nn.config import Hyperparameters
from mlx_transformer.nn.feedforward import GEGLU, GLU, FeedForward, ReGLU, SiLUFeedForward, SwiGLU
from mlx_transformer.nn.head import TiedHead
from mlx_transformer.nn.model import Model, class_for_layer, leaf
from mlx_transformer.nn.norm import RMSNorm, ScaleNorm
from mlx_transformer.nn.position import ALiBi, Position, RotaryPosition, SinusoidalPosition, T5Position
from mlx_transformer.nn.relative import ShawAttention, TransformerXLAttention
from mlx_transformer.nn.sparse import LongformerAttention


class RoPEConfig(Hyperparameters):
    rope_theta: float = 10_000.0  # base of the wavelengths, sec. 3.2.2


class T5Config(Hyperparameters):
    n_buckets: int = 32  # buckets of distances, with a learned bias each
    max_distance: int = 128  # distance at which the last bucket begins at the latest


class ShawConfig(Hyperparameters):
    max_distance: int = 16  # largest distance with a vector of its own, which greater ones share; k of sec. 3.2


class TransformerXLConfig(Hyperparameters):
    segment_len: int = 0  # tokens; 0: half of seq_len, so that a sequence is a segment and its memory

    def __post_init__(self) -> None:
        self.derive("segment_len", max(1, self.seq_len // 2))  # type: ignore[attr-defined]
        super().__post_init__()


class GQAConfig(Hyperparameters):
    n_kv_heads: int = 2  # heads of keys and values


class MQAConfig(Hyperparameters):
    n_kv_heads: int = 1  # heads of keys and values


class LongformerConfig(Hyperparameters):
    window: int = 32  # tokens that a token attends to, itself included
    n_global: int = 1  # first tokens of a sequence, which all others attend to


def _two_thirds_wide(self: Model, i: int) -> nn.Module:
    """Make a feed-forward part with 2/3 of d_ff: three maps with the weights of two (2002.05202, sec. 2)."""
    return class_for_layer(self.FFN, i)(replace(self.config, d_ff=max(1, round(self.config.d_ff * 2 / 3))))


def branches(model: type[Model], previous: type[Model]) -> dict[str, type[Model]]:
    """Return the branches of phase 3's model; `previous` is phase 2's."""

    def gated(ffn: type[FeedForward]) -> type[Model]:
        return leaf(model, FFN=ffn, make_ffn=_two_thirds_wide)

    return {
        "tied": leaf(model, Head=TiedHead),  # Hugging Face's GPT-2, but for initialization and dropout
        "silu": leaf(model, FFN=SiLUFeedForward),  # Elfwing et al. 2017, arXiv 1702.03118
        "glu": gated(GLU),  # Dauphin et al. 2016, arXiv 1612.08083; in a Transformer: Shazeer 2020, arXiv 2002.05202
        "reglu": gated(ReGLU),  # Shazeer 2020
        "geglu": gated(GEGLU),  # Shazeer 2020
        "swiglu": gated(SwiGLU),  # Shazeer 2020
        "no_position": leaf(model, Position=Position),  # control: order is known from the causal mask only
        "rope": leaf(model, RoPEConfig, Position=RotaryPosition),  # Su et al. 2021, arXiv 2104.09864
        "alibi": leaf(model, Position=ALiBi),  # Press et al. 2021, arXiv 2108.12409
        "t5": leaf(model, T5Config, Position=T5Position),  # Raffel et al. 2019, arXiv 1910.10683
        # Shaw et al. 2018, arXiv 1803.02155; Dai et al. 2019, arXiv 1901.02860
        "shaw": leaf(model, ShawConfig, Position=Position, Mixer=ShawAttention),
        "transformer_xl": leaf(model, TransformerXLConfig, Position=Position, Mixer=TransformerXLAttention),
        "mqa": leaf(model, MQAConfig, Mixer=GroupedAttention),  # Shazeer 2019, arXiv 1911.02150
        "gqa": leaf(model, GQAConfig, Mixer=GroupedAttention),  # Ainslie et al. 2023, arXiv 2305.13245
        "longformer": leaf(model, LongformerConfig, Mixer=LongformerAttention),  # Beltagy et al. 2020, arXiv 2004.05150
        "rms_norm": leaf(model, Norm=RMSNorm),  # Zhang & Sennrich 2019, arXiv 1910.07467
        "scale_norm": leaf(model, Norm=ScaleNorm),  # Nguyen & Salazar 2019, arXiv 1910.05895
        "no_norm": leaf(model, Norm=nn.Identity),  # control
        # Phase 3 without one of its changes.
        "post_norm": leaf(model, Block=PostNormBlock, make_final_norm=previous.make_final_norm),
        "sinusoid": leaf(model, Position=SinusoidalPosition),
        "relu": leaf(model, FFN=FeedForward),
        "xavier": leaf(model, init_weight=previous.init_weight),
    }
