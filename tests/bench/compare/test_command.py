"""The command line: the comparison that it plans, and how it ends."""

import json
from dataclasses import replace

import jsonschema
import pytest

from bench.compare import command, comparison, forecast
from bench.compare.command import Flags
from mlx_transformer.utils.errors import BadInput, Interrupted, exit_cleanly
from phases import phase1
from tests.bench.compare.tiny import BUDGET, SCHEMA, needs_torch
from tests.faults.runs import command as run_command


def test_an_ablation_is_every_branch_and_recipe_of_one_phase(planned, monkeypatch):
    class Wide(phase1.Model):
        pass

    monkeypatch.setattr(phase1, "BRANCHES", {"wide": Wide})
    monkeypatch.setattr(phase1, "RECIPES", {"slow": replace(phase1.RECIPE, learning_rate=1e-5)})
    names = [run.variant.name for run in planned("--phases", 1, "--ablate").runs]
    assert names == ["phase 1", "phase 1/wide", "phase 1:slow"]
    for line in (("1", "1"), ("1/wide",)):
        with pytest.raises(BadInput, match="expected one phase"):
            planned("--phases", *line, "--ablate")
    monkeypatch.setattr(phase1, "BRANCHES", {})
    monkeypatch.setattr(phase1, "RECIPES", {})
    with pytest.raises(BadInput, match="phase 1 has no branch or recipe to ablate: give"):
        planned("--phases", 1, "--ablate")


def test_an_idea_alone_is_compared_with_the_phase_before(planned):
    planned_comparison = planned("--phases", 6, "--ablate")
    over = {run.variant.name: planned_comparison.over(run.variant).name for run in planned_comparison.runs[1:]}
    assert planned_comparison.baseline.name == over["phase 6"] == "phase 5"
    assert over["phase 6/phase_5_with_softcap:phase_5"] == "phase 5"
    assert over["phase 6/phase_5:phase_5_with_muon"] == "phase 5"
    assert (
        over["phase 6/with_softcap"] == over["phase 6:without_muon"] == over["phase 6:with_batch_warmup"] == "phase 6"
    )
    assert not {"phase 6/phase_5", "phase 6:phase_5"} & over.keys()
    document = comparison.begin(planned_comparison).document()
    assert {row["name"]: row["over"] for row in document["speedups"]} == {}, "nothing has run yet"


def test_the_trunk_of_an_ablation_has_the_reference(planned):
    pytest.importorskip("torch", reason="torch is not installed")
    names = [run.variant.name for run in planned("--phases", 2, "--ablate", "--reference", "torch").runs]
    assert names[:3] == ["phase 1", "phase 2", "phase 2 · torch"]
    assert sum("torch" in name for name in names) == 1


def test_a_cpu_does_not_ablate_halves_of_a_float32(planned):
    names = [run.variant.name for run in planned("--phases", 2, "--ablate").runs]
    assert not {"phase 2:fp16", "phase 2:bf16"} & set(names)
    assert "phase 2:original" in names


def test_the_lowest_trunk_is_the_baseline(planned, monkeypatch):
    monkeypatch.setattr(phase1, "RECIPES", {"slow": phase1.RECIPE})
    assert [run.variant.name for run in planned("--phases", "1:slow", 1).runs] == ["phase 1", "phase 1:slow"]


def test_evaluations_are_so_dense_that_a_budget_has_ten(planned):
    (run,) = planned("--phases", 1).runs
    assert run.plan.settings.eval_every * run.step_tokens <= BUDGET / 10 < run.plan.recipe.eval_tokens
    (run,) = planned("--phases", 1, "--max-tokens", 2_000_000).runs
    assert run.plan.settings.eval_every is None, "the recipe's own are dense enough"


def test_a_forecast_ends_where_the_schedule_does(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(forecast, "_times", lambda cache: {(n, None, None, "nano", "mlx"): (1.0, 9.0) for n in (1, 2)})
    first, second = planned("--phases", 1, 2, "--max-tokens", 2_000_000).runs
    assert forecast.forecast(first, 1, tmp_path) == (2_000_009,) * 2, "phase 1's schedule has no end"
    between = second.evaluate_every * second.step_tokens
    end = -(-second.plan.recipe.schedule.total_tokens // between) * between
    assert forecast.forecast(second, 1, tmp_path) == (end + 9,) * 2, "and so long it compiles"


def test_a_forecast_without_earlier_runs_is_a_range(planned, monkeypatch, tmp_path):
    """Phase 1 at nano reached 42,600 tokens/s where a core's products reach 120 GFLOP/s."""
    monkeypatch.setattr(forecast, "_matmul_gflops", lambda: 120.0)
    (run,) = planned("--phases", 1, "--max-tokens", 2_000_000).runs
    low, high = forecast.forecast(run, 231_040, tmp_path)
    assert low < 2_000_000 / 42_600 < high < 3 * low


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("--target", "low"), "--target 'low'"),
        (("--target", "-1"), "--target '-1'"),
        (("--target", "3", "--two-budgets"), "--two-budgets and --target 3 exclude each other"),
        (("--reference", "jax"), "'jax'"),
        (("--phases", "7"), "present are"),
    ],
)
def test_bad_input_is_one_sentence(planned, line, said):
    with pytest.raises(BadInput, match=said):
        planned(*line)


def test_a_reference_that_is_not_installed_is_named_with_its_command(planned, monkeypatch):
    monkeypatch.setattr(command, "has_torch", lambda: False)
    monkeypatch.setattr("bench.workers.machine.has_torch", lambda: False)
    with pytest.raises(BadInput, match="make test installs it"):
        planned("--reference", "torch")
    assert command._backends(None) == ()


def test_a_missing_reference_is_said_and_left_out(planned, monkeypatch):
    said = []
    monkeypatch.setattr(command, "missing_references", lambda runs: [None, *("no such file" for _ in runs[1:])])
    flags = Flags(phases=("1", "1"))
    runs = planned("--phases", 1, 1).runs
    by_variant = command._with_references(runs, ("torch",), None, flags, said.append)
    assert [[run.variant.name for run in family] for family in by_variant] == [
        ["phase 1", "phase 1 · torch"],
        ["phase 1 #2"],
    ]
    assert said == ["phase 1 #2 has no reference in PyTorch: no such file"]
    monkeypatch.setattr(command, "missing_references", lambda runs: ["no such file" for _ in runs])
    with pytest.raises(BadInput, match="--reference torch: no such file"):
        command._with_references(runs, ("torch",), None, replace(flags, reference="torch"), said.append)


def test_ctrl_c_names_the_folder_to_go_on_with(planned, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    planned_comparison = planned("--phases", 1)
    monkeypatch.setattr(command, "read", lambda flags, say: planned_comparison)
    monkeypatch.setattr(command, "compare", interrupted)
    monkeypatch.setattr(command, "end_as_by_ctrl_c", lambda: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["compare", "--phases", "1"])
    with pytest.raises(Interrupted, match=r"resume with: python -m bench.compare --phases 1 --out=results/bench/\d+_"):
        command.main()


def test_the_plan_runs_nothing(planned, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    planned_comparison = planned("--phases", 1, 1)
    monkeypatch.setattr(command, "read", lambda flags, say: planned_comparison)
    monkeypatch.setattr(command, "end_as_by_ctrl_c", lambda: None)
    shown = run_command(command.main, "--plan")
    assert shown.code == 0, shown
    assert "phase 1 #2" in shown.out
    assert list(tmp_path.iterdir()) == []


@needs_torch
@pytest.mark.slow
def test_a_quick_comparison_from_end_to_end(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "end_as_by_ctrl_c", lambda: None)
    line = ("--phases", "1", "--quick", "--max-tokens", "40960", "--data", text, "--out", tmp_path / "out")
    done = run_command(lambda: exit_cleanly(command.main), *line)
    assert done.code == 0, done
    log = json.loads((tmp_path / "out" / "compare.json").read_text())
    jsonschema.validate(log, SCHEMA)
    assert log["complete"]
    assert [row["a"] + row["b"] for row in log["speed"]] == ["phase 1phase 1 · torch"]
    assert "rough" in done.out.lower()
    assert (tmp_path / "out" / "compare.html").is_file()
    assert len(list((tmp_path / "out" / "runs").glob("*/curve.jsonl"))) == 4
