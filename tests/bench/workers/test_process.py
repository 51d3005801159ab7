"""Worker processes, interleaved rounds, and programs that run to their end."""

import os
import signal
import textwrap

import numpy as np
import pytest

from bench.workers import machine, process
from bench.workers.interleave import interleave, speed_ratio
from bench.workers.machine import threads, torch_device
from bench.workers.process import (
    ALLOCATOR,
    Worker,
    end_as_by_ctrl_c,
    environment,
    last_words,
    measure_once,
    run_to_end,
    started,
)
from mlx_transformer.backend import Device
from mlx_transformer.utils.errors import RunFailed

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


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(textwrap.dedent(TOY))

    def make(name, size, **environment):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), **environment}
        return Worker(name=name, target="toy:Toy", settings={"size": size}, environment=environment)

    return make


def test_workers_keep_their_state_and_interleaved_seconds(toy):
    said = []
    with started([toy("a", 0), toy("b", 10, GIVEN="x")]) as workers:
        assert workers["a"].facts == {"size": 0, "given": None}
        assert workers["b"].facts == {"size": 10, "given": "x"}
        answers = interleave(workers, 3, {key: {"by": 2} for key in workers}, said.append)
        processes = [worker.process for worker in workers.values()]
    assert [answer["size"] for answer in answers["a"]] == [2, 4, 6]
    assert [answer["size"] for answer in answers["b"]] == [12, 14, 16]
    assert all(answer["seconds"] > 0 and answer["max_rss_bytes"] > 2**20 for own in answers.values() for answer in own)
    assert len(said) == 3
    assert all(process.poll() is not None for process in processes), "a worker outlived its measurement"


def test_the_memory_of_a_worker_is_its_own(toy):
    held = bytearray(2**28)  # what the measuring process holds is not the worker's
    with started([toy("a", 0)]) as workers:
        assert workers["a"].ask(by=1)["max_rss_bytes"] < len(held)


def test_a_worker_that_dies_is_named_with_its_last_words(toy):
    with started([toy("a", 0)]) as workers, pytest.raises(RunFailed, match=r"worker a .*the toy broke"):
        workers["a"].ask(by=-1)
    with started([toy("a", 0)]) as workers, pytest.raises(RunFailed, match=r"worker a .*by signal 9"):
        workers["a"].ask(by=-2)


def test_a_single_round_is_measured_in_a_process_of_its_own(toy):
    answer = measure_once(toy("a", 1, GIVEN="x", OMP_NUM_THREADS="3"), by=4)
    assert (answer["size"], answer["facts"]["given"]) == (5, "x")
    assert answer["facts"]["environment"]["OMP_NUM_THREADS"] == "3"


def test_a_program_is_watched_while_it_runs(monkeypatch):
    monkeypatch.setattr(process, "WATCH_SECONDS", 0.05)
    seen = []
    ended = process.run_to_end(["-c", "import time; time.sleep(0.6); print('done')"], watch=seen.append)
    assert (ended.code, ended.stdout) == (0, "done\n")
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] < 10


def test_the_ratio_and_its_interval():
    draw = np.random.default_rng(1)
    drift = draw.uniform(1, 3, 40)  # both sides of a round are disturbed alike
    seconds = {"a": list(drift * draw.normal(1, 0.01, 40)), "b": list(1.5 * drift * draw.normal(1, 0.01, 40))}
    found = speed_ratio("a", "b", seconds)
    assert found.low < 1.5 < found.high
    assert found.high - found.low < 0.3
    assert speed_ratio("b", "a", seconds).ratio == pytest.approx(1 / found.ratio)


def test_under_three_rounds_there_is_no_interval():
    found = speed_ratio("a", "b", {"a": [1.0, 1.0], "b": [40.0]})
    assert (found.ratio, found.low, found.high, found.rounds) == (40.0, None, None, 1)
    assert str(found) == "40.00x (no interval: 1 round)"
    found = speed_ratio("a", "b", {"a": [1.0, 1.0], "b": [2.0, 2.1]})
    assert (found.low, found.high, str(found)) == (None, None, "2.05x (no interval: 2 rounds)")
    found = speed_ratio("a", "b", {"a": [1.0, 1.0, 1.0], "b": [2.0, 2.1, 1.9]})
    assert 1 < found.low < 2 < found.high


def test_a_worker_gets_no_setting_of_ours(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    monkeypatch.setenv("MLX_TRANSFORMER_PLAIN", "1")
    plain = environment()
    assert "MALLOC_MMAP_MAX_" not in plain
    assert "MLX_BFS_MAX_WIDTH" not in plain
    assert "mlx_transformer-g++" not in plain["PATH"]
    assert (plain["OMP_NUM_THREADS"], plain["MLX_TRANSFORMER_PLAIN"]) == (str(threads()), "0")
    assert environment(**ALLOCATOR)["MALLOC_MMAP_MAX_"] == "0"


def test_pytorch_computes_where_mlx_does_unless_a_variable_names_another_device(monkeypatch):
    monkeypatch.delenv("BENCH_TORCH_DEVICE", raising=False)
    monkeypatch.setattr(machine, "device_info", lambda: Device("Apple M1", "metal", 1))
    assert torch_device() == "mps"
    monkeypatch.setenv("BENCH_TORCH_DEVICE", "cpu")
    assert torch_device() == "cpu"


def test_a_program_gets_its_input_and_gives_its_output():
    assert run_to_end(["-c", "print(input()[::-1])"], stdin="abc\n").stdout == "cba\n"


def test_a_signal_is_said_instead_of_an_earlier_warning():
    program = "import os, sys; print('a warning', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    assert run_to_end(["-c", program]) == (-9, "", "ended by signal 9")
    assert last_words(2, "a warning\nerror: no such file\n") == "no such file"
    assert last_words(3, "") == "ended with code 3, without a message"


def test_a_closed_terminal_ends_as_ctrl_c_does():
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        end_as_by_ctrl_c()
        for number in numbers:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        end_as_by_ctrl_c()
        os.kill(os.getpid(), signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
