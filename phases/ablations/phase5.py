"""Recipes and branches of phase 5: the optimizers Lion and Sophia; Mistral, Qwen3 and tied heads."""

from dataclasses import replace

from mlx_transformer import nn
from mlx_transformer.train import BySize, Recipe, optim
from phases.ablations.phase4 import with_experts

# Tuned at nano: results/published/tune/phase5_lion_nano.json and phase5_sophia_nano.json.
# fmt: off
LION_RATE   = BySize(nano=1.2e-3, small=6e-4, base=3e-4)
SOPHIA_RATE = BySize(nano=  1e-3, small=1e-3, base=5e-4)
# fmt: on


class MistralConfig(nn.Hyperparameters):
    window: int = 0  # tokens that a token attends to, itself included; 0: as many as seq_len

    def __post_init__(self) -> None:
        self.derive("window", self.seq_len)  # type: ignore[attr-defined]
        super().__post_init__()


def recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Return phase 5's recipe with other optimizers."""

    def by(rule: optim.Lion | optim.Sophia, learning_rate: BySize) -> Recipe:
        """Replace every group's optimizer; only matrices decay, as with AdamW."""
        tuned = recipe.with_rates(learning_rate, embedding=3.0, head=12.0)
        *matrices, vectors = (replace(group, optimizer=rule) for group in tuned.groups)
        return replace(tuned, groups=(*matrices, replace(vectors, optimizer=replace(rule, weight_decay=0.0))))

    return {
        "lion": by(optim.Lion(weight_decay=0.05), LION_RATE),  # Chen et al. 2023, arXiv 2302.06675, sec. 5
        "sophia": by(optim.Sophia(weight_decay=0.1), SOPHIA_RATE),  # Liu et al. 2023, arXiv 2305.14342
    }


def branches(model: type[nn.Model]) -> dict[str, type[nn.Model]]:
    """Return the branches of phase 5's model."""

    class MistralAttention(nn.WindowAttention, model.Mixer):  # type: ignore[name-defined]
        """A sliding window (Jiang et al. 2023, arXiv 2310.06825, sec. 2)."""

    class Qwen3Attention(nn.QKNorm, model.Mixer):  # type: ignore[name-defined]
        """Normalized queries and keys (Yang et al. 2025, arXiv 2505.09388, sec. 2)."""

    mistral = nn.leaf(model, MistralConfig, Mixer=MistralAttention)
    qwen3 = nn.leaf(model, Mixer=Qwen3Attention)
    return {
        "tied": nn.leaf(model, Head=nn.TiedHead),  # Press & Wolf 2017, arXiv 1608.05859
        "mistral": mistral,
        "mistral_tied": nn.leaf(mistral, Head=nn.TiedHead),
        "qwen3": qwen3,
        "moe": with_experts(model, nn.SwiGLUMixture),  # Mixtral: Jiang et al. 2024, arXiv 2401.04088
        "qwen3_tied": nn.leaf(qwen3, Head=nn.TiedHead),
    }
