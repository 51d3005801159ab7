"""Mixers that are not attention, as branches of phase 6."""

from mlx_transformer import nn


class DeltaNetConfig(nn.Hyperparameters):
    conv_width: int = 4  # tokens of the short convolution


class MambaConfig(nn.Hyperparameters):
    """Configuration of Mamba, by default the paper's (2312.00752, sec. 3.4 and 3.6)."""

    d_state: int = 16  # numbers in the state of a channel
    expand: int = 2  # channels relative to d_model
    conv_width: int = 4  # tokens of the short convolution
    dt_rank: int = 0  # rank of the map to the steps; 0: a sixteenth of d_model, rounded up

    def __post_init__(self) -> None:
        self.derive("dt_rank", -(-self.d_model // 16))  # type: ignore[attr-defined]
        super().__post_init__()


class Mamba2Config(nn.Hyperparameters):
    d_state: int = 64  # numbers that a head keeps of each of its channels
    expand: int = 2  # channels relative to d_model
    conv_width: int = 4  # tokens of the short convolution


class S4DConfig(nn.Hyperparameters):
    d_state: int = 64  # numbers in the state of a channel


class RetNetConfig(nn.Hyperparameters):
    expand: int = 2  # width of the values relative to the keys


def branches(model: type[nn.Model]) -> dict[str, type[nn.Model]]:
    """Return each mixer in the place of phase 6's attention."""
    return {
        # Yang et al. 2024, arXiv 2412.06464; Beck et al. 2024, arXiv 2405.04517
        "deltanet": nn.leaf(model, DeltaNetConfig, Mixer=nn.GatedDeltaNet, Position=nn.Position),
        "mlstm": nn.leaf(model, Mixer=nn.MLSTM, Position=nn.Position),
        "retnet": nn.leaf(model, RetNetConfig, Mixer=nn.Retention),  # Sun et al. 2023, arXiv 2307.08621
        "mamba": nn.leaf(model, MambaConfig, Mixer=nn.Mamba),  # Gu & Dao 2023, arXiv 2312.00752
        # Dao & Gu 2024, arXiv 2405.21060
        "mamba2": nn.leaf(model, Mamba2Config, Mixer=nn.Mamba2, Position=nn.Position),
        "s4d": nn.leaf(model, S4DConfig, Mixer=nn.S4D),  # Gu et al. 2022, arXiv 2206.11893
        # One layer in four is attention, the second one, so that a model of two layers has one as well: Lieber et al.
        # 2024 (Jamba), arXiv 2403.19887, which has one in eight.
        "hybrid": nn.leaf(model, MambaConfig, Mixer=(nn.Mamba, model.Mixer, nn.Mamba, nn.Mamba)),
    }
