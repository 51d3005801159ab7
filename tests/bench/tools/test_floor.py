"""The distance to the entropy of the fables: what is recorded of runs, what is shown, and a real one at nano."""

import json
import statistics
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.compare.runs import Finished
from bench.report import tables as report
from bench.tools import fables, floor
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed
from tests.faults.runs import merged

FLOOR = 0.3
WORDS = {"names": {"words": 90, "right": 0.75, "chance": 0.02}, "counts": {"words": 30, "right": 0.5, "chance": 0.1}}
SHARES = {"grammatical": 0.3, "consistent": 0.1, "cut_off": 0.2}


def finished(phase, seed, *, seconds=60.0, diverged=False):
    """Later phases are nearer to the floor, later seeds farther."""
    bpb = FLOOR * (3 - 0.3 * phase + 0.05 * seed)
    result = {
        "seed": seed,
        "stopped": "diverged" if diverged else "max_tokens",
        "tokens": 100_000,
        "train_seconds": seconds,
        "best_valid_loss": 2.0,
        "best_valid_bpb": bpb,
        "versions": {},
        "corpus": {"name": "fables", "sha256": "0", "floor_bpb": FLOOR},
        "quality": {} if diverged else {**SHARES, "consistent_sentences": 0.1 * phase + 0.01 * seed, "bindings": WORDS},
    }
    evals = ({"tokens": 100_000, "seconds": seconds, "valid_loss": 2.0},)
    return Finished(status="diverged" if diverged else "done", result=result, evals=evals)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command line over few stories, in an empty folder; what it writes."""
    monkeypatch.chdir(tmp_path)

    def run(*more):
        line = ["fables", "--size", "nano", "--stories", "300", "--device", "cpu", "--out", "out", *map(str, more)]
        monkeypatch.setattr(sys, "argv", merged(line))
        fables.main()
        return json.loads((tmp_path / "out" / "fables.json").read_text())

    return run


@pytest.fixture
def made(monkeypatch):
    """The runs that were asked for; none is trained."""
    runs = []

    def execute(run, say):
        runs.append(run)
        return finished(run.variant.phase, run.plan.seed, diverged=run.variant.phase == 2 and run.plan.seed == 4)

    monkeypatch.setattr(fables, "execute", execute)
    return runs


def test_every_phase_runs_within_both_budgets_from_every_seed(command, made, capsys, tmp_path):
    log = command("--max-tokens", 4000, "--max-seconds", 3)
    limits = [(run.plan.limits.max_tokens, run.plan.limits.max_seconds) for run in made]
    phases = [run.variant.phase for run in made]
    assert limits == ([(4000, None)] * 6 + [(None, 3)] * 6) * 5
    assert phases == [1, 2, 3, 4, 5, 6] * 10
    assert [run.plan.seed for run in made] == [seed for seed in range(5) for _ in range(12)]
    assert len({run.fingerprint for run in made}) == 60
    assert log["complete"]
    assert (log["measures"], log["seeds"]) == ("fables", [0, 1, 2, 3, 4])
    assert log["budgets"] == {"max_tokens": 4000, "max_seconds": 3}
    assert [(row["name"], row["budget"]) for row in log["rows"]] == [
        (f"phase {n}", budget) for budget in ("max_tokens", "max_seconds") for n in range(1, 7)
    ]
    first, second = log["rows"][:2]
    assert first["ratio"] == pytest.approx({"median": 2.8, "low": 2.7, "high": 2.9})
    assert first["above_floor"] == pytest.approx({"median": 0.54, "low": 0.51, "high": 0.57})
    assert first["consistent"] == {"median": 0.1, "low": 0.1, "high": 0.1}
    assert second["ratio"]["median"] == pytest.approx(2.5)
    assert second["consistent_sentences"]["median"] == pytest.approx(0.215)  # of the four that wrote stories
    assert all(run["evals"] for run in log["runs"])

    table = report.TABLES["fables"](log)
    assert "| phase 1 | 4k tokens | 2.80 (2.70–2.90) | 0.540 (0.510–0.570) | 30% (30%–30%) |" in table
    assert "| 100k tokens in 60.0 s; 4 max\\_tokens, 1 diverged |" in table
    assert "| phase 6 | 3 s | 1.30 (1.20–1.40) |" in table
    words = report.TABLES["bindings"](log)
    assert "| variant | budget | names | counts |" in words
    assert "| phase 2 | 4k tokens | 75% (75%–75%) | 50% (50%–50%) |" in words
    assert "By chance: names 2%, counts 10%." in words
    assert "phase 6" in capsys.readouterr().out
    assert (tmp_path / "out" / "fables.png").stat().st_size > 10_000
    assert "phase 1 within 3 s: 2.80 times the floor, 12% of sentences consistent" in floor.draw(log).description
    assert [axes.get_title(loc="left") for axes in floor.draw(log).figure.axes] == list(floor._PANELS.values())
    runs = [{**run, "consistent": 0.0} for run in log["runs"]]
    titles = [axes.get_title(loc="left") for axes in floor.draw({**log, "runs": runs}).figure.axes]
    assert titles == ["Times the entropy floor", "Consistent sentences"], "a panel of zeros is omitted"


@given(st.lists(st.none() | st.floats(0, 9), max_size=7))
def test_a_median_has_bounds_if_enough_values_are_known(values):
    found, known = fables.interval(values), [value for value in values if value is not None]
    assert found["median"] == (pytest.approx(statistics.median(known)) if known else None)
    if len(known) >= 5:
        assert min(known) <= found["low"] <= found["median"] <= found["high"] <= max(known)
    else:
        assert found["low"] is found["high"] is None


def test_one_seed_and_no_evaluation_are_drawn_too(command, monkeypatch):
    nothing = finished(1, 0)
    nothing.result["best_valid_bpb"], nothing.result["quality"] = None, {}
    monkeypatch.setattr(fables, "execute", lambda run, say: nothing if run.variant.phase == 1 else finished(3, 0))
    log = command("--phases", "1", "3", "--seeds", 1)
    assert log["rows"][0]["ratio"] == {"median": None, "low": None, "high": None}
    assert log["rows"][1]["ratio"] == pytest.approx({"median": 2.1, "low": None, "high": None})
    assert "| phase 1 | 2M tokens | not measured | not measured |" in report.TABLES["bindings"](log)
    assert "| phase 1 | 2M tokens | not measured | not measured |" in report.TABLES["fables"](log)


def test_ctrl_c_resumes_and_a_failed_run_is_an_error(command, monkeypatch):
    answers = [finished(1, 0), KeyboardInterrupt(), finished(1, 0), Finished(status="failed", error="disk full")]

    def execute(run, say):
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(fables, "execute", execute)
    with pytest.raises(Interrupted, match="the same command resumes"):
        command("--phases", "1", "--seeds", 1)
    with pytest.raises(RunFailed, match="phase 1 max_seconds seed0: disk full"):
        command("--phases", "1", "--seeds", 1)
    answers += [finished(1, 0), finished(1, 0)]
    assert command("--phases", "1", "--seeds", 1)["complete"]


def test_bad_input_is_refused(command, made, tmp_path):
    with pytest.raises(BadInput, match="--phases 'x'"):
        command("--phases", "x")
    command("--phases", "1", "--seeds", 1)
    with pytest.raises(BadInput, match="results by other settings or code: give another"):
        command("--phases", "1", "--seeds", 2)
    (tmp_path / "out" / "fables.json").write_text("[]")
    with pytest.raises(BadInput, match="holds something else"):
        command("--phases", "1", "--seeds", 1)


def test_real_runs_are_reused(command, monkeypatch, tmp_path):
    line = ("--phases", "1", "--seeds", 1, "--max-tokens", 2000, "--max-seconds", 0.2)
    log = command(*line)
    by_tokens, by_seconds = log["runs"]
    assert (by_tokens["stopped"], by_seconds["stopped"]) == ("max_tokens", "max_seconds")
    assert 2000 <= by_tokens["tokens"] < 3100
    assert by_seconds["train_seconds"] >= 0.2
    assert by_tokens["ratio"] == pytest.approx(by_tokens["best_valid_bpb"] / log["corpus"]["floor_bpb"])
    assert by_tokens["above_floor"] > 0
    assert by_tokens["consistent_sentences"] is not None
    assert by_tokens["bindings"]["names"]["words"] > 10
    logged = tmp_path / "out" / "runs" / "phase_1_max_tokens_seed0"
    assert json.loads((logged / "result.json").read_text())["best_valid_bpb"] == by_tokens["best_valid_bpb"]
    assert (logged / "curve.jsonl").exists()

    monkeypatch.setattr("bench.compare.runs.run_to_end", lambda *_: pytest.fail("a finished run was repeated"))
    assert command(*line)["runs"] == log["runs"]
