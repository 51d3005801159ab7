"""Optimizer groups: a table that assigns each parameter to exactly one optimizer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
from mlx import optimizers

from mlx_transformer.ops.fastmath import fence
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import Tree, by_path

Arrays = dict[str, mx.array]  # by path


class Selector(Protocol):
    """A rule that selects a group's parameters."""

    def __call__(self, path: str, parameter: mx.array) -> bool:
        """Whether the group takes the parameter with this dotted path."""


@dataclass(frozen=True)
class Matrices:
    """Selects parameters of two or more axes (linear maps, the embedding, the head) but those that `but` selects."""

    but: tuple[Selector, ...] = ()

    def __call__(self, path: str, parameter: mx.array) -> bool:
        return parameter.ndim >= 2 and not any(select(path, parameter) for select in self.but)


@dataclass(frozen=True)
class Vectors:
    """Selects parameters of fewer than two axes: biases, gains, scalars."""

    def __call__(self, path: str, parameter: mx.array) -> bool:
        return parameter.ndim < 2


@dataclass(frozen=True)
class Paths:
    """Selects parameters whose whole path matches a regular expression."""

    pattern: str

    def __call__(self, path: str, parameter: mx.array) -> bool:
        return re.fullmatch(self.pattern, path) is not None


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """An optimizer's hyperparameters and its update equation.

    A subclass, a frozen dataclass if it has hyperparameters, overrides either `apply` (and `init`, if it keeps state)
    or `make`, to take an optimizer of mlx.optimizers.
    """

    weight_decay: float = 0.0  # decoupled: a step subtracts learning rate * weight_decay * weight

    def init(self, parameter: mx.array) -> Arrays:
        """Return the state of one parameter before the first step, by name."""
        return {}

    def apply(self, gradient: mx.array, parameter: mx.array, state: Arrays, learning_rate: mx.array) -> mx.array:
        """Return the new value of one parameter; change the state in place."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither apply nor make")

    def divides(self, parameter: mx.array) -> bool:
        """Whether its rows, along the first axis, may be updated apart, with a state of the same rows."""
        return False

    def make(self) -> optimizers.Optimizer:
        """Make the optimizer, which holds the state; its learning rate is set before each step."""
        return _Optimizer(self)

    def start(self, optimizer: optimizers.Optimizer, parameters: Arrays) -> Arrays:
        """Extend the new optimizer's state; return the parameters that change before the first step."""
        return {}

    def update(self, optimizer: optimizers.Optimizer, gradients: Arrays, parameters: Arrays) -> Arrays:
        """Return the new value of each parameter that has a gradient; a subclass may update several at once."""
        return {
            path: optimizer.apply_single(gradient, parameters[path], optimizer.state[path])
            for path, gradient in gradients.items()
        }

    def wants_curvature(self, optimizer: optimizers.Optimizer) -> bool:
        """Whether `observe` is to be called before the next step."""
        return False

    def observe(self, optimizer: optimizers.Optimizer, gradients: Arrays, targets: int) -> None:
        """Take in gradients of the mean loss over `targets` tokens sampled from the model's predictions."""
        return  # most rules do not use the curvature

    def wants_rewiring(self, optimizer: optimizers.Optimizer) -> bool:
        """Whether `rewire` is to be called before the next step."""
        return False

    def rewire(self, optimizer: optimizers.Optimizer, gradients: Arrays, parameters: Arrays) -> Arrays:
        """Return new values of parameters, outside of the compiled step; gradients: of the next batch."""
        return {}


class _Optimizer(optimizers.Optimizer):
    """The optimizer of a rule that has its equation in `apply`, or in `update`."""

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self.rule, self.learning_rate = rule, 0.0

    def init_single(self, parameter: mx.array, state: Arrays) -> None:
        state.update(self.rule.init(parameter))

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Arrays) -> mx.array:
        return self.rule.apply(gradient, parameter, state, self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class AdamW(UpdateRule):
    """Adam with bias correction (Kingma & Ba 2015, alg. 1) and decoupled decay (Loshchilov & Hutter 2019, alg. 2).

    Equal to mlx.optimizers.AdamW with bias correction, which computes the powers of the betas for every element.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def init(self, parameter: mx.array) -> Arrays:
        return {"m": mx.zeros_like(parameter), "v": mx.zeros_like(parameter)}

    def divides(self, parameter: mx.array) -> bool:
        return parameter.ndim >= 2

    def update(self, optimizer: optimizers.Optimizer, gradients: Arrays, parameters: Arrays) -> Arrays:
        (b1, b2), lr, step = self.betas, optimizer.learning_rate, optimizer.step
        scale, root = fence(lr / (1 - b1**step)), fence(mx.rsqrt(1 - b2**step))
        new: Arrays = {}
        for path, gradient in gradients.items():
            state, weight = optimizer.state[path], parameters[path]
            m = state["m"] = b1 * state["m"] + (1 - b1) * gradient
            v = state["v"] = b2 * state["v"] + (1 - b2) * mx.square(gradient)
            new[path] = weight * (1 - lr * self.weight_decay) - scale * m / (mx.sqrt(v) * root + self.eps)
        return new


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share an optimizer and its hyperparameters."""

    name: str
    select: Selector
    optimizer: UpdateRule
    lr_multiplier: Any = 1.0  # of the recipe's learning rate
    optional: bool = False  # may select nothing, as a head's group in a model with a tied head


class Optimizers:
    """The optimizers of a model's parameters, one for each group. Raises BadInput as `assign` does.

    own: of several ranks, the parameters, or rows of them, that this one updates; None: all.
    """

    def __init__(self, groups: Sequence[Group], parameters: Tree, own: Arrays | None = None) -> None:
        flat = by_path(parameters)
        self.groups = groups
        self.paths = assign(groups, flat)
        if own is not None:
            flat = own
            self.paths = {name: [path for path in paths if path in own] for name, paths in self.paths.items()}
        self.optimizers = [group.optimizer.make() for group in groups]
        for group, optimizer in zip(groups, self.optimizers, strict=True):
            optimizer.init({path: flat[path] for path in self.paths[group.name]})

    def start(self, parameters: Arrays) -> Arrays:
        """Let each rule extend its optimizer's new state; return the parameters that change before the first step."""
        new: Arrays = {}
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            new |= group.optimizer.start(optimizer, {path: parameters[path] for path in self.paths[group.name]})
        return new

    def advance(self, learning_rate: mx.array) -> None:
        """Begin a step at this learning rate, a scalar."""
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            optimizer.learning_rate = learning_rate * group.lr_multiplier
            optimizer.state["step"] = optimizer.step + 1

    def update(self, gradients: Arrays, parameters: Arrays) -> Arrays:
        """Return the new value of each parameter that has a gradient, by path: all, or one stream's share."""
        new: Arrays = {}
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            own = {path: gradients[path] for path in self.paths[group.name] if path in gradients}
            new |= group.optimizer.update(optimizer, own, parameters)
        return new

    def want_curvature(self) -> bool:
        """Whether any optimizer needs `observe` before the next step."""
        pairs = zip(self.groups, self.optimizers, strict=True)
        return any(group.optimizer.wants_curvature(optimizer) for group, optimizer in pairs)

    def observe(self, gradients: Arrays, targets: int) -> None:
        """Pass gradients by path, all or one stream's share, to `UpdateRule.observe` of their optimizers."""
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            own = {path: gradients[path] for path in self.paths[group.name] if path in gradients}
            group.optimizer.observe(optimizer, own, targets)

    def want_rewiring(self) -> bool:
        """Whether any optimizer needs `rewire` before the next step."""
        pairs = zip(self.groups, self.optimizers, strict=True)
        return any(group.optimizer.wants_rewiring(optimizer) for group, optimizer in pairs)

    def rewire(self, gradients: Arrays, parameters: Arrays) -> Arrays:
        """Return the parameters that change where a rule wants rewiring, from the gradients of all parameters."""
        new: Arrays = {}
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            if group.optimizer.wants_rewiring(optimizer):
                own = {path: gradients[path] for path in self.paths[group.name]}
                new |= group.optimizer.rewire(optimizer, own, parameters)
        return new

    @property
    def state(self) -> list[dict[str, Any]]:
        """The state of all optimizers, for the compiled step and the checkpoint."""
        return [optimizer.state for optimizer in self.optimizers]

    @state.setter
    def state(self, state: list[dict[str, Any]]) -> None:
        for optimizer, own in zip(self.optimizers, state, strict=True):
            optimizer.state = own


def assign(groups: Sequence[Group], parameters: Arrays) -> dict[str, list[str]]:
    """Return the paths of each group's parameters, by the group's name.

    Raises BadInput for a parameter in no group or in several, for two groups of one name, and for a group without
    parameters that is not optional.
    """
    if repeated := [group.name for i, group in enumerate(groups) if group.name in {g.name for g in groups[:i]}]:
        raise BadInput(f"two optimizer groups are called '{repeated[0]}': give each a name of its own")
    paths: dict[str, list[str]] = {group.name: [] for group in groups}
    for path, parameter in parameters.items():
        names = [group.name for group in groups if group.select(path, parameter)]
        if len(names) != 1:
            where = " and ".join(f"'{name}'" for name in names) or "none"
            raise BadInput(f"parameter '{path}' must be in one optimizer group, and is in {where}: change a selector")
        paths[names[0]].append(path)
    for group in groups:
        if not (paths[group.name] or group.optional):
            raise BadInput(f"optimizer group '{group.name}' has no parameter: remove it, or make it optional=True")
    return paths
