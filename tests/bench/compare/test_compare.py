"""The comparison: what is planned, run, found again and concluded, over fake runs and over tiny real ones."""

import concurrent.futures
import fcntl
import importlib.util
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.compare import compare, outputs, plan, rates, target
from bench.compare.compare import Flags
from bench.compare.plan import Finished, Run, Variant
from bench.compare.stats import Interval
from bench.workers import training_step
from bench.workers.mlx_worker import TrainingRounds
from bench.workers.process import Ended
from mlx_transformer.nn.config import SIZES
from mlx_transformer.run.flags import parse
from mlx_transformer.run.settings import Settings
from mlx_transformer.train.optim.schedules import BatchWarmup, Linear
from mlx_transformer.train.trainer import RunOptions, fit
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed
from phases import phase1
from tests.faults.runs import command, write_text

SCHEMA = json.loads((Path(compare.__file__).parent / "compare.schema.json").read_text())
BUDGET = 100_000
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed: make test installs it"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def planned(text):
    """A comparison as a command line asks for it."""

    def make(*line):
        shared = ("--data", text, "--size", "nano", "--max-tokens", BUDGET, "--reference", "none")
        return compare.read(parse(Flags, "compare", args=[*map(str, shared), *map(str, line)]), lambda said: None)

    return make


STEPS_OF_100 = {"recipe": {"batch_tokens": 115}, "config": {"seq_len": 20}}


class World:
    """Runs that are made up: by contender how fast it learns, how fast it computes, and what befalls it."""

    def __init__(self, **odd):
        self.odd, self.executed, self.measured = odd, [], []

    def __call__(self, run, cache):
        name, seed = run.variant.name, run.plan.seed
        self.executed.append((name, seed))
        own = {"learns": 1.0, "computes": 1.0, "befalls": lambda seed: "done", **self.odd.get(name, {})}
        status = own["befalls"](seed)
        if status == "interrupted":
            raise KeyboardInterrupt
        if status == "failed":
            return Finished(status="failed", error="out of memory")
        noise = np.random.default_rng([seed, *name.encode()]).normal(1, 0.02)
        best = 2 + 0.02 * seed
        end = BUDGET // 2 if status == "diverged" else run.plan.limits.max_tokens
        evals = tuple(
            {
                "tokens": tokens,
                "seconds": tokens / 1000 / own["computes"] * noise,
                "valid_loss": best + 3 * math.exp(-own["learns"] * tokens / 30_000),
            }
            for tokens in range(10_000, end + 1, 10_000)
        )
        result = {"steps": end // 100, "tokens": end, "stopped": status, "train_seconds": 1.0, **STEPS_OF_100}
        result |= {"best_valid_loss": min(one["valid_loss"] for one in evals), "quality": {}}
        return Finished(status=status, result=result, evals=evals)

    def measure(self, runs, count, least, say):
        """A group as rates.measure makes it."""
        draw, own = np.random.default_rng(7), [self.odd.get(run.variant.name, {}) for run in runs]
        self.measured.append([run.variant.name for run in runs])
        if any("dies" in one for one in own):
            raise RunFailed("a contestant failed: ended by signal 9")
        return {
            run.variant.name: {
                "step_tokens": 1000,
                "steps_per_round": 1,
                "seconds_per_step": (draw.normal(1, 0.01, count) / one.get("computes", 1.0)).tolist(),
                "memory_bytes": 1,
                "facts": {},
            }
            for run, one in zip(runs, own, strict=True)
        }


@pytest.fixture
def made_up(planned, monkeypatch, tmp_path):
    """Compare what the command line names, in a made-up world; the log, which fits the schema, and the world."""
    monkeypatch.setattr(outputs, "write_all", lambda log, folder: [])
    monkeypatch.setattr(rates, "parity", lambda run, say: pytest.fail("there is no reference"))

    def make(*line, **odd):
        world = World(**odd)
        monkeypatch.setattr(plan, "execute", world)
        monkeypatch.setattr(rates, "measure", world.measure)
        log = compare.compare(planned(*line), tmp_path / "out", tmp_path / "cache", lambda said: None)
        jsonschema.validate(json.loads((tmp_path / "out" / "compare.json").read_text()), SCHEMA)
        return log, world

    return make


def the(rows, **wanted):
    (found,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return found


def test_a_phase_against_itself_shows_no_difference(made_up):
    log, world = made_up("--phases", 1, 1)
    assert world.executed == [(name, seed) for seed in range(5) for name in ("phase 1", "phase 1 #2")]
    assert log["complete"]
    assert [row["share_of_budget"] for row in log["speedups"]] == [0.5, 1]
    for row in log["speedups"]:
        for way in ("clock", "tokens", "tokens_over_rate"):
            assert row[way]["verdict"] == "no difference", (row["share_of_budget"], way)
    assert the(log["speed"], a="phase 1 #2", b="phase 1")["verdict"] == "no difference"


def test_a_slowdown_is_found_by_the_clock_and_not_in_the_tokens(made_up):
    log, _ = made_up("--phases", 1, 1, **{"phase 1 #2": {"computes": 1 / 1.3}})
    row = the(log["speedups"], share_of_budget=1)
    for way in ("clock", "tokens_over_rate"):
        assert row[way]["verdict"] == "slower"
        assert row[way]["ratio"] == pytest.approx(1 / 1.3, rel=0.05)
    assert row["tokens"] == {"ratio": 1, "low": 1, "high": 1, "verdict": "no difference"}
    assert the(log["speed"], a="phase 1 #2")["verdict"] == "slower"


def test_the_target_is_what_every_seed_of_the_baseline_reaches(made_up):
    log, _ = made_up("--phases", 1, 1, **{"phase 1 #2": {"learns": 2.0}})
    best = [run["result"]["best_valid_loss"] for run in log["runs"] if run["name"] == "phase 1"]
    assert log["target"]["loss"] == max(best)
    assert "over 5 seeds of phase 1's" in log["target"]["rule"]
    baseline, sooner = log["time_to_target"]
    assert (baseline["reached"], sooner["reached"]) == (5, 5)
    assert baseline["tokens"]["high"] == BUDGET, "the worst seed needs all of it"
    assert the(log["speedups"], share_of_budget=1)["tokens"]["verdict"] == "faster"
    assert the(log["speedups"], share_of_budget=0.5)["target_loss"] > log["target"]["loss"]


def test_two_budgets_are_compared_at_two_budgets(made_up):
    log, _ = made_up("--phases", 1, 1, "--two-budgets")
    assert log["budget_tokens"] == BUDGET
    assert log["runs"][0]["evals"][-1]["tokens"] == 2 * BUDGET
    losses = [row["target_loss"] for row in log["speedups"]]
    assert [row["share_of_budget"] for row in log["speedups"]] == [0.5, 1, 2]
    assert losses == sorted(losses, reverse=True)


def test_a_target_that_nobody_reached_is_shown_as_such(made_up):
    log, _ = made_up("--phases", 1, 1, "--target", 0.5)
    assert log["complete"]
    assert [(row["reached"], row["tokens"]["median"], row["clock"]["low"]) for row in log["time_to_target"]] == [
        (0, None, None)
    ] * 2
    (row,) = log["speedups"]
    assert row["clock"] == {"ratio": None, "low": None, "high": None, "verdict": "not reached"}


def test_a_diverged_run_counts_as_longer_than_any_other(made_up):
    log, _ = made_up("--phases", 1, 1, **{"phase 1 #2": {"befalls": lambda seed: "diverged" if seed < 2 else "done"}})
    assert log["complete"]
    assert [run["status"] for run in log["runs"]].count("diverged") == 2
    row = the(log["time_to_target"], name="phase 1 #2")
    assert (row["reached"], row["seeds"], row["tokens"]["high"]) == (3, 5, None)
    assert row["tokens"]["median"] is not None
    assert the(log["speedups"], share_of_budget=1)["tokens"]["low"] is None


def test_a_failed_run_is_named_and_tried_again(made_up):
    broken = {"phase 1 #2": {"befalls": lambda seed: "failed" if seed == 1 else "done"}}
    log, _ = made_up("--phases", 1, 1, **broken)
    assert not log["complete"]
    assert the(log["runs"], name="phase 1 #2", seed=1)["error"] == "out of memory"
    with pytest.raises(RunFailed, match=r"1 of 10 runs failed .*phase 1 #2, seed 1: out of memory"):
        compare._complain(log)
    log, world = made_up("--phases", 1, 1)
    assert log["complete"]
    assert ("phase 1 #2", 1) in world.executed


def test_without_a_baseline_there_is_nothing_to_compare_with(made_up):
    log, _ = made_up("--phases", 1, 1, **{"phase 1": {"befalls": lambda seed: "failed"}})
    assert (log["target"]["loss"], log["rates"], log["speedups"]) == (None, [], [])


def test_an_interrupted_comparison_goes_on_to_the_same_numbers(made_up, tmp_path):
    def stop(seed):
        return "interrupted" if seed == 3 else "done"

    with pytest.raises(KeyboardInterrupt):
        made_up("--phases", 1, 1, **{"phase 1 #2": {"befalls": stop}})
    left = json.loads((tmp_path / "out" / "compare.json").read_text())
    jsonschema.validate(left, SCHEMA)
    assert not left["complete"]
    assert [run["status"] for run in left["runs"]].count("done") == 7
    again, _ = made_up("--phases", 1, 1)
    measured = (tmp_path / "out" / "rates.json").read_bytes()
    (tmp_path / "out").rename(tmp_path / "before")
    whole, _ = made_up("--phases", 1, 1)
    for log in (again, whole):
        log.pop("machine")  # its load
    assert again == whole
    assert (tmp_path / "out" / "rates.json").read_bytes() == measured


def test_rates_are_not_measured_again(made_up, tmp_path):
    made_up("--phases", 1, 1)
    path = tmp_path / "out" / "rates.json"
    (group,) = json.loads(path.read_text())
    group["phase 1"]["memory_bytes"] = 12345
    path.write_text(json.dumps([group]))
    log, _ = made_up("--phases", 1, 1)
    assert the(log["rates"], name="phase 1")["memory_bytes"] == 12345


MANY = ("--phases", *[1] * 9, "--seeds", 1)  # two groups beside the baseline


def test_a_contestant_that_dies_costs_nothing_but_its_group(made_up, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(outputs, "write_all", lambda log, folder: written.append(log))
    with pytest.raises(RunFailed, match=r"ended by signal 9; all else is in .*the same command tries again"):
        made_up(*MANY, **{"phase 1 #2": {"dies": True}})
    left = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written == [left], "tables and pictures too"
    assert [run["status"] for run in left["runs"]] == ["done"] * 9
    assert [row["name"] for row in left["rates"]] == ["phase 1", "phase 1 #7", "phase 1 #8", "phase 1 #9"]
    assert not left["complete"]
    log, world = made_up(*MANY)
    assert world.measured == [["phase 1", *(f"phase 1 #{i}" for i in range(2, 7))]], "the other group was kept"
    assert log["complete"]
    assert len(log["rates"]) == 9


def test_each_group_is_kept_as_soon_as_it_is_measured(made_up, monkeypatch, tmp_path):
    def interrupted(self, runs, *others, measure=World.measure):
        if self.measured:
            raise KeyboardInterrupt
        return measure(self, runs, *others)

    with monkeypatch.context() as patched:
        patched.setattr(World, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made_up(*MANY)
    assert len(json.loads((tmp_path / "out" / "rates.json").read_text())) == 1
    assert len(made_up(*MANY)[1].measured) == 1


def test_a_complete_comparison_stays_so_when_the_command_is_repeated(made_up, monkeypatch):
    log, _ = made_up("--phases", 1, 1)
    finished = {(run["name"], run["seed"]): run for run in log["runs"]}

    def look(run, cache):
        known = finished[run.variant.name, run.plan.seed]
        return Finished(status="done", result=known["result"], evals=tuple(known["evals"]))

    monkeypatch.setattr(plan, "look", look)
    seen, write = [], compare.write_json
    monkeypatch.setattr(
        compare, "write_json", lambda path, value: seen.append((path.name, value)) or write(path, value)
    )
    made_up("--phases", 1, 1)
    assert [value["complete"] for name, value in seen if name == "compare.json"] == [True, True]


# What is planned


def test_contenders_are_named_and_read():
    for text in ("phase 3/rope:original #2 · torch", "phase 1"):
        own = Variant(phase=1) if text == "phase 1" else None
        own = own or Variant(phase=3, branch="rope", recipe="original", copy=2, backend="torch")
        assert own.name == text
    assert Variant.read("1") == Variant(phase=1)
    for text, said in (("9", "present are 1"), ("1/none", "'none'"), ("1:none", "'none'"), ("one", "'one'")):
        with pytest.raises(BadInput, match=said):
            Variant.read(text)


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
    comparison = planned("--phases", 6, "--ablate")
    over = {run.variant.name: comparison.over(run.variant).name for run in comparison.runs[1:]}
    assert comparison.baseline.name == over["phase 6"] == "phase 5"
    assert over["phase 6/phase_5_with_softcap:phase_5"] == "phase 5"
    assert over["phase 6/phase_5:phase_5_with_muon"] == "phase 5"
    assert (
        over["phase 6/with_softcap"] == over["phase 6:without_muon"] == over["phase 6:with_batch_warmup"] == "phase 6"
    )
    assert not {"phase 6/phase_5", "phase 6:phase_5"} & over.keys()
    document = compare.begin(comparison).document()
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
    monkeypatch.setattr(plan, "_known_paces", lambda cache: {(n, None, "nano", "mlx"): 1.0 for n in (1, 2)})
    first, second = planned("--phases", 1, 2, "--max-tokens", 2_000_000).runs
    assert plan.forecast(first, 1, tmp_path) == 2_000_000, "phase 1's schedule has no end"
    between = second.evaluate_every * second.step_tokens
    assert plan.forecast(second, 1, tmp_path) == -(-second.plan.recipe.schedule.total_tokens // between) * between


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
    monkeypatch.setattr(compare, "has_torch", lambda: False)
    monkeypatch.setattr("bench.workers.machine.has_torch", lambda: False)
    with pytest.raises(BadInput, match="make test installs it"):
        planned("--reference", "torch")
    assert compare._backends(None) == ()


def test_a_missing_reference_is_said_and_left_out(planned, monkeypatch):
    said = []
    monkeypatch.setattr(plan, "lacks_reference", lambda runs: [None, *("no such file" for _ in runs[1:])])
    flags = Flags(phases=("1", "1"))
    runs = planned("--phases", 1, 1).runs
    families = compare._with_references(runs, ("torch",), flags, said.append)
    assert [[run.variant.name for run in family] for family in families] == [
        ["phase 1", "phase 1 · torch"],
        ["phase 1 #2"],
    ]
    assert said == ["phase 1 #2 has no reference in PyTorch: no such file"]
    monkeypatch.setattr(plan, "lacks_reference", lambda runs: ["no such file" for _ in runs])
    with pytest.raises(BadInput, match="--reference torch: no such file"):
        compare._with_references(runs, ("torch",), replace(flags, reference="torch"), said.append)


def test_the_folder_is_found_again_until_it_is_complete(planned, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    own, other = planned("--phases", 1), planned("--phases", 1, "--seeds", 2)
    folder = compare.find_folder(own, None)
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(own.identity))
    assert compare.find_folder(own, None) == compare.find_folder(own, folder) == folder
    with pytest.raises(BadInput, match="holds something else"):
        compare.find_folder(other, folder)
    (folder / "compare.json").write_text('{"complete": true}')
    monkeypatch.setattr(compare.time, "strftime", lambda form: "later")
    assert compare.find_folder(own, None) == compare.RESULTS / "later"


def test_a_folder_that_cannot_be_used_is_bad_input(planned, monkeypatch, tmp_path):
    own, file = planned("--phases", 1), tmp_path / "file"
    file.touch()
    for out, said in ((file, "is a file"), (file / "below" / "it", "is a file"), (tmp_path / ("x" * 300), "too long")):
        with pytest.raises(BadInput, match=said):
            compare.find_folder(own, out)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BadInput, match="is not writable"):
        compare.find_folder(own, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_may_not_be_read_is_bad_input(planned, monkeypatch, tmp_path):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    own = planned("--phases", 1)
    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(BadInput, match="Permission denied"):
        compare.find_folder(own, tmp_path)


# Fingerprints


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
    monkeypatch.setattr(plan, "_code", lambda phase, backend: "other")
    assert planned("--phases", 1).runs[0].fingerprint != run.fingerprint


def test_comments_do_not_change_the_code(monkeypatch, tmp_path):
    (tmp_path / "phases").mkdir()
    source = tmp_path / "phases" / "phase1.py"
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    seen = []
    for text in ("a = 1\n", '"""Of a."""\na = 1  # one\n\n', "a = 2\n"):
        source.write_text(text)
        seen.append(plan._checksum(1, "mlx"))
    assert seen[0] == seen[1] != seen[2]
    (tmp_path / "mlx_transformer").mkdir()
    (tmp_path / "mlx_transformer" / "kernel.cpp").write_text("int one;")
    assert plan._checksum(1, "mlx") != seen[2] == plan._checksum(1, "torch")


# Time to target


def curve(*pairs):
    return tuple({"tokens": t, "seconds": t / 10, "valid_loss": loss} for t, loss in pairs)


def test_a_target_is_crossed_between_two_evaluations():
    evals = curve((100, 4.0), (200, 3.0), (300, 3.5), (400, 2.0))
    assert target.crossing(evals, 3.25) == (175, 17.5)
    assert target.crossing(evals, 3.0) == (200, 20.0)
    assert target.crossing(evals, 2.75) == (350, 35.0)
    assert target.crossing(evals, 5.0) == (100, 10.0)
    assert target.crossing(evals, 1.0) == target.crossing((), 1.0) == (math.inf, math.inf)


@given(st.lists(st.floats(1, 9), min_size=1, max_size=12), st.floats(0.5, 9.5), st.floats(0.5, 9.5))
def test_a_lower_target_is_never_crossed_sooner(losses, one, other):
    evals = curve(*enumerate(losses, 1))
    easy, hard = (target.crossing(evals, loss)[0] for loss in (max(one, other), min(one, other)))
    assert easy <= hard
    assert (hard < math.inf) == (min(losses) <= min(one, other))


def test_the_step_that_uses_up_the_budget_counts():
    result = {"steps": 12, "tokens": 1070, **STEPS_OF_100}  # the first steps were smaller
    finished = Finished(status="done", result=result, evals=curve((500, 4.0), (1070, 3.0)))
    assert target.best_within(finished, 1000) == 3.0
    assert target.best_within(finished, 900) == 4.0
    assert target.best_within(finished, 300) == math.inf


# Groups of contestants


def family(name, *backends, size="nano", step_tokens=2048, accumulate=1):
    """A contender as grouped() sees it: names, and what its memory is guessed from."""
    made = SimpleNamespace(config=SimpleNamespace(**SIZES[size]), recipe=SimpleNamespace(accumulate=accumulate))
    return [
        SimpleNamespace(
            variant=SimpleNamespace(name=f"{name}{own}", backend=own or "mlx"), plan=made, step_tokens=step_tokens
        )
        for own in ("", *backends)
    ]


def grouped(*families, parameters=250_000, bases=("a",)):
    names = [run.variant.name for family in families for run in family]
    groups = rates.grouped(families, dict.fromkeys(names, parameters), bases)
    return [[run.variant.name for run in group] for group in groups]


def test_the_baseline_is_measured_in_every_group():
    families = [family("a", "t"), *(family(f"{i}", "t") for i in range(5))]
    groups = grouped(*families)
    assert groups[0] == ["a", "at"], "by itself: with its reference it takes the most memory"
    assert [group[0] for group in groups[1:]] == ["a"] * 3
    assert [group[1:] for group in groups[1:]] == [["0", "0t", "1", "1t"], ["2", "2t", "3", "3t"], ["4", "4t"]]
    assert grouped(families[0]) == [["a", "at"]]
    assert grouped(*families[:3]) == [["a", "at", "0", "0t", "1", "1t"]], "all in turn where there is room"
    assert grouped(family("a"), family("b"), family("c")) == [["a", "b", "c"]]


def test_what_others_are_compared_with_is_measured_in_every_group():
    families = [family("a"), family("b"), *(family(f"{i}") for i in range(6))]
    assert grouped(*families, bases=("a", "b")) == [["a", "b", "0", "1", "2", "3"], ["a", "b", "4", "5"]]


def test_a_group_is_as_large_as_memory_allows():
    def base(name, *backends, **odd):
        return family(name, *backends, **{"size": "base", "step_tokens": 8192, **odd})

    a, rest = base("a", step_tokens=32_768), [base(f"{i}", "t") for i in range(3)]
    assert rates._bytes(a[0], 7_400_000) == pytest.approx(4.9e9, rel=0.05)
    assert rates._bytes(base("t", "t", step_tokens=32_768)[1], 7_400_000) == pytest.approx(8.2e9, rel=0.05)
    assert grouped(a, *rest, parameters=7_400_000) == [["a", "0", "0t", "1", "1t"], ["a", "2", "2t"]]
    large = [base(f"{i}", step_tokens=32_768) for i in range(3)]
    assert grouped(a, *large, parameters=7_400_000) == [["a", "0"], ["a", "1"], ["a", "2"]]
    parts = [base(f"{i}", step_tokens=32_768, accumulate=8) for i in range(3)]
    assert grouped(a, *parts, parameters=7_400_000) == [["a", "0", "1", "2"]]
    assert grouped(a, *large[:2], parameters=10**10) == [["a", "0"], ["a", "1"]], "never less than a family"


def test_rates_of_one_group_are_compared():
    def one(seconds, tokens):
        return {"step_tokens": tokens, "seconds_per_step": seconds, "memory_bytes": 1}

    a, b, c = one([1.0, 2, 4, 1, 1], 100), one([2.0, 4, 8, 2, 2], 400), one([1.0] * 5, 300)
    groups = [{"a": a, "b": b}, {"a": one([2.0] * 5, 100), "c": c}]
    assert rates.read(groups).ratio("b", "a") == Interval(value=2, low=2, high=2)
    assert rates.read(groups).ratio("c", "a").value == 6, "against what was measured beside it"
    assert [row["ratio"] for row in rates.speed(groups, [("b", "a"), ("c", "a"), ("d", "a")])] == [2, 6]
    assert [row["tokens_per_second"]["median"] for row in rates.rows(groups, {"a": 7, "c": 8})] == [100, 300]


# Real runs

TINY = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "seq_len": 24, "vocab_size": 384, "batch_size": 3}


@pytest.fixture
def tiny(text):
    def make(**settings):
        flags = Settings(size="nano", data=str(text), max_tokens=2000, eval_every=10, seed=0, **TINY, **settings)
        return Run.of(Variant(phase=1), flags)

    return make


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where a run that several tests need is found again."""
    return tmp_path_factory.mktemp("cache")


def test_a_run_is_the_command_of_its_phase_and_is_made_once(tiny, cache, monkeypatch):
    run = tiny()
    assert plan.look(run, cache).status == "missing"
    finished = plan.execute(run, cache)
    assert (finished.status, finished.error) == ("done", None)
    assert finished.result["tokens"] == finished.evals[-1]["tokens"] == 28 * run.step_tokens
    assert [one["tokens"] for one in finished.evals[:2]] == [720, 1440]
    assert not (finished.folder / "checkpoints").exists()
    monkeypatch.setattr(plan, "run_to_end", lambda *_: pytest.fail("a finished run was repeated"))
    assert plan.execute(run, cache) == finished


def test_a_run_that_outlived_its_parent_is_waited_for(tiny, cache, tmp_path, monkeypatch):
    run = tiny()
    made, folder = plan.execute(run, cache).folder, tmp_path / run.fingerprint
    monkeypatch.setattr(plan, "run_to_end", lambda *_: pytest.fail("it was made again"))
    folder.mkdir()
    with (folder / ".lock").open("w") as lock, concurrent.futures.ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = pool.submit(plan.execute, run, tmp_path)
        concurrent.futures.wait([found], timeout=0.3)
        shutil.copytree(made, folder, dirs_exist_ok=True)
        (folder / "checkpoints").mkdir()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert found.result().status == "done"
    assert not (folder / "checkpoints").exists(), "tidied like one of its own"


def test_code_that_changes_on_the_way_leaves_no_run(tiny, cache, tmp_path, monkeypatch):
    run = tiny()
    made, folder = plan.execute(run, cache).folder, tmp_path / run.fingerprint

    def edited(*_):
        shutil.copytree(made, folder, dirs_exist_ok=True)
        monkeypatch.setattr(plan, "_checksum", lambda phase, backend: "other")
        return Ended(0, "", "")

    monkeypatch.setattr(plan, "run_to_end", edited)
    with pytest.raises(RunFailed, match="the code changed while phase 1, seed 0"):
        plan.execute(run, tmp_path)
    assert not folder.exists()
    monkeypatch.setattr(plan, "run_to_end", lambda *_: pytest.fail("it was begun under the old fingerprint"))
    with pytest.raises(RunFailed, match="the code changed"):
        plan.execute(run, tmp_path)


def test_steps_are_timed_at_a_rate_at_which_none_diverges(tiny, tmp_path):
    ours = tiny(learning_rate=1e6)
    runs = [ours, replace(ours, variant=replace(ours.variant, backend="torch"))]
    first, second = (one.settings for one in rates._workers(runs, tmp_path))
    assert first["learning_rate"] == second["recipe"]["learning_rate"] == 1e-6


def test_steps_are_timed_with_the_full_batch(tmp_path, monkeypatch):
    growing = replace(phase1.RECIPE, batch_warmup=BatchWarmup(tokens=10**6, doublings=2))
    monkeypatch.setattr(phase1, "RECIPES", {"growing": growing})
    config = phase1.Config(**{**SIZES["nano"], **{name: TINY[name] for name in TINY if name != "batch_size"}})
    np.save(tmp_path / "tokens.npy", training_step.text_like(1000, config.vocab_size))
    settings = {
        "phase": 1,
        "size": "nano",
        "batch_size": 8,
        "config": config.to_dict(),
        "recipe": "growing",
        "device": "cpu",
    }
    worker = TrainingRounds(tokens=str(tmp_path / "tokens.npy"), folder=str(tmp_path), **settings)
    assert next(worker.events).tokens == 8 * config.seq_len
    worker.events.close()


def test_a_run_that_cannot_be_made_says_why(tiny, tmp_path):
    run = tiny()
    (tmp_path / run.fingerprint).mkdir()
    (tmp_path / run.fingerprint / "curve.jsonl").mkdir()
    failed = plan.execute(run, tmp_path)
    assert failed.status == "failed"
    assert "could not write to" in failed.error


def test_an_interrupted_run_raises_once_it_has_ended(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "run_to_end", lambda *_: Ended(130, "", "saved"))
    with pytest.raises(KeyboardInterrupt):
        plan.execute(tiny(), tmp_path)


def test_ctrl_c_names_the_folder_to_go_on_with(planned, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    comparison = planned("--phases", 1)
    monkeypatch.setattr(compare, "read", lambda flags, say: comparison)
    monkeypatch.setattr(compare, "compare", interrupted)
    monkeypatch.setattr(compare, "end_as_by_ctrl_c", lambda: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["compare", "--phases", "1"])
    with pytest.raises(Interrupted, match=r"go on with: python -m bench.compare --phases 1 --out=results/bench/\d+_"):
        compare.main()


def test_the_plan_runs_nothing(planned, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    comparison = planned("--phases", 1, 1)
    monkeypatch.setattr(compare, "read", lambda flags, say: comparison)
    monkeypatch.setattr(compare, "end_as_by_ctrl_c", lambda: None)
    shown = command(compare.main, "--plan")
    assert shown.code == 0, shown
    assert "phase 1 #2" in shown.out
    assert list(tmp_path.iterdir()) == []


@needs_torch
def test_a_reference_run_starts_as_ours_and_goes_on_as_if_never_stopped(tiny, tmp_path):
    from bench.reference import train

    ours = tiny(dropout=0.1)
    run = replace(ours, variant=replace(ours.variant, backend="torch"))
    ends = []
    for name, stop_at in (("whole", None), ("stopped", 13)):
        folder = tmp_path / name
        plan._lay_out(run, folder)
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
        clocks = ("train_seconds", "compile_seconds", "eval_seconds", "tokens_per_second", "peak_memory_bytes")
        ends.append({key: value for key, value in last.result(why).items() if key not in clocks})
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
    finished = plan.execute(run, cache)
    assert finished.status == "done", finished.error
    assert finished.result["parameters"]["total"] == run.plan.make_model().count_parameters()["total"]
    mine = plan.execute(replace(run, variant=Variant(phase=1)), cache)
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
    plan._lay_out(run, tmp_path)
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
    first, second, third = plan.lacks_reference([own, branch, odd])
    assert first is None
    assert "'none'" in second
    assert "float16" in third


@needs_torch
@pytest.mark.slow
def test_a_quick_comparison_from_end_to_end(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "end_as_by_ctrl_c", lambda: None)
    line = ("--phases", "1", "--quick", "--max-tokens", "40960", "--data", text, "--out", tmp_path / "out")
    done = command(lambda: compare.exit_cleanly(compare.main), *line)
    assert done.code == 0, done
    log = json.loads((tmp_path / "out" / "compare.json").read_text())
    jsonschema.validate(log, SCHEMA)
    assert log["complete"]
    assert [row["a"] + row["b"] for row in log["speed"]] == ["phase 1phase 1 · torch"]
    assert "rough" in done.out.lower()
    assert (tmp_path / "out" / "compare.html").is_file()
    assert len(list((tmp_path / "out" / "runs").glob("*/curve.jsonl"))) == 4
