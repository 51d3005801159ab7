"""Tuning: where the search looks next, what it calls settled or noise, what it records, and a real one at nano."""

import json
import math
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.compare.runs import Finished
from bench.tools import tune
from bench.tools.tune import Point, Trial
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed
from phases import phase1, phase2
from tests.faults.runs import merged

OWN = {"learning_rate": 0.004, "embedding": 3.0, "head": 12.0}


def finished(loss):
    """A run whose best loss this is; None: it diverged."""
    result = {"seed": 0, "stopped": "max_tokens", "best_valid_loss": loss or 5.0, "tokens": 8}
    result |= {"train_seconds": 1.0, "versions": {}}
    return Finished(status="diverged" if loss is None else "done", result=result)


def tried(point, *losses):
    return Trial(tune.values_at(point, OWN), [(f"{point}-{i}", finished(loss)) for i, loss in enumerate(losses)])


def searched(loss_of, count=tune.TRIALS):
    saved = []
    found = tune.search(count, lambda point: tried(point, loss_of(point)), lambda trials: saved.append(len(trials)))
    assert saved == list(range(1, len(found) + 1))
    return found


@given(st.tuples(*[st.floats(-9, 9)] * 3))
def test_a_bowl_is_descended_to_within_a_step(bottom):
    found = searched(lambda point: 1 + sum((x - b) ** 2 for x, b in zip(point, bottom, strict=True)))
    best = tune.best_of(found)
    assert len(found) == tune.TRIALS
    assert tune.is_settled(found)
    assert all(abs(x - b) <= 4 for x, b in zip(best, bottom, strict=True)), "within half a factor"


def test_a_best_at_an_edge_is_reported():
    found = searched(lambda point: 3.0 - 0.01 * point.head + abs(point.learning_rate) + abs(point.embedding))
    assert not tune.is_settled(found)
    assert "not settled after 20 trials" in tune.verdict(found)[1]
    assert tune.best_of(found).head == max(point.head for point in found) > 0


def test_every_number_is_looked_at_on_both_sides_first():
    found = list(searched(lambda point: 1.0 + (point != Point()), 7))
    assert found == [Point(), *tune.neighbors(Point(), 8)]
    values = [tune.values_at(point, OWN) for point in found]
    assert [one["learning_rate"] for one in values[:3]] == [0.004, 0.008, 0.002]
    assert [one["embedding"] for one in values[3:5]] == [9.0, 1.0]
    assert [one["head"] for one in values[5:]] == [36.0, 4.0]


def test_where_all_diverge_there_is_no_best():
    (sentence,) = tune.verdict(searched(lambda point: None))
    assert "every one of 20 trials diverged" in sentence


def test_a_seed_that_diverges_makes_the_median_infinite():
    assert tried(Point(), 2.0, None).median == math.inf
    assert tried(Point(), 2.0, 3.0).median == 2.5
    assert tried(Point(), 2.0, None, 3.0).median == 3.0


def test_neighbors_are_compared_with_the_best_seed_by_seed():
    best, near = tried(Point(), 2.01, 2.03), tried(Point(8), 2.04, 2.02)
    sentences = tune.verdict({Point(): best, Point(8): near, Point(0, 8): tried(Point(0, 8), 2.5, 5.5)})
    assert sentences[0] == "best: learning_rate 0.004, embedding 3, head 12 (validation loss 2.0200)"
    assert sentences[2] == "learning_rate 0.008 is 0.0100 behind, with 1 of 2 seeds: within seed noise"
    assert sentences[3] == "embedding 9 is 1.9800 behind, with every seed: by chance once in 4"
    assert tune.behind(best, tried(Point(), None, 2.5)) == "diverged"
    assert tune.behind(tried(Point(), 2.0), tried(Point(), 2.5)).endswith("one seed cannot tell this from noise")


def test_a_recipe_without_a_group_for_the_head_is_refused():
    assert tune.own_values(phase2.RECIPE.at("nano")) == {"learning_rate": 0.00673, "embedding": 1.32, "head": 12.0}
    matrices, *_ = phase1.RECIPE.groups
    with pytest.raises(BadInput, match="no optimizer group named embedding"):
        tune.own_values(replace(phase1.RECIPE, groups=(matrices,)))


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command line over a small text, in an empty folder."""
    stories = "".join(f"One day a cat saw {i} dogs. They ran.\n<|endoftext|>\n" for i in range(400))
    (tmp_path / "stories.txt").write_text(stories)
    monkeypatch.chdir(tmp_path)
    line = ["tune", "--size", "nano", "--data", "stories.txt", "--device", "cpu", "--batch-size", "4"]

    def run(*more, phase=1):
        monkeypatch.setattr(sys, "argv", merged([*line, "--phase", phase, *more]))
        tune.main()
        return json.loads((tmp_path / "results" / "bench" / f"tune_phase{phase}_nano.json").read_text())

    return run


def test_a_real_search_is_reused(command, monkeypatch, capsys):
    line = ("--trials", 7, "--seeds", 1, "--max-tokens", 1024)
    log = command(*line)
    assert log["complete"]
    assert len({run["best_valid_loss"] for run in log["runs"]}) == 7, "each number changes the training"
    assert [one["losses"] for one in log["trials"]] == [[run["best_valid_loss"]] for run in log["runs"]]
    assert all(run["tokens"] == 1024 and run["evals"] for run in log["runs"])
    assert f"best: learning_rate {log['best']['learning_rate']:g}" in capsys.readouterr().out

    monkeypatch.setattr("bench.compare.runs.run_to_end", lambda *_: pytest.fail("a finished run was repeated"))
    again = command(*line)
    assert (again["runs"], again["trials"]) == (log["runs"], log["trials"])
    with pytest.raises(BadInput, match="another budget_tokens"):
        command(*line[:-1], 2048)
    with pytest.raises(BadInput, match="--trials 3: expected at least 7"):
        command("--trials", 3)


@pytest.mark.parametrize(("phase", "budget"), [(1, 2_000_000), (2, 1_200_000)])
def test_every_phase_gets_as_many_trials_over_its_whole_schedule(command, monkeypatch, phase, budget):
    runs = []

    def execute(run, say):
        runs.append(run)
        groups = {group.name: group.lr_multiplier for group in run.plan.recipe.groups}
        return finished(1 + abs(math.log(run.plan.recipe.learning_rate * groups["head"])))

    monkeypatch.setattr(tune, "execute", execute)
    log = command(phase=phase)
    assert {run.plan.limits.max_tokens for run in runs} == {budget} == {log["budget_tokens"]}
    assert len({run.fingerprint for run in runs}) == len(runs) == 2 * tune.TRIALS


def test_a_failed_run_ends_the_search_and_ctrl_c_resumes(command, monkeypatch):
    monkeypatch.setattr(tune, "execute", lambda *_, **__: Finished(status="failed", error="disk full"))
    with pytest.raises(RunFailed, match=r"learning_rate [\d.]+, embedding 1, head 9, seed 0: disk full"):
        command()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "execute", interrupt)
    with pytest.raises(Interrupted, match="the same command resumes"):
        command()


def test_another_file_is_not_overwritten(command, tmp_path):
    (tmp_path / "notes.json").write_text("[]")
    with pytest.raises(BadInput, match="is not a log of this command"):
        command("--out", "notes.json")
    with pytest.raises(BadInput, match="recipe 'none' is unknown"):
        command("--recipe", "none")
