"""The sweep: which settings are tried, what follows from the seconds, and a tiny one from end to end."""

import itertools
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from bench.compare.variants import Variant
from bench.options import read_numbers
from bench.tools import sweep, sweep_plots
from bench.workers import passes
from bench.workers.machine import describe_machine
from mlx_transformer.utils.errors import BadInput, Interrupted
from tests.faults.runs import merged

PHASES = (Variant(phase=1),)


def make_grid(*axes, most=10**9, variants=PHASES):
    numbers = {"variants": variants, "size": "nano", "device": "cpu", "passes": ["step"], "seconds": 0.01}
    return sweep.Grid(**numbers, max_memory_bytes=most, axes=axes)


def found_with(one, throughput=100.0):
    """A setting as a worker answers it."""
    seconds = {"step": [one["batch_size"] * one["seq_len"] / throughput]}
    return {"status": "done", "flops_per_token": 10**6, "pass_seconds": seconds, "peak_bytes": {"step": 10**6}}


def entry(one):
    return {"name": "phase 1", **one, **found_with(one)}


def run(grid, log, patch, measure):
    """Sweep with a measurement of ours; what was measured, with its names."""
    measured = []

    def fake(self, setting, names):
        measured.append((setting, names))
        return {name: measure(setting) for name in names}

    patch.setattr(sweep.Grid, "measure", fake)
    sweep.sweep(grid, log, lambda: None, lambda text: None)
    return measured


@given(limit=st.integers(1, 2000), data=st.data())
def test_nothing_larger_than_what_did_not_fit_is_tried(limit, data):
    axes = [sorted(data.draw(st.sets(st.integers(1, 20), min_size=1, max_size=4))) for _ in range(3)]
    grid, log = make_grid(*axes), {"settings": [], "matmul_gflops": 1.0}

    def fits(one):
        return one["d_model"] * one["seq_len"] * one["batch_size"] <= limit

    def measure(one):
        return found_with(one) if fits(one) else {"status": passes.FULL, "why": "large"}

    with pytest.MonkeyPatch.context() as patch:
        measured = run(grid, log, patch, measure)
    assert [one["status"] == "done" for one in log["settings"]] == [fits(one) for one in grid.settings()]
    full = [one for one, _ in measured if not fits(one)]
    for a, b in itertools.permutations(full, 2):
        assert not all(a[name] <= b[name] for name in sweep.AXES)


def test_a_sweep_resumes_where_it_stopped(monkeypatch):
    grid, log = make_grid([16, 32], [8], [1, 2]), {"settings": [], "matmul_gflops": 1.0}

    def until_second(one):
        if len(log["settings"]) == 2:
            raise KeyboardInterrupt
        return found_with(one)

    with pytest.raises(KeyboardInterrupt):
        run(grid, log, monkeypatch, until_second)
    kept = list(log["settings"])
    measured = run(grid, log, monkeypatch, found_with)
    assert [one for one, _ in measured] == grid.settings()[2:]
    assert log["settings"][:2] == kept


def test_variants_are_measured_together_and_fill_the_memory_each_for_itself(monkeypatch):
    grid = make_grid([16], [8, 16, 32], [1], variants=(*PHASES, Variant(phase=3, branch="rope")))
    full = {"status": passes.FULL, "why": "large"}
    log = {"settings": [{"name": "phase 1", "d_model": 16, "seq_len": 16, "batch_size": 1, **full}], "matmul_gflops": 1}
    measured = run(grid, log, monkeypatch, found_with)
    assert [names for _, names in measured] == [["phase 1", "phase 3/rope"], ["phase 3/rope"], ["phase 3/rope"]]
    assert [one["why"] for one in log["settings"] if "why" in one] == [
        "large",
        "larger than phase 1, d_model 16, batch 1 x 16",
    ]


def test_throughput_and_share_follow_from_the_seconds():
    shape = {"name": "phase 1", "d_model": 16, "seq_len": 8}
    one = sweep.judge(shape | {"batch_size": 2} | found_with(shape | {"batch_size": 2}, 500.0), 2.0)
    assert one["tokens_per_second"] == pytest.approx(500)
    assert one["matmul_share"] == pytest.approx(500 * 10**6 / 2e9)
    other = sweep.judge(shape | {"batch_size": 4} | found_with(shape | {"batch_size": 4}, 600.0), 2.0)
    full = {"name": "phase 1", "d_model": 99, "seq_len": 8, "batch_size": 1, "status": passes.FULL, "why": "large"}
    assert sweep.best([one, other, full]) == [other]


def test_a_width_keeps_the_head_and_the_proportion():
    grid = make_grid([32], [8], [2])
    config = grid.tasks(grid.settings()[0])["phase 1"].config
    assert {name: getattr(config, name) for name in ("d_model", "n_heads", "d_ff", "seq_len")} == {
        "d_model": 32,
        "n_heads": 2,
        "d_ff": 128,
        "seq_len": 8,
    }
    with pytest.raises(BadInput, match="--d-models 24: expected multiples of 16"):
        sweep.Grid.read(sweep.Flags(size="nano", d_models="24", device="cpu"))


@pytest.mark.parametrize(
    ("size", "shown", "unit"),
    [(2_510_000, "2.5 MB", "MB"), (36_400_000, "36 MB", "MB"), (2_513_000_000, "2.51 GB", "GB")],
)
def test_memory_has_the_unit_of_its_size(size, shown, unit):
    setting = {"name": "phase 1", "d_model": 16, "seq_len": 8, "batch_size": 2}
    one = setting | found_with(setting) | {"peak_bytes": {"forward": size // 2, "step": size}}
    log = {"settings": [sweep.judge(one, 1.0)], "matmul_gflops": 1.0, "size": "nano", "passes": ["step"]}
    log["machine"] = {"device": "Test chip"}
    assert shown in sweep.show(log).columns[-2]._cells
    labels = [axes.get_ylabel() for axes in sweep_plots.draw_maps(log, "phase 1", "sweep").figure.axes]
    assert any(f"peak memory, {unit}" in label for label in labels)


def test_files_of_ones_own_are_measured_as_they_were(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("from phases.phase2 import Model\n")
    flags = {"size": "nano", "device": "cpu", "d_models": "32", "seq_lens": "16", "batch_sizes": "2"}
    own = str(tmp_path / "a" / "mine.py")
    grid = sweep.Grid.read(sweep.Flags(phases=("1", own), seconds=0.01, passes="step", **flags))
    assert grid.names == ["phase 1", "mine.py"]
    assert list(grid.files) == ["mine.py"]
    found = grid.measure(grid.settings()[0], grid.names)
    assert [one["status"] for one in found.values()] == ["done", "done"]
    with pytest.raises(BadInput, match="two files have one name"):
        sweep.Grid.read(sweep.Flags(phases=(own, str(tmp_path / "b" / "mine.py")), **flags))


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
    with pytest.raises(BadInput, match="not the log of a sweep"):
        sweep.open_log(tmp_path / sweep.LOG, make_grid([16], [8], [2]))


def test_from_end_to_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "best_matmul_gflops", lambda: 50.0)
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
    assert all(min(seconds) > 0 for seconds in small["pass_seconds"].values()), "each pass is timed by itself"
    assert 0 < small["peak_bytes"]["forward"] <= small["peak_bytes"]["step"] < 50e6
    assert (large["status"], large["why"]) == (passes.FULL, "by prediction")
    assert larger["why"] == "larger than phase 1, d_model 32, batch 65536 x 16"
    assert (out / "sweep.png").stat().st_size > 10_000
    assert "best at phase 1, d_model 32, batch 2 x 16" in capsys.readouterr().out

    monkeypatch.setattr(sweep, "measure_passes", lambda *_: pytest.fail("it was measured again"))
    sweep.main()
    assert json.loads((out / sweep.LOG).read_text()) == log
    monkeypatch.setattr(sys, "argv", merged((*line, "--seconds", "5")))
    with pytest.raises(BadInput, match=r"begun with seconds 0\.01"):
        sweep.main()


def test_ctrl_c_names_the_folder(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "best_matmul_gflops", lambda: 50.0)
    monkeypatch.setattr(sweep, "measure_passes", interrupt)
    monkeypatch.setattr(sys, "argv", ["sweep", "--size", "nano", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(Interrupted, match=f"--out {tmp_path} resumes"):
        sweep.main()
    assert not json.loads((tmp_path / sweep.LOG).read_text())["complete"]


def test_a_sweep_where_nothing_fits_is_drawn_too(tmp_path):
    full = {"name": "phase 1", "status": passes.FULL, "why": "large"}
    settings = [full | one for one in make_grid([16], [8], [2]).settings()]
    (picture,) = sweep_plots.draw({"machine": describe_machine(), "settings": settings})
    assert picture.write(tmp_path).stat().st_size > 5_000


def test_several_variants_are_drawn_as_lines_over_the_length():
    grid = make_grid([16], [8, 16], [2])
    settings = [entry(one) | {"name": name} for one in grid.settings() for name in ("phase 1", "phase 3")]
    (picture,) = sweep_plots.draw({"machine": describe_machine(), "settings": settings})
    step, memory = picture.figure.axes
    assert [line.get_label() for line in step.get_lines()] == ["phase 1", "phase 3"]
    assert step.get_lines()[0].get_ydata().tolist() == [160.0, 320.0]
    assert memory.get_lines()[1].get_xdata().tolist() == [8, 16]


def test_titles_do_not_overlap_over_three_widths():
    settings = [sweep.judge(entry(one), 1.0) for one in make_grid([64, 128, 256], [64, 128], [4, 16]).settings()]
    (picture,) = sweep_plots.draw({"machine": describe_machine(), "settings": settings})
    picture.figure.draw_without_rendering()
    titles = picture.figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text().startswith("d_model"))
    boxes = [title.get_window_extent() for title in titles]
    assert len(boxes) >= 3
    apart = (a.x1 < b.x0 or b.x1 < a.x0 or a.y1 < b.y0 or b.y1 < a.y0 for a, b in itertools.combinations(boxes, 2))
    assert all(apart)
