"""Recipes and branches of phase 6: each idea added to phase 5, removed from phase 6 or added to it.

A branch `phase_5_with_X` is meant for the recipe `phase_5`, and a recipe `phase_5_with_X` for the branch `phase_5`.
"""

from dataclasses import replace
from typing import Any

from mlx_transformer import nn
from mlx_transformer.train import BySize, Recipe, optim
from mlx_transformer.utils.errors import BadInput
from phases.ablations import speed_run, take
from phases.ablations.phase4 import with_experts

RAMP_TOKENS = BySize(nano=30_000, small=150_000, base=600_000)  # until the batch has its full size

REWIRED_STEPS = BySize(nano=290, small=366, base=366)  # three quarters of the steps
CHOSEN = {"muon": ("learning_rate", "groups"), "short": ("schedule",)}  # fields of the recipe
OTHERS: dict[str, dict[str, Any]] = {
    # Smith et al. 2018, arXiv 1711.00489
    "batch_warmup": {"batch_warmup": optim.BatchWarmup(tokens=RAMP_TOKENS, doublings=2)},
}
CHOSEN_SLOTS = {"value_embeddings": "Mixer", "relu_squared": "FFN", "zero_init": "init_weight"}


class CappedConfig(nn.Hyperparameters):
    softcap: float = 15.0  # bound on the logits

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.softcap > 0:
            raise BadInput(f"softcap = {self.softcap}: expected a number above 0")


class DeltaNetConfig(nn.Hyperparameters):
    conv_width: int = 4  # tokens of the short convolution


class DepthConfig(nn.Hyperparameters):
    depth_capacity: float = 0.125  # share of the tokens that a routed block computes in training (sec. 4)
    depth_router_weight: float = 0.01  # weight of the router's loss


class MultiTokenConfig(nn.Hyperparameters):
    n_predict: int = 2  # tokens that training predicts at each token; 1: the next one only
    further_weight: float = 0.3  # weight of the loss of those after the next (2412.19437, sec. 4.2)


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


def recipes(recipe: Recipe, previous: Recipe) -> dict[str, Recipe]:
    """Return the ablations of phase 6's recipe; `previous` is phase 5's, named `phase_5`."""
    found = {"phase_5": previous}
    found |= {f"phase_5_with_{name}": take(previous, recipe, *fields) for name, fields in CHOSEN.items()}
    found |= {f"phase_5_with_{name}": replace(previous, **fields) for name, fields in OTHERS.items()}
    found |= {f"with_{name}": replace(recipe, **fields) for name, fields in OTHERS.items()}
    found |= {f"without_{name}": take(recipe, previous, *fields) for name, fields in CHOSEN.items()}
    found |= speed_run.recipes(recipe)
    matrices, *others = recipe.groups
    sparse = optim.RigL(rule=matrices.optimizer, every=20, until=REWIRED_STEPS)
    found["rigl"] = replace(recipe, groups=(replace(matrices, optimizer=sparse), *others))  # arXiv 1911.11134
    return found


def branches(model: type[nn.Model], previous: type[nn.Model]) -> dict[str, type[nn.Model]]:
    """Return the ablations of phase 6's model; `previous` is phase 5's, named `phase_5`."""

    class NormedAttention(nn.QKNorm, previous.Mixer):  # type: ignore[name-defined]
        """Normalized queries and keys (Henry et al. 2020, arXiv 2010.04245)."""

    class NormedValueAttention(nn.ValueEmbedding, NormedAttention):
        """Normalized queries and keys, and value embeddings."""

    class RoutedBlock(nn.MixtureOfDepths, model.Block):  # type: ignore[name-defined]
        """A block of the tokens that its router chooses."""

    llama: dict[str, nn.Slot] = {slot: getattr(previous, slot) for slot in CHOSEN_SLOTS.values()}

    def before(*numbers: type[nn.Hyperparameters], **slots: nn.Slot) -> type[nn.Model]:
        """Change one idea of phase 5's model, as a branch of phase 6's."""
        return nn.leaf(model, *numbers, **llama | slots)

    return {
        "phase_5": before(),
        **{f"phase_5_with_{name}": before(**{slot: getattr(model, slot)}) for name, slot in CHOSEN_SLOTS.items()},
        "phase_5_with_qk_norm": before(Mixer=NormedAttention),
        "phase_5_with_lambdas": before(Block=nn.MixedInputBlock),
        "phase_5_with_softcap": before(CappedConfig, Head=nn.CappedHead),
        "alternate_values": nn.leaf(model, Mixer=(previous.Mixer, model.Mixer)),  # in every other layer
        **{f"without_{name}": nn.leaf(model, **{slot: llama[slot]}) for name, slot in CHOSEN_SLOTS.items()},
        "with_qk_norm": nn.leaf(model, Mixer=NormedValueAttention),
        "with_lambdas": nn.leaf(model, Block=nn.MixedInputBlock),  # modded-nanogpt, 2024
        # Yang et al. 2024, arXiv 2412.06464; Beck et al. 2024, arXiv 2405.04517
        "deltanet": nn.leaf(model, DeltaNetConfig, Mixer=nn.GatedDeltaNet, Position=nn.Position),
        "mlstm": nn.leaf(model, Mixer=nn.MLSTM, Position=nn.Position),
        # Raposo et al. 2024, arXiv 2404.02258
        "mod": nn.leaf(model, DepthConfig, Block=(model.Block, RoutedBlock)),
        "mtp": nn.leaf(model, nn.MultiToken, MultiTokenConfig),  # DeepSeek-V3, arXiv 2412.19437, sec. 2.2
        # Gloeckle et al. 2024, arXiv 2404.19737
        "mtp_parallel": nn.leaf(model, nn.ParallelMultiToken, MultiTokenConfig),
        "retnet": nn.leaf(model, RetNetConfig, Mixer=nn.Retention),  # Sun et al. 2023, arXiv 2307.08621
        **speed_run.branches(model),
        "with_softcap": nn.leaf(model, CappedConfig, Head=nn.CappedHead),  # Gemma 2, arXiv 2408.00118
        "moe": with_experts(model, nn.ReLUSquaredMixture),  # --init-from a dense run: 2212.05055
        "mamba": nn.leaf(model, MambaConfig, Mixer=nn.Mamba),  # Gu & Dao 2023, arXiv 2312.00752
        "mamba2": nn.leaf(
            model, Mamba2Config, Mixer=nn.Mamba2, Position=nn.Position
        ),  # Dao & Gu 2024, arXiv 2405.21060
        "s4d": nn.leaf(model, S4DConfig, Mixer=nn.S4D),  # Gu et al. 2022, arXiv 2206.11893
        # One layer in four is attention, the second one, so that a model of two layers has one as well: Lieber et al.
        # 2024 (Jamba), arXiv 2403.19887, which has one in eight.
        "hybrid": nn.leaf(model, MambaConfig, Mixer=(nn.Mamba, model.Mixer, nn.Mamba, nn.Mamba)),
    }
