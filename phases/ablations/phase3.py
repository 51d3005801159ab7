"""Branches of phase 3: one idea each on top of GPT-2, and one each that undoes a change of phase 3."""

from dataclasses import replace

from mlx_transformer import nn
from mlx_transformer.nn.model import class_for_layer


class RoPEConfig(nn.Hyperparameters):
    rope_theta: float = 10_000.0  # base of the wavelengths, sec. 3.2.2


class T5Config(nn.Hyperparameters):
    n_buckets: int = 32  # buckets of distances, with a learned bias each
    max_distance: int = 128  # distance at which the last bucket begins at the latest


class ShawConfig(nn.Hyperparameters):
    max_distance: int = 16  # largest distance with a vector of its own, which greater ones share; k of sec. 3.2


class TransformerXLConfig(nn.Hyperparameters):
    segment_len: int = 0  # tokens; 0: half of seq_len, so that a sequence is a segment and its memory

    def __post_init__(self) -> None:
        self.derive("segment_len", max(1, self.seq_len // 2))  # type: ignore[attr-defined]
        super().__post_init__()


class GQAConfig(nn.Hyperparameters):
    n_kv_heads: int = 2  # heads of keys and values


class MQAConfig(nn.Hyperparameters):
    n_kv_heads: int = 1  # heads of keys and values


class LongformerConfig(nn.Hyperparameters):
    window: int = 32  # tokens that a token attends to, itself included
    n_global: int = 1  # first tokens of a sequence, which all others attend to


def _two_thirds_wide(self: nn.Model, i: int) -> nn.Module:
    """Make a feed-forward part with 2/3 of d_ff: three maps with the weights of two (2002.05202, sec. 2)."""
    return class_for_layer(self.FFN, i)(replace(self.config, d_ff=max(1, round(self.config.d_ff * 2 / 3))))


def branches(model: type[nn.Model], previous: type[nn.Model]) -> dict[str, type[nn.Model]]:
    """Return the branches of phase 3's model; `previous` is phase 2's."""

    def branch(*numbers: type[nn.Hyperparameters], **slots: nn.Slot) -> type[nn.Model]:
        return nn.leaf(model, *numbers, **slots)

    def gated(ffn: type[nn.FeedForward]) -> type[nn.Model]:
        return branch(FFN=ffn, make_ffn=_two_thirds_wide)

    return {
        "tied": branch(Head=nn.TiedHead),  # Hugging Face's GPT-2, but for initialization and dropout
        "silu": branch(FFN=nn.SiLUFeedForward),  # Elfwing et al. 2017, arXiv 1702.03118
        "glu": gated(nn.GLU),  # Dauphin et al. 2016, arXiv 1612.08083; in a Transformer: Shazeer 2020, arXiv 2002.05202
        "reglu": gated(nn.ReGLU),  # Shazeer 2020
        "geglu": gated(nn.GEGLU),  # Shazeer 2020
        "swiglu": gated(nn.SwiGLU),  # Shazeer 2020
        "no_position": branch(Position=nn.Position),  # control: order is known from the causal mask only
        "rope": branch(RoPEConfig, Position=nn.RotaryPosition),  # Su et al. 2021, arXiv 2104.09864
        "alibi": branch(Position=nn.ALiBi),  # Press et al. 2021, arXiv 2108.12409
        "t5": branch(T5Config, Position=nn.T5Position),  # Raffel et al. 2019, arXiv 1910.10683
        # Shaw et al. 2018, arXiv 1803.02155; Dai et al. 2019, arXiv 1901.02860
        "shaw": branch(ShawConfig, Position=nn.Position, Mixer=nn.ShawAttention),
        "transformer_xl": branch(TransformerXLConfig, Position=nn.Position, Mixer=nn.TransformerXLAttention),
        "mqa": branch(MQAConfig, Mixer=nn.GroupedAttention),  # Shazeer 2019, arXiv 1911.02150
        "gqa": branch(GQAConfig, Mixer=nn.GroupedAttention),  # Ainslie et al. 2023, arXiv 2305.13245
        "longformer": branch(LongformerConfig, Mixer=nn.LongformerAttention),  # Beltagy et al. 2020, arXiv 2004.05150
        "rms_norm": branch(Norm=nn.RMSNorm),  # Zhang & Sennrich 2019, arXiv 1910.07467
        "scale_norm": branch(Norm=nn.ScaleNorm),  # Nguyen & Salazar 2019, arXiv 1910.05895
        "no_norm": branch(Norm=nn.Identity),  # control
        # Phase 3 without one of its changes.
        "post_norm": branch(Block=nn.PostNormBlock, make_final_norm=previous.make_final_norm),
        "sinusoid": branch(Position=nn.SinusoidalPosition),
        "relu": branch(FFN=nn.FeedForward),
        "xavier": branch(init_weight=previous.init_weight),
    }
