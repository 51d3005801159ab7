"""A comparison's steps over made-up runs: what is run, measured, kept and concluded."""

import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from bench.compare import command, comparison, outputs, runs, summary, throughput
from bench.compare.runs import Finished
from mlx_transformer.utils.errors import BadInput, RunFailed
from tests.bench.compare.tiny import BUDGET, SCHEMA, STEPS_OF_100


class World:
    """Runs that are made up: by variant how fast it learns, how fast it computes, and what befalls it."""

    def __init__(self, **odd):
        self.odd, self.executed, self.measured, self.said = odd, [], [], []

    def __call__(self, run, cache, say):
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
        """A group as throughput.measure makes it."""
        draw, own = np.random.default_rng(7), [self.odd.get(run.variant.name, {}) for run in runs]
        self.measured.append([run.variant.name for run in runs])
        if any("dies" in one for one in own):
            raise RunFailed("a worker failed: ended by signal 9")
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
    monkeypatch.setattr(throughput, "parity", lambda run, say: pytest.fail("there is no reference"))

    def make(*line, **odd):
        world = World(**odd)
        monkeypatch.setattr(runs, "execute", world)
        monkeypatch.setattr(throughput, "measure", world.measure)
        log = comparison.compare(planned(*line), tmp_path / "out", tmp_path / "cache", world.said.append)
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
        for way in ("clock", "tokens", "tokens_over_throughput"):
            assert row[way]["verdict"] == "no difference", (row["share_of_budget"], way)
    assert the(log["speed"], a="phase 1 #2", b="phase 1")["verdict"] == "no difference"


def test_the_time_left_is_said_after_each_run(made_up, monkeypatch):
    minutes = SimpleNamespace(monotonic=itertools.count(0, 60).__next__)  # each run takes one
    monkeypatch.setattr(comparison, "time", minutes)
    monkeypatch.setattr("bench.compare.forecast.forecast", lambda run, parameters, cache: (120.0, 300.0))
    _, world = made_up("--phases", 1, 1, "--seeds", 2)
    left = [text.strip() for text in world.said if text.endswith("left, without throughput")]
    assert [text.split(" left")[0] for text in left] == ["5 min to 11 min", "2 min", "60 s"]


def test_a_slowdown_is_found_by_the_clock_and_not_in_the_tokens(made_up):
    log, _ = made_up("--phases", 1, 1, **{"phase 1 #2": {"computes": 1 / 1.3}})
    row = the(log["speedups"], share_of_budget=1)
    for way in ("clock", "tokens_over_throughput"):
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
        command._check_failures(log)
    log, world = made_up("--phases", 1, 1)
    assert log["complete"]
    assert ("phase 1 #2", 1) in world.executed


def test_without_a_baseline_there_is_nothing_to_compare_with(made_up):
    log, _ = made_up("--phases", 1, 1, **{"phase 1": {"befalls": lambda seed: "failed"}})
    assert (log["target"]["loss"], log["throughput"], log["speedups"]) == (None, [], [])


def test_a_variant_whose_runs_all_failed_is_not_judged(made_up):
    log, _ = made_up("--phases", 1, 1, "--target", 2.5, **{"phase 1 #2": {"befalls": lambda seed: "failed"}})
    assert the(log["speedups"], share_of_budget=1)["clock"] is None
    assert summary.headline(log)[0] == "Incomplete: not known yet: every run of phase 1 #2 failed."


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
    measured = (tmp_path / "out" / "throughput.json").read_bytes()
    (tmp_path / "out").rename(tmp_path / "before")
    whole, _ = made_up("--phases", 1, 1)
    for log in (again, whole):
        log.pop("machine")  # its load
    assert again == whole
    assert (tmp_path / "out" / "throughput.json").read_bytes() == measured


def test_rates_are_not_measured_again(made_up, tmp_path):
    made_up("--phases", 1, 1)
    path = tmp_path / "out" / "throughput.json"
    (group,) = json.loads(path.read_text())
    group["phase 1"]["memory_bytes"] = 12345
    path.write_text(json.dumps([group]))
    log, _ = made_up("--phases", 1, 1)
    assert the(log["throughput"], name="phase 1")["memory_bytes"] == 12345


MANY = ("--phases", *[1] * 9, "--seeds", 1)  # two groups beside the baseline


def test_a_worker_that_dies_costs_nothing_but_its_group(made_up, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(outputs, "write_all", lambda log, folder: written.append(log))
    with pytest.raises(RunFailed, match=r"ended by signal 9; all else is in .*the same command tries again"):
        made_up(*MANY, **{"phase 1 #2": {"dies": True}})
    left = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written == [left], "tables and pictures too"
    assert [run["status"] for run in left["runs"]] == ["done"] * 9
    assert [row["name"] for row in left["throughput"]] == ["phase 1", "phase 1 #7", "phase 1 #8", "phase 1 #9"]
    assert not left["complete"]
    log, world = made_up(*MANY)
    assert world.measured == [["phase 1", *(f"phase 1 #{i}" for i in range(2, 7))]], "the other group was kept"
    assert log["complete"]
    assert len(log["throughput"]) == 9


def test_each_group_is_kept_as_soon_as_it_is_measured(made_up, monkeypatch, tmp_path):
    def interrupted(self, runs, *others, measure=World.measure):
        if self.measured:
            raise KeyboardInterrupt
        return measure(self, runs, *others)

    with monkeypatch.context() as patched:
        patched.setattr(World, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made_up(*MANY)
    assert len(json.loads((tmp_path / "out" / "throughput.json").read_text())) == 1
    assert len(made_up(*MANY)[1].measured) == 1


def test_a_complete_comparison_stays_so_when_the_command_is_repeated(made_up, monkeypatch):
    log, _ = made_up("--phases", 1, 1)
    finished = {(run["name"], run["seed"]): run for run in log["runs"]}

    def look(run, cache):
        known = finished[run.variant.name, run.plan.seed]
        return Finished(status="done", result=known["result"], evals=tuple(known["evals"]))

    monkeypatch.setattr(comparison, "find_finished", look)
    seen, write = [], comparison.write_json
    monkeypatch.setattr(
        comparison, "write_json", lambda path, value: seen.append((path.name, value)) or write(path, value)
    )
    made_up("--phases", 1, 1)
    assert [value["complete"] for name, value in seen if name == "compare.json"] == [True, True]


def test_the_folder_is_found_again_until_it_is_complete(planned, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    own, other = planned("--phases", 1), planned("--phases", 1, "--seeds", 2)
    folder = comparison.find_folder(own, None)
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(own.identity))
    assert comparison.find_folder(own, None) == comparison.find_folder(own, folder) == folder
    with pytest.raises(BadInput, match="a comparison with other seeds, 5 there and 2 here"):
        comparison.find_folder(other, folder)
    (folder / "compare.json").write_text('{"complete": true}')
    monkeypatch.setattr(comparison.time, "strftime", lambda form: "later")
    assert comparison.find_folder(own, None) == comparison.RESULTS / "later"


def test_a_folder_that_cannot_be_used_is_bad_input(planned, monkeypatch, tmp_path):
    own, file = planned("--phases", 1), tmp_path / "file"
    file.touch()
    for out, said in ((file, "is a file"), (file / "below" / "it", "is a file"), (tmp_path / ("x" * 300), "too long")):
        with pytest.raises(BadInput, match=said):
            comparison.find_folder(own, out)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BadInput, match="is not writable"):
        comparison.find_folder(own, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_may_not_be_read_is_bad_input(planned, monkeypatch, tmp_path):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    own = planned("--phases", 1)
    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(BadInput, match="Permission denied"):
        comparison.find_folder(own, tmp_path)
