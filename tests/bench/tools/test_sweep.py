"""The sweep: its FLOPs against real graphs, its memory limits, and a tiny one from end to end."""

import itertools
import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from mlx.utils import tree_flatten

from bench.options import read_numbers
from bench.tools import heatmap, sweep
from bench.tools.graph import on_metal, trace, training_step
from bench.tools.kernels import kernels
from bench.workers import passes
from bench.workers.machine import describe_machine
from bench.workers.process import WorkerFailed
from mlx_transformer.nn.config import SIZES
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed
from phases import phase1
from tests.ladder import PHASES, kinds

KINDS = kinds()
NANO = phase1.Config(**SIZES["nano"])
RECIPE = phase1.RECIPE.at("nano")


@pytest.mark.parametrize("name", [*map(str, PHASES), "3-rope", "3-gqa", "3-tied"])
def test_the_formula_counts_the_matmuls_of_the_real_step(name):
    kind = KINDS[name]
    config, rows = kind.Config(**SIZES["nano"]), 3
    with on_metal():
        graph = trace(training_step(kind(config), RECIPE), mx.zeros((rows, config.seq_len + 1), mx.int32))
    counted = sum(kernel.flops for kernel in kernels(graph))
    assert counted == passes.flops_per_token(kind(config)) * rows * config.seq_len


def test_a_pass_computes_what_its_name_says():
    model = phase1.Model(NANO)
    timed = passes.Passes(model, RECIPE, 2)

    def weights():
        return {name: np.array(value) for name, value in tree_flatten(model.parameters())}

    before = weights()
    timed.forward()
    timed.gradients()
    assert all(np.array_equal(before[name], value) for name, value in weights().items())
    timed.step()
    assert not any(np.array_equal(before[name], value) for name, value in weights().items() if "k_proj.b" not in name)


def test_more_rows_need_more_memory_and_too_many_are_not_traced():
    few, many = (passes.predict_bytes(phase1.Model, NANO, RECIPE, rows, 1 << 40) for rows in (2, 32))
    assert few < many
    assert passes.predict_bytes(phase1.Model, NANO, RECIPE, 1 << 28, 1 << 30) > 1 << 40


def test_every_pass_has_as_many_turns():
    calls = []
    found = passes.interleaved_seconds({name: lambda name=name: calls.append(name) for name in "abc"}, 0)
    assert calls == list("abc") * passes.LEAST_ROUNDS
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys("abc", passes.LEAST_ROUNDS)


@pytest.mark.parametrize("message", ["[malloc] Unable to allocate 8 bytes", "OpenBLAS error: Memory allocation failed"])
def test_what_is_said_of_memory_is_understood(message):
    assert passes.is_about_memory(message)
    assert not passes.is_about_memory("[matmul] Last dimension of first input")


def make_grid(*axes, most=10**9):
    numbers = {"phase": 1, "branch": None, "size": "nano", "device": "cpu", "seconds": 0.01}
    return sweep.Grid(**numbers, max_memory_bytes=most, axes=axes)


def found_with(setting, rate=100.0):
    """A setting as a child answers it."""
    step = setting["batch_size"] * setting["seq_len"] / rate
    seconds = {"forward": [step / 3], "gradients": [step * 0.9], "step": [step]}
    answer = {"status": "done", "flops_per_token": 10**6, "pass_seconds": seconds}
    return setting | answer | {"peak_bytes": dict.fromkeys(seconds, 10**6), "predicted_bytes": 10**6}


def run(grid, log, monkeypatch, measure):
    measured = []
    monkeypatch.setattr(sweep, "measure", lambda grid, one: (measured.append(one), measure(one))[1])
    sweep.sweep(grid, log, lambda: None, lambda text: None)
    return measured


@given(limit=st.integers(1, 2000), data=st.data())
def test_nothing_larger_than_what_did_not_fit_is_tried(limit, data):
    axes = [sorted(data.draw(st.sets(st.integers(1, 20), min_size=1, max_size=4))) for _ in range(3)]
    grid, log = make_grid(*axes), {"settings": [], "matmul_gflops": 1.0}

    def fits(one):
        return one["d_model"] * one["seq_len"] * one["batch_size"] <= limit

    def measure(one):
        return found_with(one) if fits(one) else one | {"status": passes.FULL, "why": "large"}

    with pytest.MonkeyPatch.context() as patch:
        measured = run(grid, log, patch, measure)
    assert [one["status"] == "done" for one in log["settings"]] == [fits(one) for one in grid.settings()]
    full = [one for one in measured if not fits(one)]
    for a, b in itertools.permutations(full, 2):
        assert not all(a[name] <= b[name] for name in sweep.AXES)


def test_a_sweep_goes_on_where_it_stopped(monkeypatch):
    grid, log = make_grid([16, 32], [8], [1, 2]), {"settings": [], "matmul_gflops": 1.0}

    def until_second(one):
        if len(log["settings"]) == 2:
            raise KeyboardInterrupt
        return found_with(one)

    with pytest.raises(KeyboardInterrupt):
        run(grid, log, monkeypatch, until_second)
    kept = list(log["settings"])
    measured = run(grid, log, monkeypatch, found_with)
    assert measured == grid.settings()[2:]
    assert log["settings"][:2] == kept


def test_rates_and_shares_follow_from_the_seconds():
    one = sweep.judge(found_with({"d_model": 16, "seq_len": 8, "batch_size": 2}, rate=500.0), 2.0)
    assert one["tokens_per_second"] == pytest.approx(500)
    assert one["matmul_share"] == pytest.approx(500 * 10**6 / 2e9)
    other = sweep.judge(found_with({"d_model": 16, "seq_len": 8, "batch_size": 4}, rate=600.0), 2.0)
    assert sweep.best([one, other, one | {"status": passes.FULL, "d_model": 99}]) == [other]


def test_a_width_keeps_the_head_and_the_proportion():
    grid = make_grid([32], [8], [2])
    config = grid.config(grid.settings()[0])
    assert {name: config[name] for name in ("d_model", "n_heads", "d_ff", "seq_len")} == {
        "d_model": 32,
        "n_heads": 2,
        "d_ff": 128,
        "seq_len": 8,
    }
    with pytest.raises(BadInput, match="--d-models 24: expected multiples of 16"):
        sweep.Grid.read(sweep.Flags(size="nano", d_models="24", device="cpu"))


def test_bad_input(tmp_path):
    assert read_numbers("--seq-lens", "64, 8,64") == [8, 64]
    for text in ("", "8,x", "0", "1.5", "-1", "99999999999"):
        with pytest.raises(BadInput, match="--seq-lens"):
            read_numbers("--seq-lens", text)
    with pytest.raises(BadInput, match="too large"):
        sweep.Grid.read(sweep.Flags(size="nano", batch_sizes="100000000", device="cpu"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BadInput, match="holds something else than a sweep"):
        sweep.open_log(tmp_path / sweep.LOG, make_grid([16], [8], [2]))
    (tmp_path / sweep.LOG).write_text("{}")
    with pytest.raises(BadInput, match="no log of a sweep"):
        sweep.open_log(tmp_path / sweep.LOG, make_grid([16], [8], [2]))


def test_the_limit_holds_where_the_prediction_is_too_low():
    grid = make_grid([64], [64], [512], most=600_000_000)
    found = sweep.measure(grid, grid.settings()[0])
    assert found["status"] == passes.FULL
    assert found["why"] != "by prediction"


@pytest.mark.parametrize(("code", "reason"), [(-6, "ended by signal 6"), (1, "MemoryError"), (1, "OSError: no")])
def test_a_process_that_dies_of_memory_is_an_answer_and_another_is_an_error(monkeypatch, code, reason):
    def dying(worker):
        raise WorkerFailed(worker.name, code, reason)

    grid = make_grid([16], [8], [2])
    monkeypatch.setattr(sweep, "measure_once", dying)
    if reason != "OSError: no":
        assert sweep.measure(grid, grid.settings()[0])["status"] == passes.FULL
        return
    with pytest.raises(RunFailed, match="d_model 16, batch 2 x 8 failed: OSError: no"):
        sweep.measure(grid, grid.settings()[0])


def test_from_end_to_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "matmul_gflops", lambda: 50.0)
    out = tmp_path / "new" / "sweep"
    line = ["sweep", "--size", "nano", "--device", "cpu", "--seconds", "0.01", "--max-memory", "0.9"]
    line += ["--d-models", "32", "--seq-lens", "16", "--batch-sizes", "2,65536,131072", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", line)
    sweep.main()
    log = json.loads((out / sweep.LOG).read_text())
    small, large, larger = log["settings"]
    assert log["complete"]
    assert small["tokens_per_second"] > 0
    assert list(small["pass_seconds"]) == ["forward", "gradients", "step"]
    assert 0 < small["peak_bytes"]["forward"] <= small["peak_bytes"]["step"] < 50e6
    assert (large["status"], large["why"]) == (passes.FULL, "by prediction")
    assert larger["why"] == "larger than d_model 32, batch 65536 x 16"
    assert (out / "sweep.png").stat().st_size > 10_000
    assert "best at d_model 32, batch 2 x 16" in capsys.readouterr().out

    monkeypatch.setattr(sweep, "measure", lambda *_: pytest.fail("it was measured again"))
    sweep.main()
    assert json.loads((out / sweep.LOG).read_text()) == log
    monkeypatch.setattr(sys, "argv", [*line[:-2], "--seconds", "5", "--out", str(out)])
    with pytest.raises(BadInput, match=r"begun with seconds 0\.01"):
        sweep.main()


def test_ctrl_c_names_the_folder(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "matmul_gflops", lambda: 50.0)
    monkeypatch.setattr(sweep, "measure", interrupt)
    monkeypatch.setattr(sys, "argv", ["sweep", "--size", "nano", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(Interrupted, match=f"--out {tmp_path} goes on"):
        sweep.main()
    assert not json.loads((tmp_path / sweep.LOG).read_text())["complete"]


def test_a_sweep_where_nothing_fits_is_drawn_too(tmp_path):
    settings = [one | {"status": passes.FULL, "why": "large"} for one in make_grid([16], [8], [2]).settings()]
    log = {"phase": 1, "machine": describe_machine(), "settings": settings}
    assert heatmap.draw(log).write(tmp_path).stat().st_size > 5_000


def test_titles_stand_beside_each_other_over_three_widths():
    full = {"status": passes.FULL, "why": "large"}
    settings = [one | full for one in make_grid([64, 128, 256], [64, 128], [4, 16]).settings()]
    figure = heatmap.draw({"phase": 1, "machine": describe_machine(), "settings": settings}).figure
    figure.draw_without_rendering()
    titles = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text().startswith("d_model"))
    boxes = [title.get_window_extent() for title in titles]
    assert len(boxes) >= 3
    apart = (a.x1 < b.x0 or b.x1 < a.x0 or a.y1 < b.y0 or b.y1 < a.y0 for a, b in itertools.combinations(boxes, 2))
    assert all(apart)
