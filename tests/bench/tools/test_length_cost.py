"""`bench length cost`: slopes, a log that resumes, a length that does not fit, and a tiny one from end to end."""

import json

import pytest

from bench import __main__ as bench
from bench.tools import length_cost, sweep
from bench.workers import passes
from tests.faults.runs import assert_bad, command

LINE = ("length", "cost", "--size", "nano", "--device", "cpu", "--seconds", "0.01")


def test_a_slope_is_the_exponent_of_the_length():
    lengths = [256, 512, 1024]
    assert length_cost.slope(lengths, [3 * n**2 for n in lengths]) == pytest.approx(2)
    assert length_cost.slope(lengths, [7.0] * 3) == pytest.approx(0)
    assert length_cost.slope(lengths[:1], [7.0]) is None


def measured(grid, setting, names, most):
    """What a grid finds: phase 3 is quadratic and does not fit beyond `most` tokens, its branch is linear."""
    found = {}
    for name in names:
        if name == "phase 3" and setting["seq_len"] > most:
            found[name] = {"status": passes.FULL, "why": "large"}
            continue
        cost = float(setting["seq_len"]) ** (2 if name == "phase 3" else 1)
        (one,) = grid.passes
        found[name] = {"status": "done", "flops_per_token": 1, "peak_bytes": {one: int(1000 * cost)}}
        found[name] |= {"pass_seconds": {one: [cost / 1e6] * 3}}
        found[name] |= {"decoding_bytes": int(cost) if name == "phase 3" else 999} if one == "decode" else {}
    return found


def test_a_log_resumes_and_states_the_slopes(monkeypatch, tmp_path):
    asked, out = [], tmp_path / "cost"
    line = (*LINE, "--phases", "3", "3/longformer", "--seq-lens", "32,64,128,256", "--out", out)

    def stop_at_decoding(grid, setting, names):
        asked.append((grid.passes[0], setting["seq_len"], names))
        if grid.passes == ["decode"] and setting["seq_len"] == 64 and len(asked) == 6:
            raise KeyboardInterrupt
        return measured(grid, setting, names, most=64)

    monkeypatch.setattr(sweep.Grid, "measure", stop_at_decoding)
    monkeypatch.setattr(length_cost, "best_matmul_gflops", lambda: 50.0)
    stopped = command(bench.main, *line)
    assert stopped.code == 130
    assert not json.loads((out / "cost.json").read_text())["complete"]

    done = command(bench.main, *line)
    assert done.code == 0
    both, branch = ["phase 3", "phase 3/longformer"], ["phase 3/longformer"]
    steps = [("step", n, names) for n, names in ((32, both), (64, both), (128, both), (256, branch))]
    again = [("decode", n, names) for n, names in ((64, both), (128, both), (256, branch))]
    assert asked == [*steps, ("decode", 32, both), ("decode", 64, both), *again]
    log = json.loads((out / "cost.json").read_text())
    assert log["complete"]
    slopes = {name: {key: one["last"] for key, one in own.items()} for name, own in log["slopes"].items()}
    assert slopes["phase 3"] == pytest.approx(dict.fromkeys(length_cost.MEASURES, 2))
    wanted = dict.fromkeys(length_cost.MEASURES, 1) | {"decode bytes": 0}
    assert slopes["phase 3/longformer"] == pytest.approx(wanted, abs=1e-6)
    assert (out / "cost.png").stat().st_size > 10_000
    assert_bad(command(bench.main, *line, "--batch-size", "2"), "was begun with --batch-size 1")


def test_a_tiny_one_from_end_to_end(monkeypatch, tmp_path):
    monkeypatch.setattr(length_cost, "best_matmul_gflops", lambda: 50.0)
    line = (*LINE, "--phases", "4/linear", "--seq-lens", "32,256", "--out", tmp_path / "cost")
    assert command(bench.main, *line).code == 0
    log = json.loads((tmp_path / "cost" / "cost.json").read_text())
    for measure in length_cost.MEASURES:
        lengths, values = length_cost.line(log, "phase 4/linear", measure)
        assert lengths == [32, 256]
        assert min(values) > 0
    assert values[1] < 1.5 * values[0], "a state does not grow with the length"


def test_bad_input(tmp_path):
    assert_bad(command(bench.main, *LINE, "--seq-lens", "256"), "a slope needs two lengths")
    assert_bad(command(bench.main, *LINE, "--seq-lens", "16,256"), "expected more than the 19 tokens")
    (tmp_path / "cost.json").write_text("{}")
    line = (*LINE, "--phases", "3", "--seq-lens", "32,64", "--out", tmp_path)
    assert_bad(command(bench.main, *line), "is not the log of `bench length cost`")
