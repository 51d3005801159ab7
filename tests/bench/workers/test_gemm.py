"""The products of a step, alone."""

import math

import mlx.core as mx

from bench.tools import graph, kernels
from bench.workers import gemm, passes
from phases import phase1

CONFIG = phase1.Config(vocab_size=50, d_model=16, n_layers=2, n_heads=2, d_ff=24, seq_len=12)
RECIPE = phase1.RECIPE.at("nano")


def test_they_are_all_the_matrix_work_of_the_step():
    products = gemm.step_products(phase1.Model(CONFIG), RECIPE, 3)
    flops = sum(2 * math.prod(left) * right[-1] for (left, _), (right, _) in products)
    with graph.on_metal():
        step = graph.training_step(phase1.Model(CONFIG), RECIPE)
        steps = kernels.kernels(graph.trace(step, mx.zeros((3, 13), mx.int32)))
    assert flops == sum(kernel.flops for kernel in steps) > 0


def test_a_factor_is_drawn_as_it_lies():
    drawn = gemm._draw((5, 3, 2), True)
    assert drawn.shape == (5, 3, 2)
    assert gemm.shapes(found := graph.trace(lambda a, b: [a @ b.T], mx.zeros((4, 6)), mx.zeros((5, 6)))) == [
        [((4, 6), False), ((6, 5), True)]
    ], found


def test_the_worker_computes_the_products_of_so_many_steps(monkeypatch):
    setting = {"phase": 1, "branch": None, "recipe": None, "size": "nano", "config": CONFIG.to_dict()}
    worker = passes.GemmRounds(**setting, batch_size=3, device="cpu")
    computed = []
    monkeypatch.setattr(gemm.Products, "__call__", lambda self: computed.append(self))
    assert worker.round(2) == {"losses": []}
    assert computed == [worker.products] * 2
