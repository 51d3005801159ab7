"""Tuning: where the search resumes, what it calls noise, what it records, and a real one at nano."""

import json
import math
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.compare.runs import Finished
from bench.tools import tune
from bench.tools.tune import Trial
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed
from phases import phase1
from tests.faults.runs import merged

RATES = [0.001, 0.002, 0.004, 0.008, 0.016]
TUNED = phase1.RECIPE.at("nano").learning_rate
AROUND = [tune.rounded(TUNED * 2**k) for k in tune.STEPS]


def finished(loss):
    """A run whose best loss this is; None: it diverged."""
    result = {"seed": 0, "stopped": "max_tokens", "best_valid_loss": loss or 5.0, "tokens": 8}
    result |= {"train_seconds": 1.0, "versions": {}}
    return Finished(status="diverged" if loss is None else "done", result=result)


def tried(rate, *losses):
    return Trial(rate, [(f"{rate}-{i}", finished(loss)) for i, loss in enumerate(losses)])


def searched(loss_of, rates=RATES):
    saved = []
    found = tune.search(list(rates), lambda rate: tried(rate, loss_of(rate)), saved.append)
    assert [len(one) for one in saved] == list(range(1, len(found) + 1))
    return found


@given(st.floats(-16, 4), st.sampled_from([2.0, math.sqrt(2)]))
def test_the_best_is_not_at_an_edge_but_at_the_bound(log_best, factor):
    rates = [tune.rounded(0.004 * factor**k) for k in tune.STEPS]
    found = searched(lambda rate: 1 + abs(math.log2(rate) - log_best), rates)
    order = [one.learning_rate for one in found]
    assert order == sorted(order)
    assert set(rates) <= set(order)
    best = tune.best_of(found)
    assert 0 < best < len(found) - 1 or len(found) == tune.MOST_TRIALS
    assert all(b / a == pytest.approx(factor, rel=0.02) for a, b in pairwise(order))


def test_nothing_is_added_where_the_best_is_inside():
    assert [one.learning_rate for one in searched(lambda rate: abs(rate - 0.004) + 1)] == RATES


def test_where_all_diverge_lower_rates_are_tried():
    found = searched(lambda rate: None if rate > 0.0003 else 3 - rate)
    assert [one.learning_rate for one in found] == [0.000125, 0.00025, 0.0005, *RATES]
    (sentence,) = tune.verdict(searched(lambda rate: None))
    assert "every learning rate diverged" in sentence


def test_a_seed_that_diverges_makes_the_median_infinite():
    assert tried(0.1, 2.0, None).median == math.inf
    assert tried(0.1, 2.0, 3.0).median == 2.5
    assert tried(0.1, 2.0, None, 3.0).median == 3.0


def test_neighbors_are_compared_with_the_best_seed_by_seed():
    near = [tried(0.001, 2.04, 2.02), tried(0.002, 2.01, 2.03), tried(0.004, 2.5, 5.52)]
    best, low, high = tune.verdict(near)
    assert best == "best learning rate: 0.002 (validation loss 2.0200)"
    assert low == "0.001 is 0.0100 behind, with 1 of 2 seeds: within seed noise"
    assert high == "0.004 is 1.9900 behind, with every seed: by chance once in 4"
    assert tune.verdict([*near[:2], tried(0.004, None, 2.5)])[-1] == "0.004 diverged"
    of_three = tune.judged(tried(0.002, 2.0, 2.1, None), tried(0.004, 2.2, None, None))
    assert of_three == "0.004 diverged"
    assert "with 2 of 3" in tune.judged(tried(0.002, 2.0, 2.1, None), tried(0.004, 2.2, 2.3, None))
    assert tune.judged(tried(0.002, 2.0), tried(0.004, 2.5)).endswith("one seed cannot tell this from noise")


def test_an_outlier_does_not_hide_other_differences():
    low, best, high = tried(0.004, 3.7167, 3.7518), tried(0.008, 3.6174, 3.6792), tried(0.016, 3.7981, 5.8452)
    assert all("with every seed" in sentence for sentence in tune.verdict([low, best, high])[1:])


def test_a_best_rate_at_the_edge_is_reported():
    assert "edge of 3: not settled" in tune.verdict([tried(r, 1 / r) for r in (1.0, 2.0, 4.0)])[1]


def test_rates_are_read():
    assert tune.read_learning_rates("4e-3,0.001, 0.002") == [0.001, 0.002, 0.004]
    for text in ("0.001,0.002", "a,b,c", "0,1,2", "1,2,inf", "1,2,nan", "nan,1,2", "1,nan,2", ""):
        with pytest.raises(BadInput, match="--learning-rates"):
            tune.read_learning_rates(text)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command line over a small text, in an empty folder."""
    stories = "".join(f"One day a cat saw {i} dogs. They ran.\n<|endoftext|>\n" for i in range(400))
    (tmp_path / "stories.txt").write_text(stories)
    monkeypatch.chdir(tmp_path)
    line = ["tune", "--size", "nano", "--data", "stories.txt", "--device", "cpu", "--batch-size", "4"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", merged([*line, *more]))
        tune.main()
        return json.loads((tmp_path / "results" / "bench" / "tune_phase1_nano.json").read_text())

    return run


def test_a_real_search_is_reused(command, monkeypatch, capsys):
    line = ("--learning-rates", "0.0005,0.002,0.008", "--seeds", 1, "--max-tokens", 1024)
    monkeypatch.setattr(tune, "MOST_TRIALS", 3)
    log = command(*line)
    assert log["complete"]
    assert [one["learning_rate"] for one in log["learning_rates"]] == [0.0005, 0.002, 0.008]
    assert [one["losses"] for one in log["learning_rates"]] == [[run["best_valid_loss"]] for run in log["runs"]]
    assert len({run["best_valid_loss"] for run in log["runs"]}) == 3
    assert all(run["tokens"] == 1024 and run["evals"] for run in log["runs"])
    assert f"best learning rate: {log['best']:g}" in capsys.readouterr().out

    monkeypatch.setattr("bench.compare.runs.run_to_end", lambda *_: pytest.fail("a finished run was repeated"))
    again = command(*line)
    assert (again["runs"], again["learning_rates"]) == (log["runs"], log["learning_rates"])
    with pytest.raises(BadInput, match="another budget_tokens"):
        command(*line[:-1], 2048)


def test_other_rates_are_added_to_a_log_that_never_loses_any(command, monkeypatch, tmp_path):
    """As its own advice says: continue with --learning-rates around the edge."""
    best, made = 0.064, []

    def execute(run, say):
        made.append(run.plan.recipe.learning_rate)
        if len(made) == interrupted:
            raise KeyboardInterrupt
        return finished(1 + abs(math.log(made[-1] / best)))

    monkeypatch.setattr(tune, "execute", execute)
    monkeypatch.setattr(tune, "MOST_TRIALS", 3)
    line, log = ("--seeds", 1), tmp_path / "results" / "bench" / "tune_phase1_nano.json"

    def rates():
        return [one["learning_rate"] for one in json.loads(log.read_text())["learning_rates"]]

    interrupted = None
    assert (
        "not settled; continue with --learning-rates around it"
        in command(*line, "--learning-rates", "0.004,0.008,0.016")["verdict"][1]
    )
    for interrupted in (5, 10):
        with pytest.raises(Interrupted):
            command(*line, "--learning-rates", "0.016,0.032,0.064,0.128")
        assert rates() == [0.004, 0.008, 0.016] + [0.032] * (interrupted == 10)
    interrupted = None
    whole = command(*line, "--learning-rates", "0.016,0.032,0.064,0.128")
    assert rates() == [0.004, 0.008, 0.016, 0.032, 0.064, 0.128]
    assert (whole["best"], len(whole["runs"])) == (best, 6)


def test_every_phase_gets_the_same_budget_and_seeds(command, monkeypatch):
    runs = []

    def execute(run, say):
        runs.append(run)
        return finished(1 + abs(math.log(run.plan.recipe.learning_rate / TUNED)))

    monkeypatch.setattr(tune, "execute", execute)
    log = command()
    assert {run.plan.limits.max_tokens for run in runs} == {600_000} == {log["budget_tokens"]}
    assert sorted((run.plan.recipe.learning_rate, run.plan.seed) for run in runs) == [
        (r, s) for r in AROUND for s in (0, 1)
    ]
    assert len({run.fingerprint for run in runs}) == 10


def test_a_failed_run_ends_the_search_and_ctrl_c_resumes(command, monkeypatch):
    monkeypatch.setattr(tune, "execute", lambda *_, **__: Finished(status="failed", error="disk full"))
    with pytest.raises(RunFailed, match=f"rate {AROUND[0]:g}, seed 0: disk full"):
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
