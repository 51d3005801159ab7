"""RigL: its algorithm by hand, a constant sparsity, and a run that resumes with its masks."""

import math
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer.run import training
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.train.optim.groups import AdamW, Group, Optimizers, Paths
from mlx_transformer.train.optim.muon import Muon
from mlx_transformer.train.optim.rigl import RigL
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path
from phases import phase6
from tests.faults.runs import ON_CPU, assert_same_run, command, write_text
from tests.ladder import TINY, tokens

SHAPE, RULE = (8, 10), RigL(rule=AdamW(), sparsity=0.75, fraction=0.5, every=3, until=9)


def started(rule, weight):
    optimizers = Optimizers([Group(name="all", select=Paths(".*"), optimizer=rule)], {"w": weight})
    return optimizers, optimizers.start({"w": weight})["w"]


def drawn(seed):
    return mx.random.normal(SHAPE, key=mx.random.key(seed))


def test_the_smallest_weights_are_dropped_and_those_of_largest_gradient_grow():
    optimizers, w = started(RULE, drawn(0))
    state = optimizers.state[0]["w"]
    for step in range(8):
        before, was, gradient = np.array(w), np.array(state["mask"]), np.array(drawn(step))
        assert optimizers.want_rewiring() == (step in (3, 6))
        if step in (3, 6):
            w = optimizers.rewire({"w": mx.array(gradient)}, {"w": w})["w"]
            k = int(0.25 * (1 + math.cos(math.pi * step / 9)) * 20)
            active = np.flatnonzero(was)
            stay = set(active[np.argsort(-np.abs(before.flat[active]))][: 20 - k])
            others = np.array([i for i in range(80) if i not in stay])
            grown = set(others[np.argsort(-np.abs(gradient.flat[others]))][:k])
            mask = np.array(state["mask"])
            assert set(np.flatnonzero(mask)) == stay | grown
            np.testing.assert_array_equal(np.array(w), np.where(mask, before, 0))
            assert not np.array(state["m"])[~(mask & was)].any()
        optimizers.advance(mx.array(0.1))
        w = optimizers.update({"w": drawn(step)}, {"w": w})["w"]
        mask = np.array(state["mask"])
        assert mask.sum() == 20
        assert not np.array(w)[~mask].any()
        assert np.array(w)[mask].all()


@pytest.mark.parametrize("rule", [AdamW(weight_decay=0.1), Muon()], ids=lambda rule: type(rule).__name__)
def test_without_sparsity_it_is_the_rule_alone(rule):
    weights = []
    for own in (rule, RigL(rule=rule, sparsity=0.0, every=2)):
        optimizers = Optimizers([Group(name="all", select=Paths(".*"), optimizer=own)], {"w": drawn(0)})
        w = optimizers.start({"w": drawn(0)}).get("w", drawn(0))
        for step in range(5):
            if optimizers.want_rewiring():
                w = optimizers.rewire({"w": drawn(step)}, {"w": w})["w"]
            optimizers.advance(mx.array(0.1))
            w = optimizers.update({"w": drawn(step)}, {"w": w})["w"]
        weights.append(w)
    assert mx.array_equal(*weights)


def test_a_gradient_that_overflows_grows_nothing():
    optimizers, w = started(RULE, drawn(0))
    gradient = mx.full(SHAPE, mx.nan)
    gradient[2, 3] = 1.0
    optimizers.optimizers[0].state["step"] = mx.array(3)
    w = optimizers.rewire({"w": gradient}, {"w": w})["w"]
    assert mx.isfinite(w).all()
    assert optimizers.state[0]["w"]["mask"][2, 3]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_trains_sparse_matrices_and_rewires_them(compiled):
    recipe = phase6.RECIPES["rigl"].at("nano")
    rule = replace(recipe.groups[0].optimizer, every=2)
    recipe = replace(recipe, groups=(replace(recipe.groups[0], optimizer=rule), *recipe.groups[1:]))
    model = phase6.Model(phase6.Config(**TINY))
    step = TrainingStep(model, recipe, compiled=compiled)
    path = "blocks.1.ffn.up_proj.weight"
    masks = []
    for i in range(5):
        step(tokens(4, 18, seed=i), 0.01)
        masks.append(np.array(step.optimizers.state[0][path]["mask"]))
        weights = by_path(model.parameters())
        assert (weights[path] != 0).mean().item() == pytest.approx(0.2, abs=1e-3)
        assert (weights["embedding.weight"] != 0).all()
    moved = [int((one != other).sum()) for one, other in pairwise(masks)]
    assert moved[0] == moved[2] == 0
    assert moved[1] > 0
    assert moved[3] > 0


def test_a_sparsity_of_one_is_refused():
    with pytest.raises(BadInput, match=r"sparsity = 1.0: expected a number from 0 to below 1"):
        RigL(rule=AdamW(), sparsity=1.0)


def test_a_resumed_run_has_the_masks_of_one_that_was_never_stopped(tmp_path, no_pictures):
    text = write_text(tmp_path / "text.txt")

    def train(*args):
        assert command(lambda: training.main(find_phase(6)), *args, "--quiet", "--prompt", "a").code == 0

    flags = [*ON_CPU, "--data", text, "--recipe", "rigl", "--eval-every", 10]
    train(*flags, "--max-steps", 45, "--out", tmp_path / "whole")
    train(*flags, "--max-steps", 30, "--out", tmp_path / "cut")
    train("--resume", tmp_path / "cut", "--max-steps", 45)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
