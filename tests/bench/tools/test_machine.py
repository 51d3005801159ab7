"""The file of a machine: its schema, its prediction, the names of chips."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest

from bench.compare.runs import Finished
from bench.tools import machine, roofline
from mlx_transformer.backend import Device
from mlx_transformer.utils.errors import BadInput, RunFailed
from tests.faults.runs import ROOT

SCHEMA = json.loads(Path(machine.__file__).with_name("machine.schema.json").read_text(encoding="utf-8"))


def test_a_chip_becomes_a_file_name():
    assert machine.slug("Apple M1 Max") == "apple-m1-max"
    assert machine.slug("Intel(R) Core(TM) i7-1185G7 @ 3.00GHz") == "intel-core-i7-1185g7-3-00ghz"
    assert machine.slug("../..") == "unknown"


def test_only_a_known_chip_has_a_prediction():
    assert machine.predicted("AMD EPYC", "nano") is None
    expected = roofline.read_work(roofline.Flags(size="nano"))[1].tokens_per_second(roofline.chips()["m1-max"])
    assert machine.predicted("Apple M1 Max", "nano") == pytest.approx(expected)


@pytest.fixture
def finished(monkeypatch):
    """Lets every run end as a published one did, or in an error; the runs that were asked for."""
    runs, result = [], json.loads((ROOT / "results/published/phase1_fables_small_make_run/result.json").read_text())

    def end(error=None):
        def execute(run, folder):
            runs.append(run)
            status = "failed" if error else "done"
            return Finished(status=status, result=None if error else result, error=error)

        monkeypatch.setattr(machine, "execute", execute)
        return runs

    return end


def test_the_file_of_a_machine_follows_its_schema(finished, monkeypatch, tmp_path, capsys):
    runs = finished()
    monkeypatch.setattr(machine, "best_matmul_gflops", lambda: 100.0)
    out = tmp_path / "new" / "chip.json"
    line = ["machine", "--sizes", "nano", "--seconds", "6", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", line)
    machine.main()
    log = json.loads(out.read_text())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(log, SCHEMA)
    assert [(run.plan.size, run.plan.limits.max_seconds) for run in runs] == [("nano", 6)]
    assert log["sizes"]["nano"]["tokens_per_second"] > 0
    assert log["backend"] == "cpu"
    assert str(tmp_path) not in out.read_text()
    assert "not for the published table" in capsys.readouterr().out
    with pytest.raises(BadInput, match="is there already"):
        machine.main()


def test_a_run_that_fails_is_an_error(finished, tmp_path):
    finished(error="disk full")
    with pytest.raises(RunFailed, match="phase 1 at nano: disk full"):
        machine.train("nano", 1, "cpu", tmp_path)


def test_bad_input():
    assert machine.read_sizes(None) == ["nano", "small", "base"]
    assert machine.read_sizes("base, nano,base") == ["base", "nano"]
    with pytest.raises(BadInput, match="--sizes 'large': expected some of nano, small, base"):
        machine.read_sizes("nano,large")


def test_a_file_is_named_by_the_chip(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "use_device", lambda name: Device("Apple M4 Pro", "metal", 1))
    asked = []
    monkeypatch.setattr(
        "bench.logfile.check_out", lambda path: asked.append(path) or (_ for _ in ()).throw(BadInput("stop"))
    )
    monkeypatch.setattr(sys, "argv", ["machine"])
    with pytest.raises(BadInput, match="stop"):
        machine.main()
    assert asked == [machine.MACHINES / "apple-m4-pro.json"]
