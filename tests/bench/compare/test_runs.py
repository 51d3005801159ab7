"""Runs: their fingerprints, and tiny real ones in MLX and in PyTorch."""

import concurrent.futures
import fcntl
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from bench.compare import runs, sources
from bench.compare.runs import Run
from bench.compare.variants import Variant
from bench.workers.process import Ended
from mlx_transformer.run.settings import Settings
from mlx_transformer.train.optim.schedules import Linear
from mlx_transformer.train.trainer import RunOptions, fit
from mlx_transformer.utils.errors import RunFailed
from tests.bench.compare.tiny import BUDGET, TINY, needs_torch
from tests.faults.runs import CLOCKS


def test_a_fingerprint_is_of_everything_that_decides_a_result(planned, monkeypatch):
    (run,) = planned("--phases", 1).runs
    (more,) = planned("--phases", 1, "--max-tokens", 2 * BUDGET).runs
    (dry,) = planned("--phases", 1, "--dropout", 0).runs
    (deep,) = planned("--phases", 1, "--n-layers", 3).runs
    copy = replace(run, variant=replace(run.variant, copy=2))
    prints = [one.fingerprint for one in (run, run.with_settings(seed=1), more, dry, deep, copy)]
    assert len(set(prints)) == len(prints)
    assert planned("--phases", 1).runs[0].fingerprint == run.fingerprint
    with monkeypatch.context() as patched:
        patched.setenv("MLX_DISABLE_COMPILE", "1")
        assert planned("--phases", 1).runs[0].fingerprint != run.fingerprint
    monkeypatch.setattr(runs, "planned_checksum", lambda *sources: "other")
    assert planned("--phases", 1).runs[0].fingerprint != run.fingerprint


def test_comments_do_not_change_the_code(monkeypatch, tmp_path):
    (tmp_path / "phases").mkdir()
    source = tmp_path / "phases" / "phase1.py"
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    (tmp_path / "mlx_transformer" / "run").mkdir(parents=True)
    (tmp_path / "mlx_transformer" / "run" / "plan.py").touch()
    seen = []
    for text in ("a = 1\n", '"""Of a."""\na = 1  # one\n\n', "a = 2\n"):
        source.write_text(text)
        seen.append(sources.checksum(1, (), "mlx"))
    assert seen[0] == seen[1] != seen[2]
    (tmp_path / "mlx_transformer" / "kernel.cpp").write_text("int one;")
    assert sources.checksum(1, (), "mlx") != seen[2] == sources.checksum(1, (), "torch")


def test_a_run_is_the_command_of_its_phase_and_is_made_once(tiny, cache, monkeypatch):
    run = tiny()
    assert runs.find_finished(run, cache).status == "missing"
    finished = runs.execute(run, cache)
    assert (finished.status, finished.error) == ("done", None)
    assert finished.result["tokens"] == finished.evals[-1]["tokens"] == 28 * run.step_tokens
    assert [one["tokens"] for one in finished.evals[:2]] == [720, 1440]
    assert not (finished.folder / "checkpoints").exists()
    monkeypatch.setattr(runs, "run_to_end", lambda *_, **__: pytest.fail("a finished run was repeated"))
    assert runs.execute(run, cache) == finished


def test_the_progress_of_a_run_is_that_of_its_curve(tiny, tmp_path):
    run, path = tiny(), tmp_path / "curve.jsonl"
    assert runs.progress(run, tmp_path, 10.4) == "10 s: no step logged yet"
    path.write_text('{"kind": "log", "step": 7, "tokens": 500, "seconds": 3.0, "loss": 4.5}\n{"kind": "ev')
    assert runs.progress(run, tmp_path, 20.0) == "20 s: step 7, 25% of the budget, loss 4.500"
    path.write_text('{"kind": "eval", "step": 1200, "tokens": 1500, "seconds": 9.0, "valid_loss": null}\n')
    assert runs.progress(run, tmp_path, 30.0) == "30 s: step 1,200, 75% of the budget, validation loss not finite"


def test_progress_is_said_while_a_run_trains(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.workers.process.WATCH_SECONDS", 0.2)
    said = []
    assert runs.execute(tiny(), tmp_path, said.append).status == "done"
    assert said[0].endswith("no step logged yet")


def test_a_run_that_outlived_its_parent_is_waited_for(tiny, cache, tmp_path, monkeypatch):
    run = tiny()
    made, folder = runs.execute(run, cache).folder, tmp_path / run.fingerprint
    monkeypatch.setattr(runs, "run_to_end", lambda *_, **__: pytest.fail("it was made again"))
    folder.mkdir()
    with (folder / ".lock").open("w") as lock, concurrent.futures.ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = pool.submit(runs.execute, run, tmp_path)
        concurrent.futures.wait([found], timeout=0.3)
        shutil.copytree(made, folder, dirs_exist_ok=True)
        (folder / "checkpoints").mkdir()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert found.result().status == "done"
    assert not (folder / "checkpoints").exists(), "tidied like one of its own"


def test_code_that_changes_on_the_way_leaves_no_run(tiny, cache, tmp_path, monkeypatch):
    run = tiny()
    made, folder = runs.execute(run, cache).folder, tmp_path / run.fingerprint

    def edited(*_, **__):
        shutil.copytree(made, folder, dirs_exist_ok=True)
        monkeypatch.setattr(runs, "checksum", lambda *sources: "other")
        return Ended(0, "", "")

    monkeypatch.setattr(runs, "run_to_end", edited)
    with pytest.raises(RunFailed, match="the code changed while phase 1, seed 0"):
        runs.execute(run, tmp_path)
    assert not folder.exists()
    monkeypatch.setattr(runs, "run_to_end", lambda *_, **__: pytest.fail("it was begun under the old fingerprint"))
    with pytest.raises(RunFailed, match="the code changed"):
        runs.execute(run, tmp_path)


def test_a_run_that_cannot_be_made_says_why(tiny, tmp_path):
    run = tiny()
    (tmp_path / run.fingerprint).mkdir()
    (tmp_path / run.fingerprint / "curve.jsonl").mkdir()
    failed = runs.execute(run, tmp_path)
    assert failed.status == "failed"
    assert "could not write to" in failed.error


def test_an_interrupted_run_raises_once_it_has_ended(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "run_to_end", lambda *_, **__: Ended(130, "", "saved"))
    with pytest.raises(KeyboardInterrupt):
        runs.execute(tiny(), tmp_path)


@needs_torch
def test_a_reference_run_starts_as_ours_and_goes_on_as_if_never_stopped(tiny, tmp_path):
    from bench.reference import train

    ours = tiny(dropout=0.1)
    run = replace(ours, variant=replace(ours.variant, backend="torch"))
    ends = []
    for name, stop_at in (("whole", None), ("stopped", 13)):
        folder = tmp_path / name
        runs._lay_out(run, folder)
        if stop_at:
            first = train.Run(folder)
            take_step = first._step

            def step(first=first, take_step=take_step, stop_at=stop_at):
                loss = take_step()
                first.interrupted = first.progress.step == stop_at
                return loss

            first._step = step
            assert first.train() == "interrupted"
            (folder / "curve.jsonl").open("a").write('{"kind": "log", "step": 14')  # killed while it wrote
        last = train.Run(folder)
        why = last.train()
        ends.append({key: value for key, value in last.result(why).items() if key not in CLOCKS})
        lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
        ends.append([{key: value for key, value in line.items() if key != "seconds"} for line in lines])
    assert ends[:2] == ends[2:]
    result, lines = ends[:2]
    assert (result["stopped"], result["backend"], result["tokens"]) == ("max_tokens", "torch", 28 * run.step_tokens)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [10, 20, 28]


@needs_torch
def test_a_reference_sees_our_rows_and_stops_by_our_rule(tiny, cache):
    from bench.reference import train

    run = tiny()
    run = replace(run, variant=replace(run.variant, backend="torch"))
    finished = runs.execute(run, cache)
    assert finished.status == "done", finished.error
    assert finished.result["parameters"]["total"] == run.plan.make_model().count_parameters()["total"]
    mine = runs.execute(replace(run, variant=Variant(phase=1)), cache)
    assert [one["tokens"] for one in finished.evals] == [one["tokens"] for one in mine.evals]
    np.testing.assert_allclose(*([one["valid_loss"] for one in own.evals] for own in (finished, mine)), atol=0.05)
    assert not list(finished.folder.glob("*.np[yz]"))
    plateau = train.stop_rule({"kind": "Plateau", "patience": 2, "min_improvement": 0.1})
    assert [plateau([5, 4, *rest]) for rest in ([], [3.95], [3.95, 3.9], [3.95, 3.8])] == [False, False, True, False]
    with pytest.raises(ValueError, match="Surprise"):
        train.stop_rule({"kind": "Surprise"})


@needs_torch
def test_a_reference_ends_with_its_schedule_as_ours_does(text, tmp_path):
    from bench.reference import train

    run = Run.of(Variant(phase=2), Settings(size="nano", data=str(text), max_tokens=2000, eval_every=10, **TINY))
    ending = replace(run.plan.recipe, schedule=Linear(warmup_tokens=100, total_tokens=1440))
    run = Run(variant=Variant(phase=2, backend="torch"), plan=replace(run.plan, recipe=ending))
    runs._lay_out(run, tmp_path)
    theirs = train.Run(tmp_path)
    assert theirs.train() == "plateau"
    ours = list(
        fit(run.plan.make_model(), ending, run.plan.tokens, limits=run.plan.limits, options=RunOptions(eval_every=10))
    )
    assert (theirs.progress.step, "plateau") == (20, ours[-1].why) == (ours[-1].progress.step, "plateau")


@needs_torch
def test_what_has_no_reference_says_why(tiny):
    own = tiny()
    branch = replace(own, variant=replace(own.variant, branch="none"))
    odd = replace(own, plan=replace(own.plan, recipe=replace(own.plan.recipe, dtype="float16")))
    first, second, third = runs.missing_references([own, branch, odd])
    assert first is None
    assert "'none'" in second
    assert "float16" in third
