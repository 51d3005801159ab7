"""The file of a machine: its schema, its checks, its prediction, the names of chips."""

import contextlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest

from bench.compare.runs import Finished
from bench.tools import machine, roofline
from mlx_transformer.backend import Device
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.files import json_text
from tests.faults.runs import ROOT

SCHEMA = json.loads(Path(machine.__file__).with_name("machine.schema.json").read_text(encoding="utf-8"))


def test_a_chip_becomes_a_file_name():
    assert machine.slug("Apple M1 Max") == machine.slug("Apple M1 Max", 32) == "apple-m1-max"
    assert machine.slug("Apple M1 Max", 24) == "apple-m1-max-24"
    assert machine.slug("Apple M9", 24) == "apple-m9"
    assert machine.slug("Intel(R) Core(TM) i7-1185G7 @ 3.00GHz") == "intel-core-i7-1185g7-3-00ghz"
    assert machine.slug("ARM Cortex-A55 + Cortex-A76") == "arm-cortex-a55-cortex-a76"
    assert machine.slug("../..") == "unknown"


def test_only_a_known_chip_has_a_prediction():
    assert machine.predicted("AMD EPYC", None, "nano") is None
    work = roofline.read_work(roofline.Flags(size="nano"))[1]
    for cores, name in ((None, "m1-max"), (32, "m1-max"), (24, "m1-max-24")):
        expected = work.predict(roofline.find_chip(name))
        assert machine.predicted("Apple M1 Max", cores, "nano") == pytest.approx(expected)


@pytest.fixture
def finished(monkeypatch):
    """Let every run end as a published one did, or in an error; return the runs that were asked for."""
    runs, result = [], json.loads((ROOT / "results/published/phase1_fables_small_make_run/result.json").read_text())

    def end(error=None):
        def execute(run, folder):
            runs.append(run)
            status = "failed" if error else "done"
            return Finished(status=status, result=None if error else result, error=error)

        monkeypatch.setattr(machine, "execute", execute)
        monkeypatch.setattr(machine, "best_matmul_gflops", lambda: 100.0)
        return runs

    return end


@pytest.fixture
def report(monkeypatch, tmp_path):
    """Run the command with a report of tiny steps; return its JSON, checked against the schema."""
    monkeypatch.setattr(machine, "PARITY_STEPS", 3)
    monkeypatch.setattr(machine, "RESUME_STEPS", 4)

    def run(*flags):
        out = tmp_path / "new" / "chip.json"
        line = ["machine", "--quick", "--sizes", "nano", "--device", "cpu", "--out", str(out), *flags]
        monkeypatch.setattr(sys, "argv", line)
        try:
            machine.main()
        finally:
            log = json.loads(out.read_text())
            jsonschema.Draft202012Validator.check_schema(SCHEMA)
            jsonschema.validate(log, SCHEMA)
            assert str(tmp_path) not in out.read_text()
        return log

    return run


def test_everything_is_checked_and_the_file_follows_its_schema(finished, report, monkeypatch, capsys):
    runs = finished()
    monkeypatch.setattr(machine, "threads", lambda: 2)
    log = report("--seconds", "6")
    assert [(run.plan.size, run.plan.limits.max_seconds) for run in runs] == [("nano", 6)]
    assert log["sizes"]["nano"]["tokens_per_second"] > 0
    assert (log["backend"], log["failures"]) == ("cpu", {})
    both = log["parity"]
    assert (both["here"], both["cpu"], both["agrees"]) == ("2 threads", "1 thread", True)
    assert len(both["phases"]["1"]["here"]) == len(both["phases"]["1"]["cpu"]) == 3
    assert both["phases"]["1"]["max_difference"] < 1e-4
    assert log["resume_deterministic"] is None
    assert log["resume"] == {"steps": 4, "resumed_at": 2, "bit_for_bit": True, "max_difference": 0}
    output = capsys.readouterr().out
    assert machine.summary(log) in output
    assert "agree" in output
    assert "published" not in output, "6 s are not what the published table requires"
    with pytest.raises(BadInput, match="is there already"):
        machine.main()


@pytest.fixture
def measured(finished, monkeypatch):
    """A machine whose steps and runs are made up: (backend, losses of its step, error of its runs)."""

    def make(backend="metal", here=(7.0, 6.0), error=None):
        finished(error)
        device = Device("Apple M1 Max", backend, 32 * 2**30)
        monkeypatch.setattr(machine, "use_device", lambda name: device)
        monkeypatch.setattr(machine, "device_info", lambda: device)
        monkeypatch.setattr(machine, "gpu_cores", lambda: 24)
        monkeypatch.setattr(machine, "threads", lambda: 1)
        monkeypatch.setattr(machine, "step_workers", lambda phase, *_: phase)
        losses = {"here": here, "cpu": (7.0, 6.001)}

        @contextlib.contextmanager
        def started(phase):
            if phase == 2:
                raise RunFailed("the worker here failed: no kernel")
            yield {name: SimpleNamespace(ask=lambda steps, own=own: {"losses": own}) for name, own in losses.items()}

        monkeypatch.setattr(machine, "started", started)
        monkeypatch.setattr(
            machine,
            "resume",
            lambda _, *more: {
                "steps": 4,
                "resumed_at": 2,
                "bit_for_bit": more == ("--deterministic",),
                "max_difference": 0.0 if more else 1e-7,
            },
        )

    return make


def test_a_gpu_is_compared_with_the_cpu_and_a_part_that_fails_is_recorded(measured):
    measured()
    log = machine.report(["nano"], 60.0, (1, 2, 3), "auto", print)
    jsonschema.validate(json.loads(json.dumps(log)), SCHEMA)
    assert (log["parity"]["here"], log["parity"]["cpu"], log["parity"]["agrees"]) == ("gpu", "cpu", True)
    assert sorted(log["parity"]["phases"]) == ["1", "3"]
    assert log["failures"] == {"parity of phase 2": "the worker here failed: no kernel"}
    line = machine.summary(log)
    assert line.startswith("Apple M1 Max, 24 GPU cores, ")
    assert "gpu and cpu agree (1.0e-03 nats apart in 20 steps); resumed run equal up to 1e-07; " in line
    assert "with --deterministic equal bit for bit" in line
    assert "FAILED: parity of phase 2" in line


@pytest.mark.parametrize("here", [(7.0, 5.0), (7.0, math.nan)])
def test_a_difference_is_noticed(measured, here):
    measured(here=here)
    log = machine.report(["nano"], 60.0, (1,), "auto", print)
    assert log["parity"]["agrees"] is False
    assert "DISAGREE" in machine.summary(log)
    jsonschema.validate(json.loads(json_text(log)), SCHEMA)


def test_one_core_has_nothing_to_be_compared_with(measured):
    measured(backend="cpu")
    log = machine.report(["nano"], 60.0, (1,), "cpu", print)
    assert log["parity"] is None
    jsonschema.validate(json.loads(json_text(log)), SCHEMA)


def test_what_failed_is_written_and_ends_in_an_error(measured, report):
    measured(error="disk full")
    with pytest.raises(RunFailed, match=r"training at nano: see failures in .*send it anyway"):
        report()


def test_a_run_that_fails_is_an_error(finished, tmp_path):
    finished(error="disk full")
    with pytest.raises(RunFailed, match="phase 1 at nano: disk full"):
        machine.train("nano", 1, "cpu", tmp_path)


def test_bad_input(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["machine", "--sizes", "nano,large"])
    with pytest.raises(BadInput, match="--sizes 'large': expected some of nano, small, base"):
        machine.main()


def test_a_file_is_named_by_the_chip(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "use_device", lambda name: Device("Apple M4 Pro", "metal", 1))
    monkeypatch.setattr(machine, "gpu_cores", lambda: 16)
    asked = []
    monkeypatch.setattr(
        "bench.logfile.check_out", lambda path: asked.append(path) or (_ for _ in ()).throw(BadInput("stop"))
    )
    monkeypatch.setattr(sys, "argv", ["machine"])
    with pytest.raises(BadInput, match="stop"):
        machine.main()
    assert asked == [machine.MACHINES / "apple-m4-pro-16.json"]
