"""The community's measurement: from end to end at nano, its schema, and the names of chips."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest

from bench.tools import machine, roofline
from mlx_transformer.backend import Device
from mlx_transformer.utils.errors import BadInput, RunFailed

SCHEMA = json.loads(Path(machine.__file__).with_name("machine.schema.json").read_text(encoding="utf-8"))


def test_a_chip_becomes_a_file_name():
    assert machine.slug("Apple M1 Max") == "apple-m1-max"
    assert machine.slug("Intel(R) Core(TM) i7-1185G7 @ 3.00GHz") == "intel-core-i7-1185g7-3-00ghz"
    assert machine.slug("../..") == "unknown"


def test_only_a_known_chip_has_a_prediction():
    assert machine.predicted("AMD EPYC", "nano") is None
    expected = roofline.read_work(roofline.Flags(size="nano"))[1].tokens_per_second(roofline.chips()["m1-max"])
    assert machine.predicted("Apple M1 Max", "nano") == pytest.approx(expected)


def test_from_end_to_end_and_by_the_schema(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "best_matmul_gflops", lambda: 100.0)
    out = tmp_path / "new" / "chip.json"
    seconds = "6"  # on a busy machine one is too short for the ten steps that a rate takes
    line = ["machine", "--sizes", "nano", "--seconds", seconds, "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", line)
    machine.main()
    found = json.loads(out.read_text())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(found, SCHEMA)
    own = found["sizes"]["nano"]
    assert own["tokens_per_second"] > 0
    assert own["train_seconds"] >= 1
    assert own["stopped"] == "max_seconds"
    assert found["backend"] == "cpu"
    assert str(tmp_path) not in out.read_text()
    assert "not for the published table" in capsys.readouterr().out
    with pytest.raises(BadInput, match="is there already"):
        machine.main()


def test_a_run_that_fails_is_told_in_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFailed, match=r"phase 1 at nano: .*is a file"):
        machine.train("nano", 1, "cpu", tmp_path / "file")


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
