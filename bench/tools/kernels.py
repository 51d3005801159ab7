"""Kernels of a traced graph: fusion, FLOPs, memory traffic and peak memory."""

import math
from dataclasses import dataclass

import mlx.core as mx

from bench.tools.graph import Graph, Node

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
    """A kernel: its launches, the FLOPs of its matmul, the bytes that it reads and writes."""

    primitive: str  # Compiled, where several were fused
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    launches: int
    flops: int
    nbytes: int
    dtype: mx.Dtype  # of its result


def kernels(graph: Graph) -> list[Kernel]:
    """List the kernels of the compiled graph, in order, fused almost as MLX fuses (the tests compare).

    Every kernel reads its inputs and writes its outputs once, without a cache; a gather reads only what is indexed. A
    reshape of a transposed or broadcast array is a copy; a slice update copies the whole array first. A reduction is
    one launch, although a long one to a single number takes two on Metal.
    """
    found = (_kernel(graph, group) for group in _groups(graph))
    return [kernel for kernel in found if kernel.launches]


def _groups(graph: Graph) -> list[list[Node]]:
    """Group the nodes into kernels; a broadcast is in every kernel that reads through it.

    An elementwise node joins the kernel that reads it if there is only one; a result of the graph only if the shapes
    agree. MLX (`compile_fuse`) splits long kernels a little differently.
    """
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    group: dict[int, list[Node]] = {}  # by id of an elementwise node
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
        launches, read = 2, read + 2 * arrays[part].nbytes  # after the copy, reads and writes the part
    elif primitive == "Concatenate":
        launches = len(last.inputs)
    elif primitive in ("LayerNormVJP", "RMSNormVJP"):  # dx, then a sum for each parameter
        launches = len(outputs)
        rows = primitive == "LayerNormVJP" and launches > 1  # writes the terms and reads them, and the cotangent
        read += rows * launches * arrays[inputs[0]].nbytes
    return Kernel(primitive, inputs, outputs, launches, flops, read + written, arrays[outputs[-1]].dtype)


def _stored(graph: Graph, name: str) -> int:
    """Bytes of memory behind an array: a broadcast reads the same ones repeatedly."""
    node, own = graph.maker.get(name), graph.arrays[name].nbytes
    return min(own, _stored(graph, node.inputs[0])) if node and node.primitive in _VIEWS and node.inputs else own


def _is_strided(graph: Graph, name: str) -> bool:
    """Whether an array is a view of memory in another order."""
    return any(n > 1 and s != r for n, s, r in zip(*_layout(graph, name), strict=True))


def _layout(graph: Graph, name: str) -> tuple[tuple[int, ...], list[int], list[int]]:
    """Return the shape of an array, its strides in memory, and those of an array in order."""
    shape = graph.arrays[name].shape
    ordered = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    node = graph.maker.get(name)
    if node is None or node.primitive not in _VIEWS or not node.inputs:
        return shape, ordered, ordered
    before, strides, _ = _layout(graph, node.inputs[0])
    if node.primitive == "Transpose":
        return shape, [strides[axis] for axis in node.arguments[0]], ordered
    if node.primitive == "Broadcast":
        strides = [0] * (len(shape) - len(before)) + [s if n > 1 else 0 for n, s in zip(before, strides, strict=True)]
        return shape, strides, ordered
    if node.primitive == "Unflatten":  # every axis but one stays
        axis = next((i for i, n in enumerate(before) if shape[i] != n), len(before) - 1)
        count = len(shape) - len(before) + 1
        inner = [math.prod(shape[i + 1 : axis + count]) * strides[axis] for i in range(axis, axis + count)]
        return shape, [*strides[:axis], *inner, *strides[axis + 1 :]], ordered
    if [n for n in before if n > 1] == [n for n in shape if n > 1]:
        kept = iter([s for n, s in zip(before, strides, strict=True) if n > 1])
        return shape, [next(kept) if n > 1 else 1 for n in shape], ordered
    if node.primitive in ("Slice", "Split"):
        return shape, strides, ordered
    return shape, ordered, ordered


def peak_bytes(graph: Graph) -> int:
    """Peak memory (bytes) of inputs, constants and live arrays when the kernels run one after the other."""
    todo = kernels(graph)
    made = {a for kernel in todo for a in kernel.outputs}
    owner: dict[str, str] = {}  # a view -> the array whose memory it uses
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
