"""The training rules of phase 2 against PyTorch: parts, smoothed targets, groups, schedules, what is refused."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer.backend import divided_blas
from mlx_transformer.train.optim.groups import Paths
from mlx_transformer.train.optim.schedules import Constant, Cosine, InverseSqrt, Linear
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.trees import by_path
from phases import phase2
from tests.ladder import tiny, tokens

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
from bench.reference import phase1 as reference1  # noqa: E402
from bench.reference import phase2 as reference2  # noqa: E402

ORIGINAL = replace(phase2.RECIPES["original"].at("nano"), learning_rate=3e-4)
NUMBERS = {"warmup_tokens": 300, "total_tokens": 2000, "final": 0.1}
SCHEDULES = {
    "constant": Constant(warmup_tokens=300),
    "inverse square root": InverseSqrt(warmup_tokens=300),
    "linear": Linear(**NUMBERS),
    "cosine": Cosine(**NUMBERS),
}


def reference_of(ours):
    theirs = reference2.Model(**ours.config.to_dict())
    theirs.load({path: np.array(value) for path, value in by_path(ours.parameters()).items()})
    return theirs.train()


def batches(batch_size):
    return [tokens(batch_size, 18, seed=i) for i in range(20)]


def our_losses(recipe, batch_size):
    model, losses = tiny(phase2.Model), []
    step = TrainingStep(model, recipe)
    with divided_blas():
        for i, batch in enumerate(batches(batch_size)):
            metrics, _ = step(batch, recipe.learning_rate_at((i + 1) * batch_size * 17))
            mx.eval(metrics, step.state)
            losses.append(metrics["loss"].item())
    return np.array(losses)


def their_losses(rules, batch_size):
    training = reference2.Training(reference_of(tiny(phase2.Model)), **rules)
    return np.array([training.step(np.array(batch)) for batch in batches(batch_size)])


@pytest.mark.parametrize("batch_size", [4, 5], ids=["equal parts", "unequal parts"])
def test_the_original_recipe_trains_alike(batch_size):
    recipe = replace(ORIGINAL, schedule=Cosine(**NUMBERS))
    rules = reference2.rules(recipe.to_dict())
    expected = their_losses(rules, batch_size)
    np.testing.assert_allclose(our_losses(recipe, batch_size), expected, atol=1e-3)
    assert abs(their_losses({**rules, "label_smoothing": 0.0}, batch_size)[0] - expected[0]) > 1e-3


def test_phase_2_s_recipe_trains_alike_and_each_group_s_values_matter():
    recipe = replace(phase2.RECIPE.at("nano"), learning_rate=3e-4, schedule=Linear(**NUMBERS))
    rules = reference2.rules(recipe.to_dict())
    losses = our_losses(recipe, 4)
    np.testing.assert_allclose(losses, their_losses(rules, 4), atol=1e-3)
    multipliers = ((i, "lr_multiplier", 50.0) for i in (1, 2))
    decays = ((i, "weight_decay", 50.0) for i in (0, 1, 2))
    for i, number, other in (*multipliers, *decays):
        groups = [{**group, number: other} if i == j else group for j, group in enumerate(rules["groups"])]
        assert abs(losses - their_losses({**rules, "groups": groups}, 4)).max() > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_schedules_agree(schedule):
    rules = reference2.rules(replace(ORIGINAL, schedule=schedule).to_dict())
    training = reference2.Training(reference_of(tiny(phase2.Model)), **rules)
    for seen in (1, 100, 300, 301, 1000, 1999, 2000, 5000):
        training.tokens = seen
        assert training.factor() == pytest.approx(schedule(seen))


REFUSED = (
    "fp16",
    *(f"phase_1_with_{name}" for name in ("ema", "agc", "zclip", "value_clip", "restarts", "batch_warmup")),
)


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_that_the_reference_lacks_is_refused(name):
    with pytest.raises(ValueError, match="does not train by"):
        reference2.rules(phase2.RECIPES[name].at("nano").to_dict())


def test_a_group_of_other_paths_is_refused():
    recipe = phase2.RECIPE.at("nano")
    matrices, embedding, *others = recipe.groups
    groups = (matrices, replace(embedding, select=Paths(r"embed.*")), *others)
    with pytest.raises(ValueError, match=r"does not train by Paths embed\.\*$"):
        reference2.rules(replace(recipe, groups=groups).to_dict())


LATER = ("original", *(f"phase_1_with_{name}" for name in ("accumulate", "label_smoothing", "linear")))
LATER = {name: phase2.RECIPES[name] for name in LATER}


@pytest.mark.parametrize("recipe", LATER.values(), ids=LATER)
def test_the_reference_of_phase_1_refuses_later_recipes(recipe):
    described = recipe.at("nano").to_dict()
    with pytest.raises(ValueError, match="does not train by"):
        reference1.rules(described)
    reference2.rules(described)
