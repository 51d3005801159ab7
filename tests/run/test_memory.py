"""What a training step needs: a bound, a measurement where the bound exceeds the device, and what fits."""

import gc
import re
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_transformer.backend import divided_blas
from mlx_transformer.nn.config import SIZES
from mlx_transformer.run import memory
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput
from phases import phase4, phase6


def planned(phase, size, batch_size, branch=None):
    """The model and the recipe of a phase, or of a branch of it."""
    experiment = Experiment.of_phase(phase)
    kind = experiment.find_branch(branch)
    recipe = experiment.find_recipe(None, branch)[0].at(size)
    numbers = {**SIZES[size], **({} if recipe.dropout is None else {"dropout": recipe.dropout})}
    config = kind.Config(**numbers)
    return kind(config, 0), replace(recipe, batch_tokens=batch_size * config.seq_len)


def measured_peak(model, recipe):
    """Peak bytes of the second step: weights, optimizer state and activations."""
    model.train()
    mx.eval(model.parameters())
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    step = TrainingStep(model, recipe)
    batch = model.example(recipe.batch_size(model.config.seq_len), model.config.seq_len)
    for _ in range(2):
        with divided_blas():
            mx.eval(*step(batch, 1e-6), step.state)
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
    return peak - before + sum(value.nbytes for _, value in tree_flatten(model.parameters()))


TRIED = [name for name in phase6.BRANCHES if not name.startswith(("phase_5_with", "without"))]
BRANCHES = {1: ["translator"], 4: phase4.BRANCHES, 6: TRIED}
ALL = [*((phase, None) for phase in range(1, 7)), *((n, branch) for n, names in BRANCHES.items() for branch in names)]
FEW = [(1, None), (6, None), (4, "moe"), (6, "deltanet"), (6, "mamba2"), (6, "s4d")]
CASES = [
    pytest.param(*one, size, batch_size, marks=[] if size == "nano" and one in FEW else [pytest.mark.slow])
    for one in ALL
    for size, batch_size in (("nano", 64), ("small", 16))
]


@pytest.mark.parametrize(("phase", "branch", "size", "batch_size"), CASES)
def test_the_bound_is_within_twice_the_measured_peak(phase, branch, size, batch_size):
    model, recipe = planned(phase, size, batch_size, branch)
    assert 1 <= memory.step_bound(model, recipe, batch_size) / measured_peak(model, recipe) <= 2


TOO_LARGE = [(1, 100_000, "at least"), (1, 800, "about"), (6, 800, "about")]


@pytest.mark.parametrize(("phase", "batch_size", "how"), TOO_LARGE)
def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(phase, batch_size, how, monkeypatch):
    """On a device of 512 MiB."""
    device = SimpleNamespace(memory_bytes=2**29)
    monkeypatch.setattr(memory, "device_info", lambda: device)
    model, recipe = planned(phase, "nano", batch_size)
    said = rf"{64 * batch_size:,} tokens at a time need {how} .* the device has 0\.5: --batch-size (\d+) fits"
    with pytest.raises(BadInput, match=said) as error:
        memory.check_memory(model, recipe, 0, ("batch_size",))
    fits = int(re.search(said, str(error.value))[1])
    _, recipe = planned(phase, "nano", fits)
    assert 0.4 * device.memory_bytes < measured_peak(model, recipe) < device.memory_bytes


def test_measuring_leaves_the_model_as_it_is(monkeypatch):
    monkeypatch.setattr(memory, "device_info", lambda: SimpleNamespace(memory_bytes=2**29))
    model, recipe = planned(1, "nano", 800)
    before = dict(tree_flatten(model.parameters()))
    with pytest.raises(BadInput):
        memory.check_memory(model, recipe, 0, ())
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(value, after[path]) for path, value in before.items())


@pytest.mark.parametrize(("phase", "branch"), ALL)
def test_a_batch_far_too_large_is_refused_before_anything_is_computed(phase, branch, monkeypatch):
    """On a device of 1 GiB."""
    monkeypatch.setattr(memory, "device_info", lambda: SimpleNamespace(memory_bytes=2**30))
    model, recipe = planned(phase, "nano", 100_000, branch)
    with pytest.raises(BadInput, match=r"need at least .*: --batch-size \d+ fits"):
        memory.check_memory(model, recipe, 0, ("batch_size",))


@pytest.mark.parametrize("phase", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_the_bound_holds_for_the_plain_forms_which_keep_scores_and_logits(phase, monkeypatch):
    monkeypatch.setenv("MLX_TRANSFORMER_PLAIN", "1")
    model, recipe = planned(phase, "nano", 64)
    assert 1 <= memory.step_bound(model, recipe, 64) / measured_peak(model, recipe) <= 2
