"""The training rules of phase 2 against PyTorch: steps in parts, smoothed targets, schedules, what is refused."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer.optim.schedules import Constant, Cosine, InverseSqrt, Linear
from mlx_transformer.step import TrainingStep
from mlx_transformer.streams import divided_blas
from mlx_transformer.trees import by_path
from phases import phase2
from tests.ladder import tiny, tokens

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'mlx-transformer[bench]'")
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


@pytest.mark.parametrize("rows", [4, 5], ids=["equal parts", "unequal parts"])
def test_the_original_recipe_trains_alike(rows):
    ours = tiny(phase2.Model)
    recipe = replace(ORIGINAL, schedule=Cosine(**NUMBERS))
    training = reference2.Training(reference_of(ours), **reference2.rules(recipe.to_dict()))
    step, losses = TrainingStep(ours, recipe), []
    with divided_blas():
        for i in range(20):
            batch = tokens(rows, 18, seed=i)
            metrics, _ = step(batch, recipe.rate((i + 1) * rows * 17, 0.0, None))
            mx.eval(metrics, step.state)
            losses.append((metrics["loss"].item(), training.step(np.array(batch))))
    own, expected = np.array(losses).T
    np.testing.assert_allclose(own, expected, atol=1e-3)
    plain = reference2.Training(
        reference_of(tiny(phase2.Model)), **{**reference2.rules(recipe.to_dict()), "label_smoothing": 0.0}
    )
    assert abs(plain.step(np.array(tokens(rows, 18, seed=0))) - expected[0]) > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_schedules_agree(schedule):
    rules = reference2.rules(replace(ORIGINAL, schedule=schedule).to_dict())
    training = reference2.Training(reference_of(tiny(phase2.Model)), **rules)
    for seen in (1, 100, 300, 301, 1000, 1999, 2000, 5000):
        training.tokens = seen
        assert training.factor() == pytest.approx(schedule(seen))


REFUSED = ("fp16", *(f"with_{name}" for name in ("ema", "agc", "zclip", "value_clip", "restarts", "batch_warmup")))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_refused(name):
    with pytest.raises(ValueError, match="does not train by"):
        reference2.rules(phase2.RECIPES[name].at("nano").to_dict())


@pytest.mark.parametrize("name", ["original", "with_accumulate", "with_label_smoothing", "with_linear"])
def test_phase_1_refuses_what_came_later(name):
    recipe = phase2.RECIPES[name].at("nano").to_dict()
    with pytest.raises(ValueError, match="does not train by"):
        reference1.rules(recipe)
    reference2.rules(recipe)
