"""Branches of phase 4: a tied head, a sliding window, experts."""

from mlx_transformer import nn


class WindowConfig(nn.Hyperparameters):
    window: int = 32  # tokens that a token attends to, itself included


class FusedWindow(nn.WindowAttention, nn.FusedAttention):
    """Grouped-query attention in a sliding window."""


class MoEConfig(nn.Hyperparameters):
    """Configuration of a layer of experts, each d_ff wide."""

    n_experts: int = 8  # experts of a layer
    experts_per_token: int = 2  # experts that compute a token
    capacity_factor: float = 1.25  # tokens of an expert in training, relative to an equal share (Switch, sec. 2.2)
    balance_weight: float = 0.01  # weight of the balance loss (Switch, sec. 2.2)
    router_z_weight: float = 0.001  # weight of the router's z-loss (Zoph et al. 2022, arXiv 2202.08906, sec. 3)


class SwitchConfig(MoEConfig):
    experts_per_token: int = 1  # experts that compute a token


def branches(model: type[nn.Model]) -> dict[str, type[nn.Model]]:
    """Return the branches of phase 4's model."""

    def count_parameters(self: nn.Model) -> dict[str, int]:
        counts = model.count_parameters(self)
        return counts | {"active": counts["total"] - sum(block.ffn.inactive_parameters() for block in self.blocks)}

    return {
        "tied": nn.leaf(model, Head=nn.TiedHead),  # Press & Wolf 2017, arXiv 1608.05859
        "window": nn.leaf(model, WindowConfig, Mixer=FusedWindow),  # Beltagy et al. 2020, arXiv 2004.05150; Mistral
        # Katharopoulos et al. 2020, arXiv 2006.16236: elu(x) + 1 as features, or max(0, x)^2
        "linear": nn.leaf(model, Mixer=nn.LinearAttention),
        "linear_relu2": nn.leaf(model, Mixer=nn.SquaredReLUAttention),
        # GLaM: Du et al. 2021, arXiv 2112.06905; Mixtral: Jiang et al. 2024, arXiv 2401.04088
        "moe": nn.leaf(model, MoEConfig, FFN=nn.MixtureOfExperts, count_parameters=count_parameters),
        # Fedus et al. 2021, arXiv 2101.03961
        "switch": nn.leaf(model, SwitchConfig, FFN=nn.Switch, count_parameters=count_parameters),
    }
