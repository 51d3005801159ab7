"""`bench footprint`, `bench tasks` and `bench growth`: what they plan and write, with runs that are made up."""

import json

import pytest

from bench import __main__ as bench
from bench import logfile
from bench.compare.runs import Finished
from bench.compare.variants import Variant
from bench.tools import footprint, growth, growth_plots, task_plots, tasks
from bench.tools.horizon import ending_at
from bench.tools.throughput import make_task
from mlx_transformer.utils.errors import BadInput
from tests.faults.runs import assert_bad, command, write_text

NANO = ("--size", "nano", "--device", "cpu", "--seeds", "3")


def recipe_of(variant):
    return variant.experiment.find_recipe(variant.recipe_name)[0].at("nano")


def test_a_schedule_ends_with_the_budget():
    own = recipe_of(ending_at(Variant(phase=6, branch="mamba"), "nano", 1_200_000))
    assert (own.schedule.total_tokens, own.schedule.decay_tokens) == (1_200_000, 780_000)
    assert own.stop.patience > 1000
    assert recipe_of(ending_at(Variant(phase=6), "nano", 100_000, 0.4)).schedule.decay_tokens == 40_000
    sparse = recipe_of(ending_at(Variant(phase=6, recipe="rigl"), "nano", 1_200_000))
    assert [one.optimizer.until for one in sparse.groups if one.name == "matrices"] == [879]
    endless = recipe_of(ending_at(Variant(phase=1), "nano", 1_200_000))
    assert endless.schedule == recipe_of(Variant(phase=1)).schedule


def test_the_caches_have_the_bytes_of_their_arrays():
    def caches(branch, seq_len):
        task = make_task(4, "nano", "cpu", branch=branch, seq_len=seq_len)
        return footprint.cache_bytes(Variant(phase=4).experiment.find_branch(branch), task.config)

    width = 2 * 2 * 16  # keys and values of two heads
    assert caches(None, 64) == 2 * (64 * (width + 1) + 1) * 4
    assert caches("linear", 64) == caches("linear", 512) == 2 * 2 * 16 * 17 * 4
    assert caches("window", 64) == caches("window", 512) == 2 * 32 * (width + 1) * 4


def test_the_footprint_of_a_variant(monkeypatch, tmp_path):
    answer = {"peak_bytes": {"step": 5_000_000}, "facts": {}}  # tests/bench/tools/test_memory.py measures one
    monkeypatch.setattr(footprint, "measure_once", lambda worker, **request: answer)
    out = tmp_path / "footprint.json"
    line = ("footprint", "--phases", "4/linear", "--size", "nano", "--device", "cpu", "--out", out)
    assert command(bench.main, *line).code == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["step_bytes"] == 5_000_000
    assert list(row["cache_bytes"]) == ["64", "8192"]
    assert_bad(command(bench.main, "footprint", "--size", "nano"), "--phases is missing")


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Runs that train nothing: a curve of three evaluations, with accuracies, to the end of the budget."""
    made = []

    def execute(run, say=None):
        folder = tmp_path / "runs" / run.fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model").mkdir(exist_ok=True)
        end, bonus = run.plan.limits.max_tokens, 0.1 * run.plan.seed
        lines = [
            {"kind": "eval", "tokens": end * i // 3, "valid_loss": 4.0 - i / 3 - bonus, "accuracy": i / 4}
            for i in (1, 2, 3)
        ]
        (folder / "curve.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        level = {"level": "64 pairs, 4x length", "trained": False, "accuracy": 0.2, "floor": 0.0, "ceiling": 1.0}
        score = {"accuracy": 0.7 + bonus, "levels": [level, level | {"level": "2 pairs", "trained": True}]}
        result = {"tokens": end, "parameters": {"total": 9}, "best_valid_loss": 3.0, "train_seconds": 1.0}
        result["quality"] = {"task": score}
        (folder / "result.json").write_text(json.dumps(result))
        made.append(run)
        return Finished(status="done", result=result, folder=folder)

    for tool in (tasks, growth):
        monkeypatch.setattr(tool, "execute", execute)
        monkeypatch.setattr(tool, "RUNS", tmp_path / "runs")
    return made


def test_tasks_are_trained_scored_and_drawn(made_up, tmp_path):
    out = tmp_path / "tasks"
    line = ("tasks", "--phases", "6", "1", *NANO, "--tasks", "recall", "--max-tokens", "50000", "--out", out)
    done = command(bench.main, *line)
    assert done.code == 0, done.err
    assert "phase 6" in done.out
    log = json.loads((out / "tasks.json").read_text())
    assert log["complete"]
    assert task_plots.accuracies(log, "phase 6", "recall") == pytest.approx([0.7, 0.8, 0.9])
    assert task_plots.accuracies(log, "phase 1", "recall", "64 pairs, 4x length") == [0.2] * 3
    assert [run.plan.recipe.schedule.total_tokens for run in made_up if run.variant.phase == 6] == [50_000] * 3
    assert (out / "tasks.png").stat().st_size > 10_000
    assert len(list(out.glob("runs/*/curve.jsonl"))) == 6
    assert [row[3].text for row in task_plots.levels_table(log).rows] == ["**20.0** (20.0–20.0)"] * 2
    logfile.check_folder(out, tasks.LOG, {"identity": log["identity"]})
    with pytest.raises(BadInput, match="holds something else"):
        logfile.check_folder(out, tasks.LOG, {"identity": "another"})


def test_what_grows_has_the_same_compute(made_up, monkeypatch, tmp_path):
    sources = []

    def plan(self, kind, seed, compute, decay, *, end=None, source=None, own=growth.Study.plan):
        sources.append(source)
        return own(self, kind, seed, compute, decay, end=end)  # there is no model to grow

    monkeypatch.setattr(growth.Study, "plan", plan)
    out = tmp_path / "growth"
    line = ("growth", "--data", write_text(tmp_path / "text.txt"), "--size", "nano", "--device", "cpu")
    done = command(bench.main, *line, "--seeds", "1", "--max-tokens", "90000", "--out", out)
    assert done.code == 0, done.err
    log = json.loads((out / "growth.json").read_text())
    assert log["complete"]
    spent = [
        run["spent_before"] + run["tokens"] * run["flops_per_token"]
        for run in log["runs"]
        if run["share"] is None or run["grown"]
    ]
    assert spent == pytest.approx([log["compute_flops"]] * 7, rel=1e-4)
    assert sum(source is not None for source in sources) == 4
    assert {run["tokens"] for run in log["runs"] if run["share"] and not run["grown"]} == {27_000, 54_000}
    assert [row[0].text for row in growth_plots.table(log).rows][3:5] == ["experts grown at 30 %", "deep grown at 30 %"]
    assert (out / "growth.png").stat().st_size > 10_000
    assert_bad(command(bench.main, *line, "--shares", "2"), "numbers between 0 and 1")
    assert_bad(command(bench.main, *line, "--phase", "3"), "moe")
