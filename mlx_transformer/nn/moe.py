"""Mixture of experts: a router sends each token to a few of several feed-forward layers."""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.feedforward import Activation, HalfWidth
from mlx_transformer.nn.linear import Linear
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path

_MAX_GROUP = 64  # slots of a group at most in dropless dispatch


class StackedLinear(nn.Module):
    """One linear map without bias per expert: weight (E, d_out, d_in)."""

    def __init__(self, n_experts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = mx.zeros((n_experts, d_out, d_in))

    def __call__(self, x: mx.array, expert_ids: mx.array | None) -> mx.array:
        """Apply the map of expert_ids[g] (ascending; None: g) to each group g of x (G, C, d_in): (G, C, d_out)."""
        weight = self.weight.swapaxes(-1, -2)
        return x @ weight if expert_ids is None else ops.gather_matmul(x, weight, expert_ids)


class Experts(nn.Module):
    """n_experts feed-forward layers of width d_ff, without biases: x (G, C, D) -> (G, C, D).

    Group g is computed by the expert expert_ids[g] (ascending), or by expert g if that is None.
    """

    activation: Activation = staticmethod(ops.gelu_tanh)  # slot: elementwise function, as a staticmethod

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.build(config)

    def build(self, config: Any) -> None:
        """Make the parts; subclasses extend this."""
        self.up_proj = StackedLinear(config.n_experts, config.d_model, config.d_ff)
        self.down_proj = StackedLinear(config.n_experts, config.d_ff, config.d_model)

    def activate(self, x: mx.array, expert_ids: mx.array | None) -> mx.array:
        """Return the hidden layer (G, C, d_ff) of x (G, C, D)."""
        return self.activation(self.up_proj(x, expert_ids))

    def __call__(self, x: mx.array, expert_ids: mx.array | None) -> mx.array:
        return self.down_proj(self.activate(x, expert_ids), expert_ids)


class GatedExperts(Experts):
    """Experts with a gate, as in `GatedFeedForward`: activation(x W) * (x V)."""

    def build(self, config: Any) -> None:
        super().build(config)
        self.gate_proj = StackedLinear(config.n_experts, config.d_model, config.d_ff)

    def activate(self, x: mx.array, expert_ids: mx.array | None) -> mx.array:
        return self.activation(self.gate_proj(x, expert_ids)) * self.up_proj(x, expert_ids)


class SwiGLUExperts(GatedExperts):
    """Each expert is a SwiGLU (Mixtral: Jiang et al. 2024, arXiv 2401.04088, sec. 2.1)."""

    activation = staticmethod(ops.silu)


class ReLUSquaredExperts(HalfWidth, Experts):
    """Each expert is phase 6's feed-forward layer: a ReLUSquaredFeedForward, half of d_ff wide."""

    activation = staticmethod(ops.relu_squared)


class MixtureOfExperts(nn.Module):
    """Sum of each token's experts_per_token most probable experts, weighted by the router: x (B, L, D) -> (B, L, D).

    GLaM (Du et al. 2021, arXiv 2112.06905, sec. 3), with two experts per token.
    In training an expert has a capacity of capacity_factor * choices / n_experts; first choices take precedence over
    second ones, earlier tokens over later ones, and choices over capacity are dropped (GShard: Lepikhin et al. 2020,
    arXiv 2006.16668, sec. 2.2). Evaluation drops nothing, so that a token's logits do not depend on other sequences.
    The router computes in float32 and records its losses and load in ctx.

    Differs from GLaM: every layer has experts, not every other one. Raises BadInput for experts_per_token above
    n_experts.
    """

    Experts: type[Experts] = Experts  # slot

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.experts_per_token > config.n_experts:
            raise BadInput(f"experts_per_token = {config.experts_per_token} exceeds n_experts = {config.n_experts}")
        self.n_experts, self.per_token = config.n_experts, config.experts_per_token
        self.capacity_factor = config.capacity_factor
        self.balance_weight, self.router_z_weight = config.balance_weight, config.router_z_weight
        self.router_proj = Linear(config.d_model, config.n_experts)
        self.experts = self.Experts(config)

    def inactive_parameters(self) -> int:
        """Return the number of parameters that a token does not use."""
        total = sum(w.size for w in by_path(self.experts.parameters()).values())
        return total // self.n_experts * (self.n_experts - self.per_token)

    def n_kept(self, length: int) -> int:
        """Return about how many numbers training keeps of one sequence of `length` tokens."""
        d_ff, d_model = self.experts.up_proj.weight.shape[1:]
        return int(4 * (d_model + d_ff) * self.per_token * max(1.0, self.capacity_factor) * length)

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        tokens = x.flatten(0, -2)
        logits = self.router_proj(tokens.astype(mx.float32))
        p = mx.softmax(logits, axis=-1)
        choice = mx.argsort(-mx.stop_gradient(p), axis=-1)[:, : self.per_token]
        dispatch = self.dispatch(choice.T.flatten(), ctx)  # all first choices, then all second ones
        self.record(logits, p, choice, ctx)
        gates = self.gates(mx.take_along_axis(p, choice, axis=-1)).T.astype(x.dtype)
        outputs = dispatch.gather(self.experts(dispatch.scatter(tokens), dispatch.expert_ids))
        return (gates.flatten()[:, None] * outputs).reshape(self.per_token, *x.shape).sum(0)

    def gates(self, p: mx.array) -> mx.array:
        """Return the weights of the chosen experts' outputs from their probabilities p (N, k); they sum to 1."""
        return p / p.sum(-1, keepdims=True)

    def dispatch(self, choices: mx.array, ctx: Ctx) -> "Dispatch":
        """Assign choices (A,), indices of experts, to slots of the experts."""
        if not self.training:
            return dropless_dispatch(choices, self.n_experts)
        capacity = math.ceil(self.capacity_factor * choices.size / self.n_experts)
        dispatch = capacity_dispatch(choices, self.n_experts, min(capacity, choices.size))
        ctx.record("router_dropped", (dispatch.slot == dispatch.n_slots).mean())
        return dispatch

    def record(self, logits: mx.array, p: mx.array, choice: mx.array, ctx: Ctx) -> None:
        """Record the two auxiliary losses and the load (1: balanced) of the router; logits, p (N, E), choice (N, k)."""
        load = self.n_experts * (choice[..., None] == mx.arange(self.n_experts)).mean((0, 1))
        ctx.record("router_balance", (load * p.mean(0)).sum(), self.balance_weight)  # Switch, eq. 4
        ctx.record("router_z", mx.logsumexp(logits, axis=-1).square().mean(), self.router_z_weight)  # 2202.08906, eq. 5
        ctx.record("router_most_load", load.max())
        ctx.record("router_least_load", load.min())


class Switch(MixtureOfExperts):
    """Top-1 experts, weighted by their probability among all (Fedus et al. 2021, arXiv 2101.03961, sec. 2.1).

    A weight normalized to 1 would give the router no gradient.
    """

    def gates(self, p: mx.array) -> mx.array:
        return p


class SwiGLUMixture(MixtureOfExperts):
    """MixtureOfExperts whose experts are SwiGLUs: Mixtral's (Jiang et al. 2024, arXiv 2401.04088, sec. 2.1)."""

    Experts = SwiGLUExperts


class ReLUSquaredMixture(MixtureOfExperts):
    """MixtureOfExperts whose experts are `ReLUSquaredExperts`."""

    Experts = ReLUSquaredExperts


@dataclass(frozen=True)
class Dispatch:
    """Assignment of choices (A,) to slots, in groups of `size` slots of one expert; an empty slot computes zeros."""

    slot: mx.array  # (A,) slot of each choice; n_slots: dropped
    groups: int
    size: int
    expert_ids: mx.array | None  # (groups,) expert of each group, ascending; None: group g belongs to expert g

    @property
    def n_slots(self) -> int:
        return self.groups * self.size

    def scatter(self, tokens: mx.array) -> mx.array:
        """Copy tokens (N, D) to their slots (groups, size, D); choice a belongs to token a mod N."""
        token = mx.full((self.n_slots + 1,), len(tokens))
        token[self.slot] = mx.arange(self.slot.size) % len(tokens)
        return ops.gather_rows(_and_zeros(tokens), token[:-1]).reshape(self.groups, self.size, -1)

    def gather(self, outputs: mx.array) -> mx.array:
        """Return each choice's output (A, D) from those of all slots (groups, size, D); zeros if it was dropped."""
        return ops.gather_rows(_and_zeros(outputs.flatten(0, 1)), self.slot)


def capacity_dispatch(choices: mx.array, n_experts: int, capacity: int) -> Dispatch:
    """Assign choices (A,) to `capacity` slots per expert; choices over capacity are dropped."""
    rank, _ = _ranks(choices, n_experts)
    slot = mx.where(rank < capacity, choices * capacity + rank, n_experts * capacity)
    return Dispatch(slot, n_experts, capacity, None)


def dropless_dispatch(choices: mx.array, n_experts: int) -> Dispatch:
    """Assign choices (A,) to as many groups per expert as it needs; at most size - 1 slots per expert are empty."""
    rank, load = _ranks(choices, n_experts)
    size = max(1, min(_MAX_GROUP, choices.size // (2 * n_experts)))
    needed = (load + size - 1) // size
    ends = mx.cumsum(needed)
    groups = (choices.size + n_experts * (size - 1)) // size  # enough for any choices
    expert_ids = mx.minimum((mx.arange(groups)[:, None] >= ends).sum(-1), n_experts - 1)
    return Dispatch((ends - needed)[choices] * size + rank, groups, size, expert_ids)


def _ranks(choices: mx.array, n_experts: int) -> tuple[mx.array, mx.array]:
    """Return the number of equal choices before each (A,), and the number of choices per expert (n_experts,)."""
    same = (choices[:, None] == mx.arange(n_experts)).astype(mx.int32)
    before = mx.cumsum(same, axis=0) - same
    return mx.take_along_axis(before, choices[:, None], axis=1)[:, 0], same.sum(0)


def _and_zeros(x: mx.array) -> mx.array:
    """Append a row of zeros, the target of index len(x)."""
    return mx.concatenate([x, mx.zeros_like(x[:1])])
