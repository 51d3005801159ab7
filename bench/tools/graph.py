"""The graphs of MLX, read without being computed: primitives, dtypes, kernels, FLOPs, bytes, memory.

MLX shows a graph in two ways. `mx.export_to_dot` names the primitives of any lazy array, also of a compiled function
(`labels`). `mx.export_function` gives shapes and dtypes too (`trace`), but not through `mx.custom_function`, and on a
CPU it sees the `mx.fast` kernels expanded; so stand-ins take the place of both while a graph is traced. `kernels` then
fuses almost as MLX does; the tests hold it against what MLX compiles.
"""

import functools
import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_transformer.backend import streams
from mlx_transformer.nn.model import Model
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.step import TrainingStep

# Our own, of mlx_transformer/primitives.cpp.
FOR_A_CPU = frozenset({"CpuAttention", "CpuLayerNorm", "CpuRMSNorm"})
# Their eval_gpu raises (mlx 0.32, mlx/backend/metal/primitives.cpp; ours).
NO_METAL_KERNEL = FOR_A_CPU | {"LUF", "QRF", "SVD", "Inverse", "Cholesky", "Eig", "Eigh", "Load"}


@dataclass(frozen=True)
class Array:
    """What is known of an array before it is computed."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


@dataclass
class Node:
    """One primitive, and the names of the arrays that go in and come out."""

    primitive: str
    inputs: list[str]
    outputs: list[str]


@dataclass
class Graph:
    """Nodes, each behind those it reads; arrays that none of them makes are inputs and constants."""

    arrays: dict[str, Array]
    nodes: list[Node]
    results: list[str]

    @functools.cached_property
    def maker(self) -> dict[str, Node]:
        """The node behind each array that has one."""
        return {name: node for node in self.nodes for name in node.outputs}

    def unsupported(self) -> list[str]:
        """What Metal cannot run: primitives without a kernel, and those that touch float64."""
        wide = {
            n.primitive for n in self.nodes if any(self.arrays[a].dtype == mx.float64 for a in n.inputs + n.outputs)
        }
        missing = {n.primitive for n in self.nodes} & NO_METAL_KERNEL
        return sorted(missing) + [f"float64 in {name}" for name in sorted(wide)]


def labels(*arrays: mx.array) -> list[str]:
    """The primitives of lazy arrays, as they would run now; what `mx.compile` fused is one Compiled..."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return re.findall(r'label ="(\w+)', text.getvalue())


@contextmanager
def on_metal() -> Iterator[None]:
    """While here, our code builds the graphs that it builds on a Mac's GPU: no form and no streams made for a CPU."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(("mlx_transformer", "phases")) and hasattr(module, "on_linux_cpu"):
                stack.enter_context(patch.object(module, "on_linux_cpu", lambda: False))
        stack.enter_context(patch.object(streams, "streams", lambda: [mx.default_stream(mx.default_device())]))
        yield


def training_step(model: Model, recipe: Recipe, *, compiled: bool = False) -> Callable[[mx.array], list[mx.array]]:
    """A batch (rows, L + 1) -> all that a training step makes, lazily. The model's weights become zeros."""
    model.update(tree_map(mx.zeros_like, model.parameters()))  # so that no graph of a random start is behind them
    step = TrainingStep(model, recipe, compiled=compiled)
    mx.eval(step.state)

    def function(batch: mx.array) -> list[mx.array]:
        metrics, norm = step(batch, 1e-3)
        made = (metrics, norm, model.trainable_parameters(), step.optimizers.state)
        return list(dict(tree_flatten(made)).values())

    return function


def trace(function: Callable[..., Sequence[mx.array]], *arrays: mx.array, fast: bool = True) -> Graph:
    """The graph of function(*arrays), simplified as `mx.compile` does it before it fuses.

    fast: layer_norm, rms_norm and rope of mx.fast and their gradients are one node each, as on a GPU; attention is one
    node that does nothing and its expansion, which is what Metal runs in training. A part under mx.checkpoint is seen
    without its second forward pass, a gradient by other means than mx.value_and_grad without custom ones. Raises
    ValueError if function calls a custom function that was made before.
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


# Stand-ins. A marker is mx.depends with an array of characters, which are its name.


def _marked(name: str, outputs: Sequence[mx.array], others: Sequence[mx.array] = ()) -> list[mx.array]:
    """One node called `name` that makes arrays like `outputs` of these and others."""
    return mx.depends(list(outputs), [mx.array(list(name.encode()), mx.uint8), *others])


Call = tuple[tuple[mx.array, ...], mx.array, Callable[..., Any]]  # primals, output, gradient


class _Custom:
    """mx.custom_function of one output, as `_value_and_grad` can see through it."""

    calls: list[Call] | None = None  # None: no gradient is taken
    probes: Sequence[mx.array] = ()  # one for each call
    found: list[mx.array]  # cotangents that custom gradients gave, in the order of their placeholders

    def __init__(self, function: Callable[..., mx.array], gradient: Callable[..., Any] | None = None) -> None:
        self.function, self.gradient = function, gradient

    def vjp(self, gradient: Callable[..., Any]) -> None:
        self.gradient = gradient

    def __call__(self, *primals: mx.array) -> mx.array:
        calls, _Custom.calls = _Custom.calls, None  # what is inside is not differentiated
        output = self.function(*primals)
        _Custom.calls = calls
        if calls is None or self.gradient is None:
            return output
        calls.append((primals, output, self.gradient))
        output = mx.stop_gradient(output)
        return output + _Custom.probes[len(calls) - 1] if _Custom.probes else output


def _value_and_grad(function: Callable[..., Any], argnums: int = 0) -> Callable[..., Any]:
    """mx.value_and_grad with custom gradients as plain parts of the graph, not hidden in their primitive.

    A probe is added to every custom output, whose gradient is the cotangent there. What the custom gradient makes of
    that belongs where a marked placeholder stands for the cotangent of the primal; `_assemble` joins the two.
    """

    def both(*args: Any, **options: Any) -> tuple[Any, Any]:
        names, leaves = zip(*tree_flatten(args[argnums]), strict=True)
        value: Any = None
        calls: list[Call] = []

        def run(arrays: Sequence[mx.array], probes: Sequence[mx.array]) -> list[mx.array]:
            nonlocal value, calls
            mx.random.seed(0)  # so that a first run leaves no splits of the key behind
            part = tree_unflatten(list(zip(names, arrays, strict=True)))
            calls = _Custom.calls = []
            _Custom.probes = probes
            value = function(*args[:argnums], part, *args[argnums + 1 :], **options)
            _Custom.calls = None
            return [value[0] if isinstance(value, tuple) else value, *(p for primals, *_ in calls for p in primals)]

        primals = run(leaves, ())[1:]
        probes = [_marked("probe", [mx.zeros(y.shape, y.dtype)])[0] for _, y, _ in calls]
        n, first = len(leaves), len(_Custom.found)
        places = [_marked(f"place {i}", [mx.zeros(p.shape, p.dtype)])[0] for i, p in enumerate(primals, first)]
        _, slopes = mx.vjp(lambda *a: run(a[:n], a[n:]), [*leaves, *probes], [mx.array(1.0), *places])
        for (given, output, gradient), cotangent in zip(calls, slopes[n:], strict=True):
            got = gradient(given if len(given) > 1 else given[0], cotangent, output)
            _Custom.found += [got] if isinstance(got, mx.array) else got
        return value, tree_unflatten(list(zip(names, slopes[:n], strict=True)))

    return both


def _norm(name: str) -> Callable[..., mx.array]:
    """Stands for mx.fast.layer_norm(x, weight, bias, eps) or mx.fast.rms_norm(x, weight, eps)."""

    def norm(x: mx.array, *rest: Any, **_: Any) -> mx.array:
        def gradient(primals: Any, g: mx.array, _: mx.array) -> list[mx.array]:
            return _marked(name + "VJP", [primals] if isinstance(primals, mx.array) else primals, [g])

        given = [a for a in rest if isinstance(a, mx.array)]
        return _Custom(lambda x, *given: _marked(name, [x], given)[0], gradient)(x, *given)

    return norm


def _rope(x: mx.array, *_: Any, **options: Any) -> mx.array:
    """Stands for mx.fast.rope."""
    arrays = [a for a in options.values() if isinstance(a, mx.array)]
    return _Custom(lambda x: _marked("RoPE", [x], arrays)[0], lambda _, g, __: _marked("RoPE", [g], arrays)[0])(x)


@contextmanager
def _stand_ins(fast: bool) -> Iterator[None]:
    attention = mx.fast.scaled_dot_product_attention

    def counted(q: mx.array, *rest: Any, **options: Any) -> mx.array:
        return attention(_marked("ScaledDotProductAttention", [q])[0], *rest, **options)

    ours: dict[str, Any] = {"custom_function": _Custom, "value_and_grad": _value_and_grad, "checkpoint": lambda f: f}
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
    """Messages of mx.export_function -> a graph: markers named, placeholders and probes gone, dead nodes too."""
    arrays = {name: Array(tuple(shape), dtype) for name, shape, dtype in [*inputs, *outputs]}
    arrays |= {name: Array(tuple(value.shape), value.dtype) for name, value in constants}
    names = {
        name: bytes(v.tolist()).decode(errors="replace") for name, v in constants if v.ndim == 1 and v.dtype == mx.uint8
    }
    maker: dict[str, Node] = {}
    same: dict[str, str] = {}
    for message in primitive:
        arrays |= {name: Array(tuple(shape), dtype) for name, shape, dtype in message["outputs"]}
        node = Node(message["name"], *([a[0] for a in message[side]] for side in ("inputs", "outputs")))
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
    """The nodes that results need, depth first, each behind what it reads."""
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


# Kernels.

_ELEMENTWISE = """Abs Add ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTan2 ArcTanh AsType BitwiseBinary BitwiseInvert Ceil
Conjugate Cos Cosh Divide Equal Erf ErfInv Exp Expm1 Floor Greater GreaterEqual Imag Less LessEqual Log Log1p LogAddExp
LogicalAnd LogicalNot LogicalOr Maximum Minimum Multiply Negative NotEqual Power Real Remainder Round Select Sigmoid
Sign Sin Sinh Sqrt Square Subtract Tan Tanh"""
_FUSED = frozenset(_ELEMENTWISE.split())  # mlx/compile.cpp, is_fusable
_NO_WORK = """AsStrided Broadcast BroadcastAxes Copy Depends ExpandDims Flatten NumberOfElements Reshape
ScaledDotProductAttention Slice Split Squeeze StopGradient Transpose Unflatten View"""
_VIEWS = frozenset(_NO_WORK.split())


@dataclass(frozen=True)
class Kernel:
    """What runs as one: its launches, the FLOPs of its matmul, the bytes that it reads and writes."""

    primitive: str  # Compiled, where several were fused
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    launches: int
    flops: int
    nbytes: int
    dtype: mx.Dtype  # of its result


def kernels(graph: Graph) -> list[Kernel]:
    """The kernels of the compiled graph, in order.

    Every kernel reads its inputs and writes its outputs once, whatever a cache may keep; what is indexed is read where
    the index says. A reshape of a transposed or broadcast array is a copy; to write into a part copies the whole first.
    A reduction counts as one launch; on Metal one to a single number takes two where it is long.
    """
    found = (_kernel(graph, group) for group in _groups(graph))
    return [kernel for kernel in found if kernel.launches]


def _groups(graph: Graph) -> list[list[Node]]:
    """The nodes of each kernel; a broadcast is in every kernel that reads through it.

    An elementwise node joins the one kernel that reads it; a result of the graph, if the shape is that kernel's. MLX
    (`compile_fuse`) draws the line a little differently where a kernel gets long.
    """
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    group: dict[int, list[Node]] = {}  # of an elementwise node, by its id
    groups: list[list[Node]] = []
    for node in reversed(graph.nodes):
        name = node.outputs[0]
        into = {id(g): g for reader in readers.get(name, []) for g in [group.get(id(reader), [])]}
        only = next(iter(into.values())) if len(into) == 1 else []
        if node.primitive == "Broadcast":
            for g in filter(None, into.values()):
                g.append(node)
            group[id(node)] = only
        elif node.primitive in _FUSED:
            unlike = only and graph.arrays[only[0].outputs[0]].shape != graph.arrays[name].shape
            if not only or (unlike and name in graph.results):
                groups.append(only := [])
            only.append(node)
            group[id(node)] = only
        else:
            groups.append([node])
    return [g[::-1] for g in reversed(groups)]


def _kernel(graph: Graph, group: list[Node]) -> Kernel:
    arrays, last = graph.arrays, group[-1]
    made = [a for node in group for a in node.outputs]
    inputs = tuple(dict.fromkeys(a for node in group for a in node.inputs if a not in made))
    outputs = tuple(a for a in made if a in graph.results or a in last.outputs)
    read, written = sum(_stored(graph, a) for a in inputs), sum(arrays[a].nbytes for a in outputs)
    launches, flops = 1, 0
    primitive = last.primitive if len(group) == 1 else "Compiled"
    if primitive in _VIEWS:
        launches = int(primitive in ("Reshape", "Flatten") and _is_strided(graph, inputs[0]))
    elif primitive in ("Matmul", "AddMM", "GatherMM"):
        flops = 2 * math.prod(arrays[outputs[0]].shape) * arrays[inputs[0]].shape[-1]
    elif primitive in ("Gather", "GatherAxis"):
        read = written + sum(arrays[a].nbytes for a in inputs[1:])
    elif primitive in ("Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate"):
        part = inputs[1 if "Slice" in primitive else -1]
        launches, read = 2, read + 2 * arrays[part].nbytes  # after the copy, the part is read and written
    elif primitive == "Concatenate":
        launches = len(last.inputs)
    elif primitive in ("LayerNormVJP", "RMSNormVJP"):  # after dx a sum over the rows for each parameter
        launches = len(outputs)
        rows = primitive == "LayerNormVJP" and launches > 1  # whose terms are written out and read, as is the cotangent
        read += rows * launches * arrays[inputs[0]].nbytes
    return Kernel(primitive, inputs, outputs, launches, flops, read + written, arrays[outputs[-1]].dtype)


def _stored(graph: Graph, name: str) -> int:
    """Bytes of memory behind an array: a broadcast shows the same ones again and again."""
    node, own = graph.maker.get(name), graph.arrays[name].nbytes
    return min(own, _stored(graph, node.inputs[0])) if node and node.primitive in _VIEWS and node.inputs else own


def _is_strided(graph: Graph, name: str) -> bool:
    """Whether an array shows memory in another order than its own."""
    node = graph.maker.get(name)
    if node is None or node.primitive not in ("Transpose", "Broadcast", "Squeeze", "ExpandDims", "Unflatten", "View"):
        return False
    before, after = ([n for n in graph.arrays[a].shape if n > 1] for a in (node.inputs[0], name))
    moved = node.primitive in ("Transpose", "Broadcast") and before != after
    return moved or _is_strided(graph, node.inputs[0])


def peak_bytes(graph: Graph) -> int:
    """Memory for inputs, constants and what is alive while the kernels run one after the other."""
    todo = kernels(graph)
    made = {a for kernel in todo for a in kernel.outputs}
    owner: dict[str, str] = {}  # a view -> the array whose memory it shows
    for node in graph.nodes:
        if node.inputs:
            owner |= {a: owner.get(node.inputs[0], node.inputs[0]) for a in node.outputs if a not in made}
    given = {a for node in graph.nodes for a in node.inputs if a not in graph.maker}
    reads = [{owner.get(a, a) for a in kernel.inputs} - given for kernel in todo]
    last = {a: i for i, names in enumerate(reads) for a in names}
    last |= {owner.get(a, a): len(todo) for a in graph.results}
    alive = peak = sum(graph.arrays[a].nbytes for a in given)
    for i, kernel in enumerate(todo):
        freed = sum(graph.arrays[a].nbytes for a in reads[i] if last[a] == i)
        alive += sum(graph.arrays[a].nbytes for a in kernel.outputs)
        in_place = kernel.primitive in _FUSED or kernel.primitive == "Compiled"
        peak = max(peak, alive - (freed if in_place else 0))
        alive -= freed
    return peak
