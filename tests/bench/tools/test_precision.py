"""Precisions compared: which runs are made, what is set against what, and what ends it."""

import json
import sys

import pytest

from bench.compare.runs import Finished
from bench.tools import precision
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed
from tests.faults.runs import merged


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command in an empty folder, on a text of a few words; its log."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 400)

    def run(*flags):
        line = ["bench.tools.precision", "--data", "text.txt", "--steps", 3, "--seeds", 2, *flags]
        monkeypatch.setattr(sys, "argv", merged(line))
        precision.main()
        return json.loads((tmp_path / "results" / "bench" / "precision_phase2_nano.json").read_text())

    return run


def test_every_precision_is_compared_with_float32_of_the_same_seed(command, monkeypatch):
    runs = []

    def execute(run, say):
        runs.append(run)
        loss = {"float32": 4.0, "float16": 4.1, "bfloat16": 3.0}[run.plan.recipe.dtype] * (1 + run.plan.seed)
        return Finished(status="done", evals=({"valid_loss": 9.0}, {"valid_loss": loss}))

    monkeypatch.setattr(precision, "execute", execute)
    log = command()
    assert len({run.fingerprint for run in runs}) == 6
    assert {(run.plan.limits.max_steps, run.plan.size) for run in runs} == {(3, "nano")}
    assert [one["losses"] for one in log["dtypes"]] == [[4.0, 8.0], [4.1, 8.2], [3.0, 6.0]]
    assert [pytest.approx(one["above"]) for one in log["dtypes"]] == [[0, 0], [0.025, 0.025], [-0.25, -0.25]]
    assert command()["dtypes"] == log["dtypes"], "given again, it makes its own log again"
    with pytest.raises(BadInput, match="is there already"):
        command("--out", "results/bench/precision_phase2_nano.json")


def test_a_real_run_of_each(command):
    log = command("--seeds", 1)
    assert [one["dtype"] for one in log["dtypes"]] == ["float32", "float16", "bfloat16"]
    losses = [one["losses"][0] for one in log["dtypes"]]
    assert len(set(losses)) == 3, "each computes in another precision"
    assert losses == pytest.approx([losses[0]] * 3, rel=0.01)


def test_a_failed_run_is_an_error_and_ctrl_c_resumes(command, monkeypatch):
    monkeypatch.setattr(precision, "execute", lambda *_, **__: Finished(status="diverged"))
    with pytest.raises(RunFailed, match="float32, seed 0: diverged"):
        command()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(precision, "execute", interrupt)
    with pytest.raises(Interrupted, match="the same command resumes"):
        command()
    with pytest.raises(BadInput, match="recipe 'none' is unknown"):
        command("--recipe", "none")
