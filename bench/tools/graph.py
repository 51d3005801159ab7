"""Graphs of MLX, read without computing them: primitives, shapes and dtypes.

MLX exposes a graph in two ways. `mx.export_to_dot` names the primitives of any lazy array, compiled functions included
(`labels`). `mx.export_function` also gives shapes and dtypes (`trace`), but not through `mx.custom_function`, and on a
CPU it expands the `mx.fast` kernels; stand-ins replace both while a graph is traced.
"""

import functools
import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_transformer.nn.model import Model
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.step import TrainingStep

# Our own, of mlx_transformer/backend/primitives.cpp and scan.cpp.
FOR_A_CPU = frozenset(
    {
        "CpuAttention",
        "CpuAttentionGradient",
        "CpuAttentionOfOne",
        "CpuCrossEntropy",
        "CpuLayerNorm",
        "CpuLayerNormGradient",
        "CpuRMSNorm",
        "CpuRMSNormGradient",
        "CpuSelectiveScan",
        "CpuSelectiveScanGradient",
    }
)
_SUM = {"Scatter": 2, "ScatterAxis": 0}  # the reduction's number among a primitive's arguments (mlx/primitives.h)
# Their eval_gpu raises (MLX 0.32, mlx/backend/metal/primitives.cpp; our primitives.cpp).
NO_METAL_KERNEL = FOR_A_CPU | {"LUF", "QRF", "SVD", "Inverse", "Cholesky", "Eig", "Eigh", "Load"}


@dataclass(frozen=True)
class Array:
    """Shape and dtype of a lazy array."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


@dataclass
class Node:
    """A primitive with the names of its input and output arrays."""

    primitive: str
    inputs: list[str]
    outputs: list[str]
    arguments: list[Any] = field(default_factory=list)


@dataclass
class Graph:
    """Nodes in topological order; arrays that no node makes are inputs and constants."""

    arrays: dict[str, Array]
    nodes: list[Node]
    results: list[str]

    @functools.cached_property
    def maker(self) -> dict[str, Node]:
        """The node that makes each array."""
        return {name: node for node in self.nodes for name in node.outputs}

    def unsupported(self) -> list[str]:
        """List what Metal cannot run: primitives without a kernel, and those that use float64."""
        wide = {
            n.primitive for n in self.nodes if any(self.arrays[a].dtype == mx.float64 for a in n.inputs + n.outputs)
        }
        missing = {n.primitive for n in self.nodes} & NO_METAL_KERNEL
        return sorted(missing) + [f"float64 in {name}" for name in sorted(wide)]

    def float_scatters(self) -> list[Array]:
        """List the results of scatters that add floats, which a GPU adds in the order in which its threads arrive."""
        found = [n for n in self.nodes if n.primitive in _SUM and n.arguments[0] == _SUM[n.primitive]]
        arrays = [self.arrays[n.outputs[0]] for n in found]
        return [array for array in arrays if mx.issubdtype(array.dtype, mx.floating)]


def labels(*arrays: mx.array) -> list[str]:
    """List the primitives of lazy arrays as they would run; a kernel fused by `mx.compile` is one `Compiled...`."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return re.findall(r'label ="(\w+)', text.getvalue())


@contextmanager
def on_metal() -> Iterator[None]:
    """Make our code build the graphs of a Mac's GPU: without the forms and streams for a CPU."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(("mlx_transformer", "phases")) and hasattr(module, "on_linux_cpu"):
                stack.enter_context(patch.object(module, "on_linux_cpu", lambda: False))
        stack.enter_context(
            patch("mlx_transformer.backend.cpu_streams.streams", lambda: [mx.default_stream(mx.default_device())])
        )
        yield


def training_step(model: Model, recipe: Recipe, **options: Any) -> Callable[[mx.array], list[mx.array]]:
    """Return a function from a batch (B, L + 1) to all lazy outputs of a training step. Sets the weights to zero.

    options: of TrainingStep; not compiled unless it says so.
    """
    model.update(tree_map(mx.zeros_like, model.parameters()))  # else the initialization is part of the graph
    step = TrainingStep(model, recipe, **{"compiled": False, **options})
    mx.eval(step.state)

    def function(batch: mx.array) -> list[mx.array]:
        metrics, norm = step(batch, 1e-3)
        made = (metrics, norm, model.trainable_parameters(), step.optimizers.state)
        return list(dict(tree_flatten(made)).values())

    return function


def trace(function: Callable[..., Sequence[mx.array]], *arrays: mx.array, fast: bool = True) -> Graph:
    """Trace function(*arrays) to its graph, simplified as `mx.compile` does before it fuses.

    fast: layer_norm, rms_norm and rope of mx.fast and their gradients are one node each, as on a GPU; attention is a
    node without work followed by its expansion, which is what Metal runs in training. Limits: mx.checkpoint is traced
    without its second forward pass, and custom gradients only under mx.value_and_grad. Raises ValueError if function
    calls a custom function made outside it.
    """
    messages: dict[str, list[Any]] = {"inputs": [], "constants": [], "outputs": [], "primitive": []}
    results = 0

    def listen(message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind in messages:
            messages[kind] += [message] if kind == "primitive" else message[kind]

    def whole(*inputs: mx.array) -> list[mx.array]:
        nonlocal results
        _Custom.calls, _Custom.found = None, []
        own = list(function(*inputs))
        results = len(own)
        return own + _Custom.found

    with _stand_ins(fast):
        mx.export_function(listen, whole, *arrays)
    return _assemble(results, **messages)


# Stand-ins. A marker is mx.depends on an array of characters that hold its name.


def _marked(name: str, outputs: Sequence[mx.array], others: Sequence[mx.array] = ()) -> list[mx.array]:
    """Make one node called `name` from `outputs` and `others`; its outputs are like `outputs`."""
    return mx.depends(list(outputs), [mx.array(list(name.encode()), mx.uint8), *others])


class _Call(NamedTuple):
    """A call of a custom function. result: an array, or the list of its arrays."""

    primals: tuple[mx.array, ...]
    result: Any
    gradient: Callable[..., Any]

    @property
    def outputs(self) -> list[mx.array]:
        return [self.result] if isinstance(self.result, mx.array) else list(self.result)


class _Custom:
    """Stand-in for mx.custom_function, transparent to `_value_and_grad`."""

    calls: list[_Call] | None = None  # None: outside a gradient
    probes: Sequence[mx.array] = ()  # one for each output of each call
    found: list[mx.array]  # results of custom gradients, in the order of their placeholders

    def __init__(self, function: Callable[..., Any], gradient: Callable[..., Any] | None = None) -> None:
        self.function, self.gradient = function, gradient

    def vjp(self, gradient: Callable[..., Any]) -> None:
        self.gradient = gradient

    def __call__(self, *primals: mx.array) -> Any:
        calls, _Custom.calls = _Custom.calls, None  # nested calls have no gradient of their own
        result = self.function(*primals)
        _Custom.calls = calls
        if calls is None or self.gradient is None:
            return result
        first = sum(len(call.outputs) for call in calls)
        calls.append(_Call(primals, result, self.gradient))
        outputs = [mx.stop_gradient(y) for y in calls[-1].outputs]
        if _Custom.probes:
            outputs = [y + probe for y, probe in zip(outputs, _Custom.probes[first:], strict=False)]
        return outputs[0] if isinstance(result, mx.array) else outputs


def _value_and_grad(function: Callable[..., Any], argnums: int = 0) -> Callable[..., Any]:
    """Stand-in for mx.value_and_grad that puts custom gradients into the graph instead of hiding them in a primitive.

    A probe added to every custom output has that output's cotangent as its gradient. The custom gradient of it replaces
    a marked placeholder for the cotangent of the primal; `_assemble` joins the two.
    """

    def both(*args: Any, **options: Any) -> tuple[Any, Any]:
        names, leaves = zip(*tree_flatten(args[argnums]), strict=True)
        value: Any = None
        calls: list[_Call] = []

        def run(arrays: Sequence[mx.array], probes: Sequence[mx.array]) -> list[mx.array]:
            nonlocal value, calls
            mx.random.seed(0)  # both runs split the same key
            part = tree_unflatten(list(zip(names, arrays, strict=True)))
            calls = _Custom.calls = []
            _Custom.probes = probes
            value = function(*args[:argnums], part, *args[argnums + 1 :], **options)
            _Custom.calls = None
            return [value[0] if isinstance(value, tuple) else value, *(p for call in calls for p in call.primals)]

        primals = run(leaves, ())[1:]
        probes = [_marked("probe", [mx.zeros(y.shape, y.dtype)])[0] for call in calls for y in call.outputs]
        n, first = len(leaves), len(_Custom.found)
        places = [_marked(f"place {i}", [mx.zeros(p.shape, p.dtype)])[0] for i, p in enumerate(primals, first)]
        _, slopes = mx.vjp(lambda *a: run(a[:n], a[n:]), [*leaves, *probes], [mx.array(1.0), *places])
        cotangents = iter(slopes[n:])
        for given, result, gradient in calls:
            one = isinstance(result, mx.array)
            own = next(cotangents) if one else [next(cotangents) for _ in result]
            got = gradient(given if len(given) > 1 else given[0], own, result)
            _Custom.found += [got] if isinstance(got, mx.array) else got
        return value, tree_unflatten(list(zip(names, slopes[:n], strict=True)))

    return both


def _norm(name: str) -> Callable[..., mx.array]:
    """Stand-in for mx.fast.layer_norm(x, weight, bias, eps) or mx.fast.rms_norm(x, weight, eps)."""

    def norm(x: mx.array, *rest: Any, **_: Any) -> mx.array:
        def gradient(primals: Any, g: mx.array, _: mx.array) -> list[mx.array]:
            return _marked(name + "VJP", [primals] if isinstance(primals, mx.array) else primals, [g])

        given = [a for a in rest if isinstance(a, mx.array)]
        return _Custom(lambda x, *given: _marked(name, [x], given)[0], gradient)(x, *given)

    return norm


def _rope(x: mx.array, *_: Any, **options: Any) -> mx.array:
    """Stand-in for mx.fast.rope."""
    arrays = [a for a in options.values() if isinstance(a, mx.array)]
    return _Custom(lambda x: _marked("RoPE", [x], arrays)[0], lambda _, g, __: _marked("RoPE", [g], arrays)[0])(x)


def _segmented_mm(a: mx.array, b: mx.array, segments: mx.array) -> mx.array:
    """Stand-in for mx.segmented_mm, which mx.export_function does not know."""
    out = mx.broadcast_to(mx.array(0, b.dtype), (*segments.shape[:-1], a.shape[0], b.shape[1]))
    return _marked("SegmentedMM", [out], [a, b, segments])[0]


@contextmanager
def _stand_ins(fast: bool) -> Iterator[None]:
    attention = mx.fast.scaled_dot_product_attention

    def counted(q: mx.array, *rest: Any, **options: Any) -> mx.array:
        return attention(_marked("ScaledDotProductAttention", [q])[0], *rest, **options)

    ours: dict[str, Any] = {
        "custom_function": _Custom,
        "value_and_grad": _value_and_grad,
        "checkpoint": lambda f: f,
        "segmented_mm": _segmented_mm,
    }
    kernels: dict[str, Any] = {"layer_norm": _norm("LayerNorm"), "rms_norm": _norm("RMSNorm"), "rope": _rope}
    high, low = (int(word) for word in np.array(mx.random.state[0]))  # type: ignore[index]
    try:
        with (
            patch.multiple(mx, **ours),
            patch.multiple(mx.fast, **kernels, scaled_dot_product_attention=counted) if fast else ExitStack(),
        ):
            yield
    finally:
        mx.random.seed(high << 32 | low)


def _assemble(count: int, inputs: list, constants: list, outputs: list, primitive: list) -> Graph:
    """Build the graph from the messages of mx.export_function, without placeholders, probes and dead nodes."""
    arrays = {name: Array(tuple(shape), dtype) for name, shape, dtype in [*inputs, *outputs]}
    arrays |= {name: Array(tuple(value.shape), value.dtype) for name, value in constants}
    names = {
        name: bytes(v.tolist()).decode(errors="replace") for name, v in constants if v.ndim == 1 and v.dtype == mx.uint8
    }
    maker: dict[str, Node] = {}
    same: dict[str, str] = {}
    for message in primitive:
        arrays |= {name: Array(tuple(shape), dtype) for name, shape, dtype in message["outputs"]}
        ends = {side: [a[0] for a in message[side]] for side in ("inputs", "outputs")}
        node = Node(message["name"], **ends, arguments=message.get("arguments", []))
        if node.primitive == "Depends" and (mark := names.keys() & set(node.inputs)):
            node = Node(names[mark.pop()], [a for a in node.inputs if a not in names], node.outputs)
            if node.primitive.startswith("place "):
                same[node.outputs[0]] = outputs[count + int(node.primitive[6:])][0]
        probes = [a for a in node.inputs if a in maker and maker[a].primitive == "probe"]
        if probes:
            same[node.outputs[0]] = next(a for a in node.inputs if a not in probes)
        maker |= dict.fromkeys(node.outputs, node)

    def final(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    for node in maker.values():
        node.inputs = [final(name) for name in node.inputs]
    results = [final(name) for name, *_ in outputs[:count]]
    return Graph(arrays, _in_order(results, maker), results)


def _in_order(results: Sequence[str], maker: dict[str, Node]) -> list[Node]:
    """List the nodes that the results need, in topological order (depth first)."""
    order: dict[int, Node] = {}
    stack = [(name, False) for name in reversed(results)]
    while stack:
        name, ready = stack.pop()
        node = maker.get(name)
        if node is None or id(node) in order:
            continue
        if ready:
            order[id(node)] = node
        else:
            stack += [(name, True), *((a, False) for a in reversed(node.inputs))]
    return list(order.values())
