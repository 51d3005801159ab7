"""Graphs read without being computed: against closed formulas, and against what MLX itself compiles."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from bench.tools.graph import labels, on_metal, trace, training_step
from bench.tools.kernels import kernels, peak_bytes
from mlx_transformer.nn.config import SIZES
from phases import phase1
from tests.ladder import kinds, tiny

KINDS = kinds()


def _nano(kind=phase1.Model, rows=4, **how):
    config = kind.Config(**SIZES["nano"])
    step = training_step(kind(config), phase1.RECIPE.at("nano"), **how)
    return config, step, mx.zeros((rows, config.seq_len + 1), mx.int32)


def _counts(graph):
    return Counter(node.primitive for node in graph.nodes)


def _flops(graph):
    return sum(kernel.flops for kernel in kernels(graph))


def test_a_training_steps_flops_are_those_of_the_closed_formula():
    """6 for each weight of a matmul and token, 12 n_layers d_model seq_len for the scores and what they weigh."""
    config, step, batch = _nano()
    with on_metal():
        graph = trace(step, batch)
    d, n = config.d_model, config.n_layers
    weights = n * (4 * d * d + 2 * d * config.d_ff) + config.vocab_size * d  # the head's, not the embedding's
    a_token = 6 * weights + 12 * n * d * config.seq_len
    assert _flops(graph) == a_token * batch.shape[0] * config.seq_len


def test_fused_kernels_are_those_that_mlx_compiles():
    def compiled(name, kind):
        with on_metal():
            ran = Counter(labels(*_nano(kind, compiled=True)[1](batch)))
            return ran, kernels(trace(_nano(kind)[1], batch, fast=False))

    batch = _nano()[2]
    own = {"Matmul", "AddMM", "Softmax", "LogSumExp", "GatherAxis", "RandomBits", "Scatter", "Gather", "Concatenate"}
    views = {
        "Broadcast",
        "Slice",
        "Squeeze",
        "ExpandDims",
        "Flatten",
        "Transpose",
        "Depends",
        "View",
        "Unflatten",
        "Split",
    }
    for name in ("1", "3-rope", "3-gqa", "4-moe"):
        ran, ours = compiled(name, KINDS[name])
        mine = Counter(kernel.primitive for kernel in ours)
        assert {p: mine[p] for p in own} == {p: ran[p] for p in own}, name
        theirs = sum(n for p, n in ran.items() if p not in views | {"CustomTransforms", "Reshape"})
        mine_all = sum(n for p, n in mine.items() if p not in views | {"Reshape"})
        assert mine_all == pytest.approx(theirs, rel=0.03), name  # MLX cuts long kernels a little differently


def test_fast_kernels_are_one_node_each_way():
    config, step, batch = _nano()
    with on_metal():
        count = _counts(trace(step, batch))
    assert count["LayerNorm"] == count["LayerNormVJP"] == 2 * config.n_layers
    model = tiny(KINDS["5-qwen3"])
    with on_metal():
        count = _counts(trace(lambda x: [model(x)], mx.zeros((1, 5), mx.int32)))
    assert count["RMSNorm"] == (2 + 2) * 4 + 1


def test_attention_and_rope_are_seen():
    def forward(x):
        y = mx.fast.rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=0)
        return mx.fast.scaled_dot_product_attention(y, x, x, scale=1.0).sum()

    x = mx.zeros((1, 2, 4, 8))
    count = _counts(trace(lambda x: [*mx.value_and_grad(forward)(x)], x))
    assert count["ScaledDotProductAttention"] == 1
    assert count["RoPE"] == 2
    assert count["Matmul"] == 6


def test_a_custom_gradient_is_part_of_the_graph():
    def step(x, w):
        @mx.custom_function
        def square(y, scale):
            return mx.square(y) * scale

        @square.vjp
        def gradient(primals, cotangent, output):
            return mx.sin(cotangent) * primals[0], mx.cos(cotangent) + output

        def loss(w):
            return mx.sum(square(square(x @ w, mx.array(2.0)), mx.array(3.0)))

        return [*mx.value_and_grad(loss)(w)]

    x, w = mx.zeros((3, 4)), mx.zeros((4, 5))
    traced, real = _counts(trace(step, x, w)), Counter(labels(*step(x, w)))
    assert traced["Sin"] == real["Sin"] == 2
    assert traced["Cos"] == real["Cos"] == 0  # nothing asks for the scale's gradient
    assert traced["Matmul"] == real["Matmul"] == 2
    assert traced["Square"] == real["Square"] == 2
    assert not {"probe", "place 0"} & set(traced)


def test_a_custom_gradient_of_several_outputs_is_part_of_the_graph():
    def both(function):
        custom = mx.custom_function(lambda x: [function(x), 2 * x])
        custom.vjp(lambda x, cotangents, outputs: mx.square(cotangents[0]) + mx.sqrt(cotangents[1]))
        return custom

    def loss(tree, sign):
        first, second = both(mx.exp)(tree["x"])
        return (sign * first + second).sum()

    def gradient(x):
        value, gradients = mx.value_and_grad(loss)({"x": x}, 1.0)
        return [value, gradients["x"]]

    with on_metal():
        counts = _counts(trace(gradient, mx.ones((3,))))
    assert counts["Square"] == 1
    assert counts["Sqrt"] == 1


def test_a_custom_function_made_before_is_refused():
    custom = mx.custom_function(mx.exp)
    custom.vjp(lambda _, cotangent, output: cotangent * output)
    with pytest.raises(ValueError, match="CustomTransforms"):
        trace(lambda x: [custom(x)], mx.zeros((2,)))


def test_bytes_are_inputs_and_outputs_once():
    def only(function, *arrays):
        (kernel,) = kernels(trace(function, *arrays))
        return kernel.primitive, kernel.nbytes, kernel.launches

    x, row = mx.zeros((8, 16)), mx.zeros((16,))
    assert only(lambda x: [mx.exp(x)], x) == ("Exp", 2 * 512, 1)
    assert only(lambda x: [mx.exp(x) * 2 + x], x) == ("Compiled", 2 * 512 + 4 + 0, 1)
    assert only(lambda x, row: [mx.exp(x) + row], x, row) == ("Compiled", 2 * 512 + 64, 1)
    assert only(lambda x: [x @ x.T], x) == ("Matmul", 2 * 512 + 256, 1)
    assert only(lambda x: [x.T.reshape(-1)], x) == ("Reshape", 2 * 512, 1)
    assert only(lambda x: [mx.concatenate([x, x])], x)[2] == 2
    assert only(lambda x, i: [x[i]], x, mx.zeros((2,), mx.int32)) == ("Gather", 2 * 128 + 8, 1)
    assert kernels(trace(lambda x: [x.T, x.reshape(16, 8), x[:2]], x)) == []
    heads = mx.zeros((2, 3, 4, 5))
    assert only(lambda x: [x.swapaxes(1, 2).flatten(2)], heads) == ("Flatten", 2 * 480, 1)
    assert only(lambda x: [mx.exp(x.swapaxes(1, 2)).swapaxes(1, 2).swapaxes(1, 2).flatten(2)], heads)[0] == "Exp"
    assert only(lambda x: [mx.broadcast_to(x, (3, 8, 16)).reshape(24, 16)], x) == ("Reshape", 512 + 3 * 512, 1)
    assert kernels(trace(lambda x: [mx.unflatten(x.T, 1, (2, 4)).swapaxes(0, 1), x[:, None].reshape(8, 4, 4)], x)) == []


def test_half_precision_halves_bytes():
    x = mx.zeros((8, 16))
    (kernel,) = kernels(trace(lambda x: [x @ x.T], x.astype(mx.float16)))
    assert kernel.nbytes == 512 + 128
    assert kernel.dtype == mx.float16


def test_peak_memory_is_that_of_the_live_arrays():
    a = mx.zeros((64, 64))  # 16 KiB
    kib = 1024
    assert peak_bytes(trace(lambda a: [a @ a], a)) == 32 * kib
    assert peak_bytes(trace(lambda a: [a @ a @ a @ a], a)) == 48 * kib  # the input, and two products at a time
    assert peak_bytes(trace(lambda a: [mx.softmax(a @ a, axis=-1).sum()], a)) == 48 * kib
    assert peak_bytes(trace(lambda a: [mx.exp(a @ a)], a)) == 32 * kib  # in place


def test_the_full_logits_are_never_in_memory(monkeypatch):
    def largest():
        config, step, batch = _nano(rows=1024)
        with on_metal():
            graph = trace(step, batch)
        made = [graph.arrays[name].shape for node in graph.nodes for name in node.outputs]
        return max(map(np.prod, made)), 1024 * config.seq_len * config.vocab_size

    most, logits = largest()
    assert most <= logits / 2
    monkeypatch.setenv("MLX_TRANSFORMER_PLAIN", "1")
    most, logits = largest()
    assert most == logits


def test_tracing_leaves_the_random_state_and_mlx_alone():
    def state():
        return mx.fast.layer_norm, mx.custom_function, mx.value_and_grad, np.array(mx.random.state[0]).tolist()

    _, step, batch = _nano()
    before = state()
    with on_metal():
        trace(step, batch)
    assert state() == before
