"""What a training step needs: a bound, a measurement where the bound exceeds the device, and what fits."""

import re
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_transformer.nn.config import SIZES
from mlx_transformer.run import memory
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput


def planned(phase, size, batch_size, branch=None):
    """The model and the recipe of a phase, or of a branch of it."""
    experiment = Experiment.of_phase(phase)
    kind = experiment.find_branch(branch)
    recipe = experiment.recipe.at(size)
    numbers = {**SIZES[size], **({} if recipe.dropout is None else {"dropout": recipe.dropout})}
    config = kind.Config(**numbers)
    return kind(config, 0), replace(recipe, batch_tokens=batch_size * config.seq_len)


def measured_peak(model, recipe):
    """Peak bytes of the second step: weights, optimizer state and activations."""
    step = TrainingStep(model, recipe)
    batch = mx.zeros((recipe.batch_size(model.config.seq_len), model.config.seq_len + 1), mx.int32)
    mx.clear_cache()
    before = mx.get_active_memory()
    for _ in range(2):
        mx.eval(*step(batch, 1e-6), step.state)
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
    return peak - before + sum(value.nbytes for _, value in tree_flatten(model.parameters()))


SMALL = [pytest.param(phase, "small", 16, marks=pytest.mark.slow) for phase in (1, 3, 5, 6)]


@pytest.mark.parametrize(("phase", "size", "batch_size"), [*((phase, "nano", 64) for phase in (1, 3, 5, 6)), *SMALL])
def test_the_bound_is_within_twice_the_measured_peak(phase, size, batch_size):
    model, recipe = planned(phase, size, batch_size)
    assert 1 <= bound_of(model, batch_size) / measured_peak(model, recipe) <= 2


@pytest.mark.parametrize("branch", ["deltanet", "mlstm", "retnet"])
def test_the_bound_counts_the_scores_within_chunks(branch):
    model, recipe = planned(6, "nano", 64, branch)
    assert 1 <= bound_of(model, 64) * memory._OVERHEAD / measured_peak(model, recipe) <= 2


def bound_of(model, batch_size):
    states = 12 * model.count_parameters()["total"]
    return states + batch_size * memory.activation_bound(model.config, memory.most_scores(model))


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
