"""Tensor parallel: each rank has some heads of every attention and some hidden units of every feed-forward part.

Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, sec. 3): the maps into a part are sliced by rows, the map out of it
by columns, and the outputs of the ranks are added up; the gradients of the inputs as well. All else, the embedding and
the head too, is computed by every rank alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import mlx.core as mx
from mlx import nn, optimizers
from mlx.utils import tree_map, tree_unflatten

from mlx_transformer.nn.attention import Attention, FusedAttention, GroupedAttention, QKNorm, ValueEmbedding
from mlx_transformer.nn.block import Block
from mlx_transformer.nn.depth import MixtureOfDepths
from mlx_transformer.nn.feedforward import FeedForward, GatedFeedForward, HalfWidth
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.position import ALiBi, T5Position
from mlx_transformer.nn.relative import ShawAttention, TransformerXLAttention
from mlx_transformer.nn.sparse import LongformerAttention, SparseAttention, WindowAttention
from mlx_transformer.train.optim.clip import AGC
from mlx_transformer.train.optim.groups import AdamW, Arrays, Group, UpdateRule, assign
from mlx_transformer.train.optim.lion import Lion
from mlx_transformer.train.optim.sophia import Sophia
from mlx_transformer.train.parallel import Ranks
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.split import Split
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path

_SUMMED = ("o_proj", "down_proj")  # maps whose outputs are added up over the ranks
# The axis of each parameter along which heads or hidden units are laid out; None: all heads share it.
_AXES = {
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "r_proj", "content_bias", "position_bias", "up_proj", "gate_proj"), 0
    ),
    **dict.fromkeys((*_SUMMED, "value_embedding"), 1),
    **dict.fromkeys(("q_norm", "k_norm", "relative_keys", "relative_values")),
}
_ATTENTION = (
    *(Attention, GroupedAttention, FusedAttention, QKNorm, ValueEmbedding, ShawAttention, TransformerXLAttention),
    *(WindowAttention, LongformerAttention, SparseAttention),
)
_KNOWN = {*_ATTENTION, FeedForward, GatedFeedForward, HalfWidth, nn.Module, dict, object}
_ELEMENTWISE = (AdamW, Lion, Sophia)  # optimizers that update a slice as they do the whole


class TensorSplit(Split):
    """A model of which each rank has slices of the matrices. Raises BadInput as `check_tensor` does."""

    def __init__(self, model: Model, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        check_tensor(model, ranks.size)
        self._before: list[tuple[nn.Module, dict[str, Any]]] = []  # what `join` restores
        partial = []
        for path, part in _split_parts(model):
            for name, value in by_path(part.parameters()).items():
                axis = _AXES[name.partition(".")[0]]
                if axis is None:
                    partial.append(f"{path}.{name}")
                elif axis < value.ndim:  # a bias behind the sum is added by every rank
                    self.axes[f"{path}.{name}"] = axis
            self._take_part(part)
        if isinstance(model.position, T5Position):
            self.axes["position.weight"] = 1
        self.partial = frozenset(partial)
        whole = by_path(model.parameters())
        for path, axis in self.axes.items():  # one after the other: no more than one is whole in memory
            own = self.own_slice(whole.pop(path), axis)
            model.update(tree_unflatten([(path, own)]))
            mx.eval(own)

    def _take_part(self, part: nn.Module) -> None:
        """Let a part sum over the ranks: the gradient of its input, and its output."""
        kept: dict[str, Any] = {"__class__": part.__class__, **{name: part[name] for name in _SUMMED if name in part}}
        for name in _SUMMED:
            if name in part:
                part[name] = SummedLinear(part[name], self.ranks.sum)
                kept[name].update(tree_map(lambda _: mx.zeros(()), kept[name].parameters()))  # it holds no weights
        if isinstance(part, Attention):
            kept["n_heads"] = part.n_heads
            part.n_heads //= self.ranks.size
        part.__class__ = type(part.__class__.__name__, (_OfRank, part.__class__), {})
        part._sum_gradients = _summing_gradients(self.ranks.sum)
        self._before.append((part, kept))

    def groups(self, recipe: Recipe) -> Sequence[Group]:
        check_clip(recipe)
        paths = assign(recipe.groups, by_path(self.model.trainable_parameters()))
        groups = []
        for group in recipe.groups:
            sliced = self.axes.keys() & paths[group.name]
            if sliced and not isinstance(group.optimizer, _ELEMENTWISE):
                self.whole_states |= sliced
                group = replace(group, optimizer=_OfWhole(rule=group.optimizer, split=self))
            groups.append(group)
        return groups

    def join_all(self, arrays: Arrays) -> Arrays:
        """Return the arrays by path, and whole where each rank has a slice."""
        sliced = {path: value for path, value in arrays.items() if path in self.axes}
        return arrays | (self.ranks.join_slices(sliced, self.axes) if sliced else {})

    def restore_parts(self) -> None:
        for part, kept in self._before:
            for name, value in kept.items():
                setattr(part, name, value)


class _OfRank(nn.Module):
    """The first base class of a part of which each rank has some heads or hidden units."""

    def __call__(self, x: mx.array, ctx: Any) -> mx.array:
        return super().__call__(self._sum_gradients(x), ctx)


class SummedLinear(nn.Module):
    """y = sum over the ranks of x W^T, + b: x (..., d_in / N) -> (..., d_out), the same on every rank."""

    def __init__(self, linear: nn.Linear, add: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self.weight, self.add = linear.weight, add
        if "bias" in linear:
            self.bias = linear.bias

    def __call__(self, x: mx.array) -> mx.array:
        y = self.add(x @ self.weight.T)
        return y + self.bias if "bias" in self else y


def _summing_gradients(add: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """Return the identity whose gradient is summed over the ranks, as mlx.nn's `sum_gradients`, on a stream of ours."""

    @mx.custom_function
    def identity(x: mx.array) -> mx.array:
        return x

    @identity.vjp
    def gradient(x: mx.array, dx: mx.array, _: mx.array) -> mx.array:
        return add(dx)

    return lambda x: identity(x)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class _OfWhole(UpdateRule):
    """A rule that needs whole matrices: every rank joins the slices of all, and keeps its slice of what `rule` returns.

    The state of `rule` is that of the whole matrices, on every rank.
    """

    rule: UpdateRule
    split: TensorSplit

    def make(self) -> optimizers.Optimizer:
        return self.rule.make()

    def start(self, optimizer: optimizers.Optimizer, parameters: Arrays) -> Arrays:
        whole = self.split.join_all(parameters)
        for path, value in whole.items():
            optimizer.state[path] = {}
            optimizer.init_single(value, optimizer.state[path])
        return self._own(self.rule.start(optimizer, whole))

    def update(self, optimizer: optimizers.Optimizer, gradients: Arrays, parameters: Arrays) -> Arrays:
        weights = self.split.join_all({path: parameters[path] for path in gradients})
        return self._own(self.rule.update(optimizer, self.split.join_all(gradients), weights))

    def wants_curvature(self, optimizer: optimizers.Optimizer) -> bool:
        return self.rule.wants_curvature(optimizer)

    def observe(self, optimizer: optimizers.Optimizer, gradients: Arrays, targets: int) -> None:
        self.rule.observe(optimizer, self.split.join_all(gradients), targets)

    def wants_rewiring(self, optimizer: optimizers.Optimizer) -> bool:
        return self.rule.wants_rewiring(optimizer)

    def rewire(self, optimizer: optimizers.Optimizer, gradients: Arrays, parameters: Arrays) -> Arrays:
        weights = self.split.join_all({path: parameters[path] for path in gradients})
        return self._own(self.rule.rewire(optimizer, self.split.join_all(gradients), weights))

    def _own(self, arrays: Arrays) -> Arrays:
        return {path: self.split.own_slice(value, self.split.axes.get(path)) for path, value in arrays.items()}


def check_clip(recipe: Recipe) -> None:
    """Raise BadInput for a clipping that needs whole matrices."""
    if isinstance(recipe.clip, AGC):
        raise BadInput("--shard tensor: AGC clips by whole rows of matrices; take a recipe with another clipping")


def check_tensor(model: Model, size: int) -> None:
    """Raise BadInput for a model that cannot be split over so many ranks: by its parts, or by its numbers."""
    if isinstance(model.position, ALiBi):
        raise BadInput(f"--shard tensor: {_name(model.position)} numbers the heads; take another position")
    if any(isinstance(part, MixtureOfDepths) for part in model.modules()):
        raise BadInput("--shard tensor: MixtureOfDepths chooses tokens, other ones after other rounding errors")
    for _, part in _split_parts(model):
        kinds = type(part).__mro__
        own = {name.partition(".")[0] for name in by_path(part.parameters())}
        if not isinstance(part, (Attention, FeedForward)) or any(map(_has_code, kinds)) or own - _AXES.keys():
            raise BadInput(
                f"--shard tensor: {_name(part)} cannot be split over ranks, only attention by heads and feed-forward "
                "layers by hidden units: take --shard pipeline or data parallel"
            )
        counts = (
            {"d_ff": by_path(part.parameters())["up_proj.weight"].shape[0]}
            if isinstance(part, FeedForward)
            else {"n_heads": part.n_heads, "n_kv_heads": part.k_proj.weight.shape[0] // part.head_dim}
        )
        for name, count in counts.items():
            if count % size:
                raise BadInput(
                    f"--shard tensor: {name} = {count} cannot be divided among {size} ranks: give a multiple of {size}"
                )


def _split_parts(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path of each mixer and feed-forward part, and the part."""
    for path, block in model.named_modules():
        if isinstance(block, Block):
            yield f"{path}.mixer", block.mixer
            yield f"{path}.ffn", block.ffn


def _has_code(kind: type) -> bool:
    """Whether a class, other than those known here, has methods of its own; an activation is a staticmethod."""
    return kind not in _KNOWN and any(isinstance(v, (FunctionType, classmethod, property)) for v in vars(kind).values())


def _name(part: nn.Module) -> str:
    return type(part).__name__
