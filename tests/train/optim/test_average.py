"""Averages of the weights: the mean of the last snapshots is exact, is evaluated and kept, and survives a stop."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mlx_transformer.nn.config import SIZES
from mlx_transformer.run.memory import step_bound
from mlx_transformer.train.optim import EMA, CheckpointAverage
from mlx_transformer.train.trainer import Eval, Resumed
from mlx_transformer.utils.errors import BadInput
from phases import phase1
from tests.train.test_trainer import RECIPE, STEP_TOKENS, assert_equal_weights, flat, make_model, of, train
from tests.train.test_training_step import EVERYTHING

LAST_3 = CheckpointAverage(last=3, every_tokens=2 * STEP_TOKENS)
STEPS = 11


@pytest.fixture
def weights(scripted):
    """Return the weights that each evaluation of a run sees, one after each step."""

    def run(average):
        seen = scripted(*[5.0 - 0.1 * i for i in range(STEPS)])
        _, model = train(recipe=replace(RECIPE, average=average), max_steps=STEPS, options={"eval_every": 1})
        for path, value in flat(model).items():
            np.testing.assert_array_equal(value, seen[-1][path], err_msg="the last, best weights are kept")
        return seen

    return run


def test_it_is_the_mean_of_the_last_snapshots(weights):
    plain, averaged = weights(None), weights(LAST_3)
    for step, own in enumerate(averaged, 1):
        taken = [plain[at - 1] for at in range(2, step + 1, 2)][-3:] or [plain[step - 1]]
        for path, value in own.items():
            mean = np.mean([one[path].astype(np.float64) for one in taken], axis=0)
            np.testing.assert_allclose(value, mean, rtol=1e-6, atol=1e-9, err_msg=f"{path} after step {step}")


def test_the_last_one_alone_is_the_weights_at_the_snapshot(weights):
    plain, averaged = weights(None), weights(CheckpointAverage(last=1, every_tokens=3 * STEP_TOKENS))
    for step, own in enumerate(averaged, 1):
        at = step - step % 3 or step
        for path, value in own.items():
            np.testing.assert_array_equal(value, plain[at - 1][path], err_msg=f"{path} after step {step}")


def test_a_snapshot_is_taken_where_the_tokens_pass_a_multiple():
    average = CheckpointAverage(every_tokens=100)
    ends = [30, 60, 90, 120, 150, 300, 301]
    assert [average.share(now - before, now) for before, now in pairwise([0, *ends])] == [0, 0, 0, 1, 0, 1, 0]
    assert (average.last, average.horizon(), average.n_copies()) == (5, 500, 5)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("stopped", [1, 16], ids=["before a snapshot", "after more than are kept"])
def test_resumed_is_uninterrupted(stopped, tmp_path):
    recipe, options = replace(EVERYTHING, dtype="float16", average=LAST_3), {"eval_every": 5}
    events, whole = train(recipe=recipe, max_steps=23, options=options)
    options["checkpoints"] = tmp_path
    train(recipe=recipe, max_steps=stopped, options={**options, "save_every": stopped})
    again, resumed = train(make_model(seed=9), recipe, max_steps=23, options=options)
    assert isinstance(again[0], Resumed)
    assert_equal_weights(resumed, whole)
    assert of(Eval, again)[-1].valid_loss == of(Eval, events)[-1].valid_loss


def test_its_copies_of_the_weights_count_in_the_memory_of_a_step():
    model = phase1.Model(phase1.Config(**SIZES["nano"]))
    recipe = phase1.RECIPE.at("nano")
    averages = (
        None,
        EMA(horizon_tokens=9),
        CheckpointAverage(every_tokens=9),
        CheckpointAverage(last=20, every_tokens=9),
    )
    bounds = [step_bound(model, replace(recipe, average=average), 8) for average in averages]
    copies = [(bound - bounds[0]) / (4 * model.count_parameters()["total"]) for bound in bounds]
    assert copies == [0, 1, 5, 20]


@pytest.mark.parametrize(
    ("average", "words"),
    [
        (CheckpointAverage(last=0, every_tokens=9), "last = 0: expected a number of snapshots of at least 1"),
        (CheckpointAverage(every_tokens=0), "every_tokens = 0: expected a number of tokens of at least 1"),
        (EMA(horizon_tokens=0), "horizon_tokens = 0: expected a number of tokens of at least 1"),
    ],
)
def test_numbers_out_of_range(average, words):
    with pytest.raises(BadInput, match=words):
        replace(RECIPE, average=average).check()
