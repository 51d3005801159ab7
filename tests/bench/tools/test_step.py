"""Training steps and decoding measured: the processes, the arithmetic, and both from end to end at nano."""

import importlib.util
import json

import numpy as np
import pytest

from bench import logfile
from bench.options import read_names, read_numbers
from bench.report import tables as report
from bench.tools import decode, step
from bench.workers.machine import check_torch
from mlx_transformer.utils.errors import BadInput, RunFailed
from tests.bench.compare.tiny import needs_torch


def test_losses_that_differ_stop_the_comparison():
    step.check_losses({"mlx": [3.0, 2.0, 1.0, 9.0], "torch": [3.0, 2.0005, 1.0, 8.0], "plain": [3.0, 2.0]})
    with pytest.raises(RunFailed, match=r"step 2: torch .* 2\.0100"):
        step.check_losses({"mlx": [3.0, 2.0, 1.0], "torch": [3.0, 2.01, 1.0]})
    with pytest.raises(RunFailed, match=r"step 2: torch .* nan"):
        step.check_losses({"mlx": [3.0, 2.0, 1.0], "torch": [3.0, float("nan"), 1.0]})


def test_tokens_that_differ_stop_the_comparison():
    same = {"tokens": [[1, 2]]}
    decode.check_tokens_agree({"mlx": [same, same], "torch": [same]})
    with pytest.raises(RunFailed, match="torch and mlx"):
        decode.check_tokens_agree({"mlx": [same, same], "torch": [same, {"tokens": [[1, 3]]}]})


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(BadInput, match="'jax'"):
        read_names("--against", "torch,jax", step.AGAINST, ())
    with pytest.raises(BadInput, match="phase 9"):
        check_torch(9)
    (tmp_path / "log.json").touch()
    with pytest.raises(BadInput, match="is there already"):
        logfile.check_out(tmp_path / "log.json")
    with pytest.raises(BadInput, match="cannot be written"):
        logfile.check_out(tmp_path / "log.json" / "below")
    with pytest.raises(BadInput, match="too long"):
        logfile.check_out(tmp_path / ("x" * 300))
    with pytest.raises(BadInput, match="too long"):
        logfile.check_out(tmp_path / ("x" * 250))  # for the temporary file that it is written to first
    logfile.check_out(tmp_path / "new.json")
    assert [path.name for path in tmp_path.iterdir()] == ["log.json"]
    with pytest.raises(BadInput, match="1,x"):
        read_numbers("--batch-size", "1,x")


def run(monkeypatch, module, *line):
    monkeypatch.setattr("sys.argv", ["bench", *map(str, line)])
    module.main()


@needs_torch
def test_a_step_is_measured_from_end_to_end(monkeypatch, tmp_path, capsys):
    out = tmp_path / "logs" / "step.json"
    line = ("--size", "nano", "--batch-size", 2, "--seq-len", 16, "--rounds", 4, "--steps", 1, "--against", "torch")
    run(monkeypatch, step, *line, "--device", "cpu", "--out", out)
    log = json.loads(out.read_text())
    assert [len(one["seconds_per_step"]) for one in log["workers"].values()] == [4, 4]
    ours, theirs = ([loss for answer in one["answers"] for loss in answer["losses"]] for one in log["workers"].values())
    assert len(ours) == step.WARM_UP + 4
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    (ratio,) = log["ratios"]
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    facts = log["workers"]["torch"]["facts"]
    assert facts["environment"]["MALLOC_MMAP_MAX_"] == "0"
    assert facts["threads"] == log["machine"]["threads"] == log["workers"]["mlx"]["facts"]["threads"]
    assert "tokens/s" in capsys.readouterr().out


@needs_torch
def test_decoding_is_measured_from_end_to_end(monkeypatch, tmp_path):
    out = tmp_path / "decode.json"
    line = ("--size", "nano", "--batch-size", "2", "--prompt-tokens", 3, "--new-tokens", 4, "--rounds", 1)
    run(monkeypatch, decode, *line, "--against", "torch,mlx-uncached", "--device", "cpu", "--out", out)
    (part,) = json.loads(out.read_text())["batches"]
    assert list(part["workers"]) == ["mlx", "torch", "mlx-uncached"]
    assert all(one["tokens_per_second"] > 0 for one in part["workers"].values())


@needs_torch
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_decodes_what_interop_exports(monkeypatch, tmp_path):
    out = tmp_path / "decode.json"
    line = ("--size", "nano", "--batch-size", "2", "--prompt-tokens", 3, "--new-tokens", 9, "--rounds", 1)
    line = (*line, "--against", "transformers", "--device", "cpu", "--out", out)
    with pytest.raises(BadInput, match=r"phase 1 is not exported .* phase 3"):
        run(monkeypatch, decode, *line, "--phase", 1)
    run(monkeypatch, decode, *line, "--phase", 3)
    log = json.loads(out.read_text())
    found = log["batches"][0]["workers"]
    facts = found["transformers"]["facts"]
    assert list(found) == ["mlx", "transformers"]
    assert facts["threads"] == found["mlx"]["facts"]["threads"] == log["machine"]["threads"]
    assert facts["environment"]["MALLOC_MMAP_MAX_"] == "0"
    assert "speedup over `transformers`" in report.decode_table(log)


def test_without_transformers_it_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(decode, "find_spec", lambda name: None)
    monkeypatch.setattr("bench.workers.machine.has_torch", lambda: True)
    with pytest.raises(BadInput, match="pip install transformers"):
        run(monkeypatch, decode, "--phase", 3, "--size", "nano", "--device", "cpu", "--against", "transformers")
