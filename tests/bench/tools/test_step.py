"""Training steps and decoding measured: the processes, the arithmetic, and both from end to end at nano."""

import importlib.util
import json
import os
import textwrap

import numpy as np
import pytest

from bench.report import report
from bench.tools import decode, step
from bench.workers import rounds
from mlx_transformer.utils.errors import BadInput, RunFailed

TOY = """
import os
class Toy:
    def __init__(self, size):
        print("noise that is no answer")
        self.size = size
    def facts(self):
        return {"size": self.size, "given": os.environ.get("GIVEN")}
    def round(self, by):
        if by < -1:
            print("a warning", flush=True)
            os.kill(os.getpid(), 9)
        if by < 0:
            raise SystemExit("the toy broke")
        self.size += by
        return {"size": self.size}
"""
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed: make test installs it"
)


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(textwrap.dedent(TOY))

    def make(name, size, **environment):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), **environment}
        return rounds.Worker(name=name, target="toy:Toy", settings={"size": size}, environment=environment)

    return make


def test_contestants_keep_their_state_and_take_turns(toy):
    said = []
    with rounds.started([toy("a", 0), toy("b", 10, GIVEN="x")]) as children:
        assert children["a"].facts == {"size": 0, "given": None}
        assert children["b"].facts == {"size": 10, "given": "x"}
        answers = rounds.interleave(children, 3, {"by": 2}, said.append)
        processes = [child.process for child in children.values()]
    assert [answer["size"] for answer in answers["a"]] == [2, 4, 6]
    assert [answer["size"] for answer in answers["b"]] == [12, 14, 16]
    assert all(answer["seconds"] > 0 and answer["max_rss_bytes"] > 2**20 for own in answers.values() for answer in own)
    assert len(said) == 3
    assert all(process.poll() is not None for process in processes), "a contestant outlived its measurement"


def test_the_memory_of_a_contestant_is_its_own(toy):
    held = bytearray(2**28)  # what the measuring process holds is not the contestant's
    with rounds.started([toy("a", 0)]) as children:
        assert children["a"].ask(by=1)["max_rss_bytes"] < len(held)


def test_a_contestant_that_dies_is_named_with_its_last_words(toy):
    with rounds.started([toy("a", 0)]) as children, pytest.raises(RunFailed, match=r"contestant a .*the toy broke"):
        children["a"].ask(by=-1)
    with rounds.started([toy("a", 0)]) as children, pytest.raises(RunFailed, match=r"contestant a .*by signal 9"):
        children["a"].ask(by=-2)


def test_the_ratio_and_its_interval():
    draw = np.random.default_rng(1)
    drift = draw.uniform(1, 3, 40)  # both sides of a round are disturbed alike
    seconds = {"a": list(drift * draw.normal(1, 0.01, 40)), "b": list(1.5 * drift * draw.normal(1, 0.01, 40))}
    found = rounds.compare("a", "b", seconds)
    assert found.low < 1.5 < found.high
    assert found.high - found.low < 0.3
    assert rounds.compare("b", "a", seconds).ratio == pytest.approx(1 / found.ratio)


def test_a_single_round_has_no_interval():
    found = rounds.compare("a", "b", {"a": [1.0, 1.0], "b": [40.0]})
    assert (found.ratio, found.low, found.high, found.rounds) == (40.0, None, None, 1)
    assert str(found) == "40.00x"


def test_a_contestant_gets_no_setting_of_ours(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    monkeypatch.setenv("MLX_TRANSFORMER_PLAIN", "1")
    plain = rounds.environment(3)
    assert "MALLOC_MMAP_MAX_" not in plain
    assert "MLX_BFS_MAX_WIDTH" not in plain
    assert "mlx_transformer-g++" not in plain["PATH"]
    assert (plain["OMP_NUM_THREADS"], plain["MLX_TRANSFORMER_PLAIN"]) == ("3", "0")
    assert rounds.environment(3, **rounds.ALLOCATOR)["MALLOC_MMAP_MAX_"] == "0"


def test_losses_that_part_stop_the_comparison():
    step.check_losses({"mlx": [3.0, 2.0, 1.0, 9.0], "torch": [3.0, 2.0005, 1.0, 8.0], "plain": [3.0, 2.0]})
    with pytest.raises(RunFailed, match=r"step 2: torch .* 2\.0100"):
        step.check_losses({"mlx": [3.0, 2.0, 1.0], "torch": [3.0, 2.01, 1.0]})
    with pytest.raises(RunFailed, match=r"step 2: torch .* nan"):
        step.check_losses({"mlx": [3.0, 2.0, 1.0], "torch": [3.0, float("nan"), 1.0]})


def test_pieces_that_differ_stop_the_comparison():
    same = {"pieces": [[1, 2]]}
    decode.check_pieces({"mlx": [same, same], "torch": [same]})
    with pytest.raises(RunFailed, match="torch and mlx"):
        decode.check_pieces({"mlx": [same, same], "torch": [same, {"pieces": [[1, 3]]}]})


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(BadInput, match="'jax'"):
        rounds.read_names("torch,jax", step.AGAINST, ())
    with pytest.raises(BadInput, match="phase 9"):
        rounds.check_torch(9)
    (tmp_path / "log.json").touch()
    with pytest.raises(BadInput, match="is there already"):
        rounds.check_out(tmp_path / "log.json")
    with pytest.raises(BadInput, match="cannot be written"):
        rounds.check_out(tmp_path / "log.json" / "below")
    with pytest.raises(BadInput, match="too long"):
        rounds.check_out(tmp_path / ("x" * 300))
    with pytest.raises(BadInput, match="too long"):
        rounds.check_out(tmp_path / ("x" * 250))  # for the temporary file that it is written to first
    rounds.check_out(tmp_path / "new.json")
    assert [path.name for path in tmp_path.iterdir()] == ["log.json"]
    with pytest.raises(BadInput, match="1,x"):
        rounds.read_numbers("--batch-size", "1,x")
    with pytest.raises(BadInput, match="2000000000 x 64 tokens is too large"):
        step.read_task(step.Flags(size="nano", batch_size=2_000_000_000))


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
    monkeypatch.setattr(rounds, "has_torch", lambda: True)
    with pytest.raises(BadInput, match="pip install transformers"):
        run(monkeypatch, decode, "--phase", 3, "--size", "nano", "--device", "cpu", "--against", "transformers")
