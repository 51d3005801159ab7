"""Recipes and branches of phase 6: each idea added to phase 5, removed from phase 6 or added to it.

A branch `phase_5_with_X` is meant for the recipe `phase_5`, and a recipe `phase_5_with_X` for the branch `phase_5`.
"""

from dataclasses import field, replace
from typing import Any

from mlx_transformer import nn
from mlx_transformer.train import BySize, Recipe, optim
from mlx_transformer.utils.errors import BadInput
from phases.ablations import mixers, speed_run, take
from phases.ablations.phase4 import with_experts

RAMP_TOKENS = BySize(nano=30_000, small=150_000, base=600_000)  # until the batch has its full size

REWIRED_STEPS = BySize(nano=249, small=311, base=311)  # three quarters of the steps
CHOSEN = {"muon": ("learning_rate", "groups"), "short": ("schedule", "eval_tokens")}  # fields of the recipe
OTHERS: dict[str, dict[str, Any]] = {
    # Smith et al. 2018, arXiv 1711.00489
    "batch_warmup": {"batch_warmup": optim.BatchWarmup(tokens=RAMP_TOKENS, doublings=2)},
}


class NotShifted(nn.Hyperparameters):
    n_shifts: int = field(default=0, metadata={"least": 0})  # none


class FullSoftmax(nn.Hyperparameters):
    sample_ratio: float = 0.0  # full softmax


class CappedConfig(nn.Hyperparameters):
    softcap: float = 15.0  # bound on the logits

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.softcap > 0:
            raise BadInput(f"softcap = {self.softcap}: expected a number above 0")


class DepthConfig(nn.Hyperparameters):
    depth_capacity: float = 0.125  # share of the tokens that a routed block computes in training (sec. 4)
    depth_router_weight: float = 0.01  # weight of the router's loss


class MultiTokenConfig(nn.Hyperparameters):
    n_predict: int = 2  # tokens that training predicts at each token; 1: the next one only
    further_weight: float = 0.3  # weight of the loss of those after the next (2412.19437, sec. 4.2)


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

    class HalfSwiGLU(nn.HalfWidth, previous.FFN):  # type: ignore[name-defined]
        """Phase 5's feed-forward part, half as wide."""

    class RoutedBlock(nn.MixtureOfDepths, model.Block):  # type: ignore[name-defined]
        """A block of the tokens that its router chooses."""

    llama = {"Mixer": previous.Mixer, "FFN": previous.FFN, "init_weight": previous.init_weight}

    def before(*numbers: type[nn.Hyperparameters], **slots: nn.Slot) -> type[nn.Model]:
        """Change one idea of phase 5's model, as a branch of phase 6's."""
        return nn.leaf(model, *numbers, NotShifted, FullSoftmax, **llama | slots)

    return {
        "phase_5": before(),
        "phase_5_with_value_embeddings": before(Mixer=model.Mixer),
        "phase_5_with_relu_squared": before(FFN=nn.ReLUSquaredFeedForward),
        "phase_5_with_half_width": before(FFN=HalfSwiGLU),
        "phase_5_with_zero_init": before(init_weight=model.init_weight),
        "phase_5_with_token_shift": nn.leaf(model, FullSoftmax, **llama),
        "phase_5_with_sampled_softmax": nn.leaf(model, NotShifted, **llama),
        "phase_5_with_qk_norm": before(Mixer=NormedAttention),
        "phase_5_with_lambdas": before(Block=nn.MixedInputBlock),
        "phase_5_with_softcap": before(CappedConfig, Head=nn.CappedHead),
        "alternate_values": nn.leaf(model, Mixer=(previous.Mixer, model.Mixer)),  # in every other layer
        "without_value_embeddings": nn.leaf(model, Mixer=previous.Mixer),
        "without_relu_squared": nn.leaf(model, FFN=HalfSwiGLU),
        "without_half_width": nn.leaf(model, FFN=nn.ReLUSquaredFeedForward),
        "without_zero_init": nn.leaf(model, init_weight=previous.init_weight),
        "without_token_shift": nn.leaf(model, NotShifted),
        "without_sampled_softmax": nn.leaf(model, FullSoftmax),
        "with_qk_norm": nn.leaf(model, Mixer=NormedValueAttention),
        "with_lambdas": nn.leaf(model, Block=nn.MixedInputBlock),  # modded-nanogpt, 2024
        # Raposo et al. 2024, arXiv 2404.02258
        "mod": nn.leaf(model, DepthConfig, Block=(model.Block, RoutedBlock)),
        "mtp": nn.leaf(model, nn.MultiToken, MultiTokenConfig),  # DeepSeek-V3, arXiv 2412.19437, sec. 2.2
        # Gloeckle et al. 2024, arXiv 2404.19737
        "mtp_parallel": nn.leaf(model, nn.ParallelMultiToken, MultiTokenConfig),
        **mixers.branches(model),
        **speed_run.branches(model),
        "with_softcap": nn.leaf(model, CappedConfig, Head=nn.CappedHead),  # Gemma 2, arXiv 2408.00118
        "moe": with_experts(model, nn.ReLUSquaredMixture),  # --init-from a dense run: 2212.05055
    }
