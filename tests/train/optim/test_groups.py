"""Optimizer groups and rules of a user's own."""

import json
import runpy
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer.train import check_groups, optim
from mlx_transformer.train.optim.groups import assign
from mlx_transformer.utils.errors import BadInput
from phases import phase1
from tests.train.test_trainer import RECIPE, assert_equal_weights, flat, make_model, train

OWN_FILE = """
from dataclasses import dataclass, replace
import mlx.core as mx
from mlx_transformer.train import optim
from phases import phase1

@dataclass(frozen=True, kw_only=True)
class SignMomentum(optim.UpdateRule):
    beta: float = 0.9
    def init(self, parameter):
        return {"m": mx.zeros_like(parameter)}
    def apply(self, gradient, parameter, state, learning_rate):
        state["m"] = self.beta * state["m"] + (1 - self.beta) * gradient
        return parameter - learning_rate * mx.sign(state["m"])

def is_bias(path, parameter):
    return path.endswith("bias")

RECIPE = replace(phase1.RECIPE, groups=(
    optim.Group(name="biases", select=is_bias, optimizer=SignMomentum(), lr_multiplier=0.5),
    optim.Group(name="others", select=lambda path, parameter: not is_bias(path, parameter), optimizer=optim.AdamW()),
))
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN_FILE)
    groups = runpy.run_path(str(tmp_path / "own.py"))["RECIPE"].groups
    return replace(RECIPE, groups=groups)


def test_a_rule_and_groups_of_a_user_s_file(own):
    before = flat(make_model())
    events, model = train(recipe=own, max_steps=1)
    for path, value in flat(model).items():
        if path.endswith("bias"):
            moved = np.abs(value - before[path])
            np.testing.assert_allclose(moved[moved > 0], 0.5 * events[0].learning_rate, rtol=1e-4)
            assert moved.any()
    losses = [event.metrics["loss"] for event in train(recipe=own, max_steps=60)[0][:60]]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_they_are_recorded_by_name(own):
    groups = json.loads(json.dumps(own.to_dict()))["groups"]
    assert groups[0]["optimizer"] == {"kind": "SignMomentum", "weight_decay": 0.0, "beta": 0.9}
    assert groups[0]["select"] == {"kind": "is_bias"}


@pytest.mark.usefixtures("on_cpu")
def test_its_state_is_in_the_checkpoint(own, tmp_path):
    _, whole = train(recipe=own, max_steps=8)
    options = {"checkpoints": tmp_path / "checkpoints", "save_every": 4, "eval_every": 100}
    train(recipe=own, max_steps=4, options=options)
    _, resumed = train(recipe=own, max_steps=8, options=options)
    assert_equal_weights(whole, resumed)


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (optim.Paths(".*"), r"parameter 'embedding\.weight' .* is in 'matrices' and 'vectors'"),
        (optim.Paths("nothing"), r"parameter 'blocks\.0\..*' .* is in none"),
    ],
)
def test_a_parameter_in_no_group_or_in_two_is_bad_input(select, message):
    *_, vectors = phase1.RECIPE.groups
    matrices = replace(vectors, name="matrices", select=optim.Matrices())
    recipe = replace(RECIPE, groups=(matrices, replace(vectors, select=select)))
    for attempt in (lambda: check_groups(recipe, make_model()), lambda: train(recipe=recipe)):
        with pytest.raises(BadInput, match=message):
            attempt()


def test_groups_of_one_name_or_without_parameters_are_bad_input():
    parameters = {"w": mx.zeros((2, 2))}
    group = optim.Group(name="all", select=optim.Matrices(), optimizer=optim.AdamW())
    with pytest.raises(BadInput, match="two optimizer groups are called 'all'"):
        assign((group, replace(group, select=optim.Vectors())), parameters)
    with pytest.raises(BadInput, match="group 'none' has no parameter"):
        assign((group, replace(group, name="none", select=optim.Vectors())), parameters)
    optional = replace(group, name="none", select=optim.Vectors(), optional=True)
    assert assign((group, optional), parameters) == {"all": ["w"], "none": []}
