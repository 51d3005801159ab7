"""Which optimizer owns which parameter: a table of groups in which every parameter has exactly one place."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
from mlx import optimizers

from mlx_transformer.utils.trees import Tree, by_path

Arrays = dict[str, mx.array]  # by path


class Selector(Protocol):
    """Which parameters a group takes."""

    def __call__(self, path: str, parameter: mx.array) -> bool: ...


@dataclass(frozen=True)
class Matrices:
    """Every parameter of two or more axes: linear maps, the embedding, the head."""

    def __call__(self, path: str, parameter: mx.array) -> bool:
        return parameter.ndim >= 2


@dataclass(frozen=True)
class Vectors:
    """Every parameter of fewer than two axes: biases, gains, scalars."""

    def __call__(self, path: str, parameter: mx.array) -> bool:
        return parameter.ndim < 2


@dataclass(frozen=True)
class Paths:
    """Every parameter whose whole path matches a regular expression."""

    pattern: str

    def __call__(self, path: str, parameter: mx.array) -> bool:
        return re.fullmatch(self.pattern, path) is not None


@dataclass(frozen=True, kw_only=True)
class UpdateRule(ABC):
    """The numbers of an optimizer, and how it updates parameters."""

    weight_decay: float = 0.0  # decoupled: each step takes away this share of the weights, times the learning rate

    @abstractmethod
    def make(self) -> optimizers.Optimizer:
        """The optimizer, which holds the state; its learning rate is set at every step."""

    def update(self, optimizer: optimizers.Optimizer, gradients: Arrays, parameters: Arrays) -> Arrays:
        """The new parameters, of those that have a gradient here: one by one; an heir may take several at once."""
        return {
            path: optimizer.apply_single(gradient, parameters[path], optimizer.state[path])
            for path, gradient in gradients.items()
        }

    def wants_curvature(self, optimizer: optimizers.Optimizer) -> bool:
        """Whether the coming step is to be preceded by a look at the curvature, which `observe` then takes in."""
        return False

    def observe(self, optimizer: optimizers.Optimizer, gradients: Arrays, targets: int) -> None:
        """Gradients of the mean loss over so many targets, each drawn from what the model predicts in its place."""
        return  # most rules do not look


@dataclass(frozen=True, kw_only=True)
class AdamW(UpdateRule):
    """Adam with bias correction (Kingma & Ba 2015, alg. 1) and decoupled decay (Loshchilov & Hutter 2019, alg. 2).

    mlx.optimizers does the work; its bias correction is off by default and on here.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def make(self) -> optimizers.Optimizer:
        return optimizers.AdamW(0.0, list(self.betas), self.eps, self.weight_decay, bias_correction=True)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One row of the table: the parameters it takes and their optimizer."""

    name: str
    select: Selector
    optimizer: UpdateRule
    lr_multiplier: Any = 1.0  # times the recipe's learning rate
    optional: bool = False  # a model may have no such parameter, as one with a tied head has no matrix of its own


class Optimizers:
    """The optimizers of a model's parameters, one for each group.

    Raises ValueError if a parameter falls into no group or into several, or if a group that is not optional is empty.
    """

    def __init__(self, groups: Sequence[Group], parameters: Tree) -> None:
        flat = by_path(parameters)
        self.groups = groups
        self.paths = assign(groups, flat)
        self.optimizers = [group.optimizer.make() for group in groups]
        for group, optimizer in zip(groups, self.optimizers, strict=True):
            optimizer.init({path: flat[path] for path in self.paths[group.name]})

    def advance(self, learning_rate: mx.array) -> None:
        """Begin a step at the schedule's learning rate, a scalar."""
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            optimizer.learning_rate = learning_rate * group.lr_multiplier
            optimizer.state["step"] = optimizer.step + 1

    def update(self, gradients: Arrays, parameters: Arrays) -> Arrays:
        """The new parameters by path, of those that have a gradient here: all of them, or a stream's share."""
        new: Arrays = {}
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            own = {path: gradients[path] for path in self.paths[group.name] if path in gradients}
            new |= group.optimizer.update(optimizer, own, parameters)
        return new

    def want_curvature(self) -> bool:
        """Whether any of them wants it before the coming step."""
        pairs = zip(self.groups, self.optimizers, strict=True)
        return any(group.optimizer.wants_curvature(optimizer) for group, optimizer in pairs)

    def observe(self, gradients: Arrays, targets: int) -> None:
        """Hand every optimizer the gradients by path, all or a stream's share, for its curvature (see `UpdateRule`)."""
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            own = {path: gradients[path] for path in self.paths[group.name] if path in gradients}
            group.optimizer.observe(optimizer, own, targets)

    @property
    def state(self) -> list[dict[str, Any]]:
        """Everything the optimizers remember, for the compiled step and the checkpoint."""
        return [optimizer.state for optimizer in self.optimizers]

    @state.setter
    def state(self, state: list[dict[str, Any]]) -> None:
        for optimizer, own in zip(self.optimizers, state, strict=True):
            optimizer.state = own


def assign(groups: Sequence[Group], parameters: Arrays) -> dict[str, list[str]]:
    """Group name -> the paths it owns. By path, not by count: a sum is right too with one missing and one twice.

    Raises ValueError for a parameter in no group or in two, and for a group without any that is not optional.
    """
    owners = {
        path: [group.name for group in groups if group.select(path, parameter)]
        for path, parameter in parameters.items()
    }
    for path, names in owners.items():
        if len(names) != 1:
            raise ValueError(
                f"parameter '{path}' falls into {names or 'no group'}, expected exactly one optimizer group"
            )
    paths = {group.name: [path for path, names in owners.items() if names == [group.name]] for group in groups}
    for group in groups:
        if not (paths[group.name] or group.optional):
            raise ValueError(f"optimizer group '{group.name}' has no parameter")
    return paths
