"""Plots: drawn with matplotlib's defaults whatever a person's settings are, and not needed by the results."""

import json
import os
import subprocess
import sys

import pytest

from mlx_transformer.run import plots, training
from tests.faults.runs import ROOT, TINY, result, train, write_text
from tests.run.test_run_report import a_curve, a_result, report

DRAW_ALL = """
import json, sys
from pathlib import Path
from bench.compare import plots as comparison
from bench.tools import schedules
from mlx_transformer.run import plots
from mlx_transformer.run.compare import RunRecord, draw_curves
from tests.bench.compare.compare_logs import a_log
from tests.run.test_run_report import a_curve, a_result

folder, curve = Path(sys.argv[1]), list(a_curve())
plots.draw_loss(folder / "loss.png", a_result(), curve)
draw_curves(folder / "curves.png", [RunRecord("$a_run^{", {}, a_result(), curve)])
schedules.draw(folder / "schedules.png")
for plot in comparison.draw(a_log()):
    plot.write(folder)
    (folder / f"{plot.name}.svg").write_text(plot.svg())
"""


def draw_all(folder, **environment):
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DRAW_ALL, folder],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_settings_of_a_person_change_no_picture(tmp_path):
    """tests/matplotlibrc has text.usetex, which raises without latex, and a large font."""
    plain = draw_all(tmp_path / "plain", MATPLOTLIBRC=os.devnull)
    assert len(plain) == 3 + 2 * 5
    assert draw_all(tmp_path / "own", MATPLOTLIBRC=str(ROOT / "tests" / "matplotlibrc"), MPLBACKEND="inlined") == plain


def test_drawing_restores_a_persons_settings(monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "font.size", 33)
    with plots.drawing({"font.size": 9}):
        assert (mpl.rcParams["font.size"], mpl.rcParams["text.usetex"]) == (9, False)
    assert mpl.rcParams["font.size"] == 33


def test_a_picture_that_cannot_be_drawn_is_one_warning(tmp_path, monkeypatch):
    def fail(path, *_):
        assert json.loads((path.parent / "result.json").read_text())["stopped"] == "max_steps"
        raise RuntimeError("no font")

    monkeypatch.setattr(training, "draw_loss", fail)
    text, folder = write_text(tmp_path / "text.txt"), tmp_path / "run"
    ended = train(*TINY, "--data", text, "--max-steps", 3, "--out", folder)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("warning: loss.png was not drawn (RuntimeError: no font)\n") == 1
    assert result(folder)["steps"] == 3


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written as PNG."""
    figures = []
    monkeypatch.setattr(plots, "write_png", lambda figure, path: figures.append(figure))
    return figures


def test_the_learning_rate_and_the_gradient_norm_are_below_the_loss(drawn, tmp_path):
    curve = [
        {**line, "learning_rate": 0.1 * i, "grad_norm": 3.0 - i} if line["kind"] == "log" else line
        for i, line in enumerate(a_curve())
    ]
    plots.draw_loss(tmp_path / "loss.png", a_result(), curve)
    panels = {axes.get_ylabel(): axes for axes in drawn[0].axes}
    for label, key in (("learning rate", "learning_rate"), ("gradient norm", "grad_norm")):
        (line,) = panels[label].get_lines()
        logs = [one for one in curve if one["kind"] == "log"]
        assert line.get_xydata().tolist() == [[one["tokens"], one[key]] for one in logs]
    plots.draw_loss(tmp_path / "loss.png", a_result(), [])
    assert not {"learning rate", "gradient norm"} & {axes.get_ylabel() for axes in drawn[1].axes}


def test_the_load_of_experts_is_drawn_over_training_and_reported(drawn, tmp_path):
    curve = [
        {**line, "router_most_load": 2.5 - 0.01 * i, "router_least_load": 0.1 + 0.01 * i}
        if line["kind"] == "log"
        else line
        for i, line in enumerate(a_curve())
    ]
    plots.draw_loss(tmp_path / "loss.png", a_result(), curve)
    (panel,) = (axes for axes in drawn[0].axes if axes.get_ylabel() == "experts' load")
    logs = [one for one in curve if one["kind"] == "log"]
    for line, key in zip(panel.get_lines(), ("router_most_load", "router_least_load"), strict=True):
        assert line.get_xydata().tolist() == [[one["tokens"], one[key]] for one in logs]
    first, last = (f"{one['router_most_load']:.2f} and {one['router_least_load']:.2f}" for one in (logs[0], logs[-1]))
    row = f"| load of the busiest and the idlest expert | {last} of an equal share; at first {first} |"
    assert row in report(tmp_path, a_result(), curve)
    assert "idlest" not in report(tmp_path, a_result(), a_curve())


def test_the_mean_gate_of_an_ngram_expert_is_drawn_over_training(drawn, tmp_path):
    curve = [{**line, "gate": 0.5 + 0.001 * i} for i, line in enumerate(a_curve()) if line["kind"] == "log"]
    plots.draw_loss(tmp_path / "loss.png", a_result(), curve)
    (panel,) = (axes for axes in drawn[0].axes if axes.get_ylabel() == "network's share")
    assert panel.get_lines()[0].get_xydata().tolist() == [[one["tokens"], one["gate"]] for one in curve]
