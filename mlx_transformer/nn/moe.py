"""Mixture of experts: several feed-forward parts, of which a router gives each token to a few."""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.feedforward import Activation
from mlx_transformer.nn.linear import Linear
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path

_GROUP = 64  # rows of a group at most, where none is dropped


class StackedLinear(nn.Module):
    """Linear maps without a bias, one for each expert: weight (E, d_out, d_in)."""

    def __init__(self, n_experts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = mx.zeros((n_experts, d_out, d_in))

    def __call__(self, x: mx.array, expert_ids: mx.array | None) -> mx.array:
        """x (G, C, d_in) -> (G, C, d_out): group g goes to the expert owners[g], ascending; None: to expert g."""
        weight = self.weight.swapaxes(-1, -2)
        return x @ weight if expert_ids is None else ops.gather_matmul(x, weight, expert_ids)


class Experts(nn.Module):
    """n_experts feed-forward parts of width d_ff, without biases: (G, C, D) -> (G, C, D), owners as above."""

    activation: Activation = staticmethod(ops.gelu_tanh)  # slot

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.build(config)

    def build(self, config: Any) -> None:
        """Make the parts; variants extend this."""
        self.up_proj = StackedLinear(config.n_experts, config.d_model, config.d_ff)
        self.down_proj = StackedLinear(config.n_experts, config.d_ff, config.d_model)

    def activate(self, x: mx.array, expert_ids: mx.array | None) -> mx.array:
        """x (G, C, D) -> the hidden layer (G, C, d_ff)."""
        return self.activation(self.up_proj(x, expert_ids))

    def __call__(self, x: mx.array, expert_ids: mx.array | None) -> mx.array:
        return self.down_proj(self.activate(x, expert_ids), expert_ids)


class MixtureOfExperts(nn.Module):
    """Each token goes to experts_per_token of n_experts, weighted by the router: x (B, L, D) -> (B, L, D).

    GLaM (Du et al. 2021, arXiv 2112.06905, sec. 3), with two experts per token.
    In training an expert takes `capacity_factor` times its fair share of the choices, first choices before second ones,
    earlier rows before later ones, and what exceeds it is dropped, so that no shape depends on the choices (GShard:
    Lepikhin et al. 2020, arXiv 2006.16668, sec. 2.2). Evaluation drops nothing: there a token's logits do not depend on
    where others went. The router computes in float32; its losses and its load go to the ledger.

    Differs from GLaM: every layer has experts, not every other one. Raises BadInput for more experts_per_token than
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
        """How many a token does not use."""
        total = sum(w.size for w in by_path(self.experts.parameters()).values())
        return total // self.n_experts * (self.n_experts - self.per_token)

    def __call__(self, x: mx.array, ctx: Ctx) -> mx.array:
        rows = x.flatten(0, -2)
        logits = self.router_proj(rows.astype(mx.float32))
        p = mx.softmax(logits, axis=-1)
        choice = mx.argsort(-mx.stop_gradient(p), axis=-1)[:, : self.per_token]
        seats = self.seat(choice.T.flatten(), ctx)  # all first choices, then all second ones
        self.record(logits, p, choice, ctx)
        shares = self.shares(mx.take_along_axis(p, choice, axis=-1)).T.astype(x.dtype)
        made = seats.back(self.experts(seats.fill(rows), seats.expert_ids))
        return (shares.flatten()[:, None] * made).reshape(self.per_token, *x.shape).sum(0)

    def shares(self, p: mx.array) -> mx.array:
        """Probabilities of the chosen experts (N, k) -> their shares in the output, which sum to 1."""
        return p / p.sum(-1, keepdims=True)

    def seat(self, choices: mx.array, ctx: Ctx) -> "Dispatch":
        """Where each choice (A,), the number of an expert, is computed."""
        if not self.training:
            return dropless_dispatch(choices, self.n_experts)
        capacity = math.ceil(self.capacity_factor * choices.size / self.n_experts)
        seats = capacity_dispatch(choices, self.n_experts, min(capacity, choices.size))
        ctx.record("router_dropped", (seats.number == seats.count).mean())
        return seats

    def record(self, logits: mx.array, p: mx.array, choice: mx.array, ctx: Ctx) -> None:
        """The two losses of the router and its load, where 1 is a fair share: logits, p (N, E), choice (N, k)."""
        load = self.n_experts * (choice[..., None] == mx.arange(self.n_experts)).mean((0, 1))
        ctx.record("router_balance", (load * p.mean(0)).sum(), self.balance_weight)  # Switch, eq. 4
        ctx.record("router_z", mx.logsumexp(logits, axis=-1).square().mean(), self.router_z_weight)  # 2202.08906, eq. 5
        ctx.record("router_most_load", load.max())
        ctx.record("router_least_load", load.min())


class Switch(MixtureOfExperts):
    """One expert for each token, weighted by its probability among all (Fedus et al. 2021, arXiv 2101.03961, sec. 2.1).

    A share of 1, which the only chosen expert would have otherwise, would leave the router without a gradient.
    """

    def shares(self, p: mx.array) -> mx.array:
        return p


@dataclass(frozen=True)
class Dispatch:
    """Choices (A,) in groups of `size` seats, each group of one expert; an empty seat computes zeros."""

    number: mx.array  # (A,) of each choice's seat; `count`: dropped
    groups: int
    size: int
    expert_ids: mx.array | None  # (groups,) the expert of each group; None: as many groups as experts, in their order

    @property
    def count(self) -> int:
        return self.groups * self.size

    def fill(self, rows: mx.array) -> mx.array:
        """Tokens (N, D), which choose in turn, -> (groups, size, D)."""
        token = mx.full((self.count + 1,), len(rows))
        token[self.number] = mx.arange(self.number.size) % len(rows)
        return _and_zeros(rows)[token[:-1]].reshape(self.groups, self.size, -1)

    def back(self, made: mx.array) -> mx.array:
        """(groups, size, D) -> what each choice's seat holds (A, D), zeros where it was dropped."""
        return _and_zeros(made.flatten(0, 1))[self.number]


def capacity_dispatch(choices: mx.array, n_experts: int, capacity: int) -> Dispatch:
    """So many seats for each expert; who comes later is dropped."""
    place, _ = _queue(choices, n_experts)
    number = mx.where(place < capacity, choices * capacity + place, n_experts * capacity)
    return Dispatch(number, n_experts, capacity, None)


def dropless_dispatch(choices: mx.array, n_experts: int) -> Dispatch:
    """As many groups for each expert as it needs: at most size - 1 seats of each expert stay empty."""
    place, load = _queue(choices, n_experts)
    size = max(1, min(_GROUP, choices.size // (2 * n_experts)))
    needed = (load + size - 1) // size
    ends = mx.cumsum(needed)
    groups = (choices.size + n_experts * (size - 1)) // size  # enough, however the choices fall
    expert_ids = mx.minimum((mx.arange(groups)[:, None] >= ends).sum(-1), n_experts - 1)
    return Dispatch((ends - needed)[choices] * size + place, groups, size, expert_ids)


def _queue(choices: mx.array, n_experts: int) -> tuple[mx.array, mx.array]:
    """Of each choice (A,) how many before it are the same, and how many there are of each (n_experts,)."""
    same = (choices[:, None] == mx.arange(n_experts)).astype(mx.int32)
    before = mx.cumsum(same, axis=0) - same
    return mx.take_along_axis(before, choices[:, None], axis=1)[:, 0], same.sum(0)


def _and_zeros(rows: mx.array) -> mx.array:
    return mx.concatenate([rows, mx.zeros_like(rows[:1])])
