"""Branches of phase 4: a tied head, sparse and latent attention, shared layers, experts."""

import math
from typing import Any

import mlx.core as mx

from mlx_transformer import nn


class WindowConfig(nn.Hyperparameters):
    window: int = 32  # tokens that a token attends to, itself included


class FusedWindow(nn.WindowAttention, nn.FusedAttention):
    """Grouped-query attention in a sliding window."""


class SparseConfig(nn.Hyperparameters):
    stride: int = 0  # tokens of a block; 0: about sqrt(n_summary * seq_len), a power of two: the fewest keys per query
    n_summary: int = 4  # last tokens of a block, to which all later tokens attend

    def __post_init__(self) -> None:
        fewest = math.sqrt(max(1, self.n_summary * self.seq_len))  # type: ignore[attr-defined]
        self.derive("stride", 2 ** math.ceil(math.log2(max(fewest, self.n_summary))))
        super().__post_init__()


class FusedSparse(nn.SparseAttention, nn.FusedAttention):
    """Grouped-query attention within blocks and to the summaries of earlier ones."""


class LatentConfig(nn.Hyperparameters):
    kv_rank: int = 0  # width of the latent, d_c of sec. 2.1.2; 0: half of d_model (DeepSeek-V2: 4 head widths, of 128)
    rope_dim: int = 0  # width of the rotary part of a head, sec. 2.1.3; 0: half of head_dim
    rope_theta: float = 10_000.0  # base of its wavelengths

    def __post_init__(self) -> None:
        self.derive("kv_rank", max(1, self.d_model // 2))  # type: ignore[attr-defined]
        self.derive("rope_dim", max(2, self.head_dim // 4 * 2))  # type: ignore[attr-defined]
        super().__post_init__()


class FusedLatent(nn.LatentAttention, nn.FusedAttention):
    """Latent attention in one kernel where there is one."""


class UniversalConfig(nn.Hyperparameters):
    ponder_weight: float = 0.01  # weight of the ponder cost, tau of Graves 2016, sec. 2.1


class MoEConfig(nn.Hyperparameters):
    """Configuration of a layer of experts, each d_ff wide."""

    n_experts: int = 8  # experts of a layer
    experts_per_token: int = 2  # experts that compute a token
    capacity_factor: float = 1.25  # tokens of an expert in training, relative to an equal share (Switch, sec. 2.2)
    balance_weight: float = 0.01  # weight of the balance loss (Switch, sec. 2.2)
    router_z_weight: float = 0.001  # weight of the router's z-loss (Zoph et al. 2022, arXiv 2202.08906, sec. 3)


class SwitchConfig(MoEConfig):
    experts_per_token: int = 1  # experts that compute a token


class Universal(nn.Model):
    """One block for all steps, until each token halts (Dehghani et al. 2018, arXiv 1807.03819)."""

    Position = nn.StepPosition

    @classmethod
    def n_blocks(cls, config: nn.Config) -> int:
        return 1

    def build(self, config: Any) -> None:
        super().build(config)
        self.halting = nn.Halting(config)

    def stack(self) -> list[nn.Module]:
        return self.blocks * self.config.n_layers

    def run_block(self, block: nn.Module, x: mx.array, ctx: nn.Ctx) -> mx.array:
        return super().run_block(block, ctx.position.at_step(x, ctx), ctx)

    def run_blocks(self, x: mx.array, ctx: nn.Ctx) -> mx.array:
        config: Any = self.config
        p, states = [], []
        for depth, block in enumerate(self.stack()):
            p.append(self.halting.probability(x))
            x = self.run_block(block, x, ctx.at(depth))
            states.append(x)
        output, steps, remaining = self.halting.mean(p, states)
        ctx.record("ponder_steps", steps.mean())
        ctx.record("ponder_cost", (steps + remaining).mean(), config.ponder_weight)
        return output


def with_experts(
    model: type[nn.Model], experts: type[nn.MixtureOfExperts], numbers: type[MoEConfig] = MoEConfig
) -> type[nn.Model]:
    """Return the branch of a model that has experts in place of its feed-forward layers."""

    def count_parameters(self: nn.Model) -> dict[str, int]:
        counts = model.count_parameters(self)
        return counts | {"active": counts["total"] - sum(block.ffn.inactive_parameters() for block in self.blocks)}

    return nn.leaf(model, numbers, FFN=experts, count_parameters=count_parameters)


def branches(model: type[nn.Model]) -> dict[str, type[nn.Model]]:
    """Return the branches of phase 4's model."""
    return {
        "tied": nn.leaf(model, Head=nn.TiedHead),  # Press & Wolf 2017, arXiv 1608.05859
        "window": nn.leaf(model, WindowConfig, Mixer=FusedWindow),  # Beltagy et al. 2020, arXiv 2004.05150; Mistral
        # Katharopoulos et al. 2020, arXiv 2006.16236: elu(x) + 1 as features, or max(0, x)^2
        "linear": nn.leaf(model, Mixer=nn.LinearAttention),
        "linear_relu2": nn.leaf(model, Mixer=nn.SquaredReLUAttention),
        "sparse": nn.leaf(model, SparseConfig, Mixer=FusedSparse),  # Child et al. 2019, arXiv 1904.10509
        "mla": nn.leaf(model, LatentConfig, Mixer=FusedLatent, Position=nn.RotaryPosition),  # arXiv 2405.04434
        "universal": nn.leaf(model, Universal, UniversalConfig),
        # GLaM: Du et al. 2021, arXiv 2112.06905; Mixtral: Jiang et al. 2024, arXiv 2401.04088
        "moe": with_experts(model, nn.MixtureOfExperts),
        # Fedus et al. 2021, arXiv 2101.03961
        "switch": with_experts(model, nn.Switch, SwitchConfig),
    }
