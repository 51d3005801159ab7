"""The passes of a training step: what they compute, their FLOPs against real graphs, memory limits, interleaving."""

import contextlib

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from bench.tools import throughput
from bench.tools.graph import on_metal, trace, training_step
from bench.tools.kernels import kernels
from bench.workers import passes
from bench.workers.process import WorkerFailed
from mlx_transformer.nn.config import SIZES
from mlx_transformer.utils.errors import BadInput, RunFailed
from phases import phase1
from tests.ladder import PHASES, kinds

KINDS = kinds()
NANO = phase1.Config(**SIZES["nano"])
RECIPE = phase1.RECIPE.at("nano")


@pytest.mark.parametrize("name", [*map(str, PHASES), "3-rope", "3-gqa", "3-tied"])
def test_the_formula_counts_the_matmuls_of_the_real_step(name):
    kind = KINDS[name]
    config, batch_size = kind.Config(**SIZES["nano"]), 3
    with on_metal():
        graph = trace(training_step(kind(config), RECIPE), mx.zeros((batch_size, config.seq_len + 1), mx.int32))
    counted = sum(kernel.flops for kernel in kernels(graph))
    assert counted == passes.flops_per_token(kind(config)) * batch_size * config.seq_len


def test_each_pass_computes_what_its_name_says():
    model = phase1.Model(NANO)
    timed = passes.Passes(model, RECIPE, 2)

    def weights():
        return {name: np.array(value) for name, value in tree_flatten(model.parameters())}

    before = weights()
    for name in ("forward", "gradients", "decode", "products"):
        assert timed.seconds(name) > 0
    assert all(np.array_equal(before[name], value) for name, value in weights().items())
    timed.step()
    assert not any(np.array_equal(before[name], value) for name, value in weights().items() if "k_proj.b" not in name)


def test_larger_batches_need_more_memory_and_too_large_ones_are_not_traced():
    few, many = (passes.predict_bytes(phase1.Model, NANO, RECIPE, size, 1 << 40) for size in (2, 32))
    assert few < many
    assert passes.predict_bytes(phase1.Model, NANO, RECIPE, 1 << 28, 1 << 30) > 1 << 40


class Fake:
    """A worker process that answers by a function of its requests so far."""

    def __init__(self, name, answer, calls):
        self.name, self.answer, self.calls, self.count = name, answer, calls, 0

    def ask(self, **request):
        self.calls.append(self.name)
        self.count += 1
        return self.answer(self.count, request)


def timed(count, request):
    own = {"status": "done", "pass_seconds": {name: float(count) for name in request["passes"]}}
    return own | ({"peak_bytes": {"step": 7}, "flops_per_token": 5} if request.get("peaks") else {})


def full_at_second(count, request):
    return {"status": passes.FULL, "why": "large"} if count == 2 else timed(count, request)


def killed(code, reason):
    def answer(count, request):
        raise WorkerFailed("a", code, reason)

    return answer


@pytest.fixture
def measure(monkeypatch):
    """measure_passes over fake workers: the answers, and who was asked in which order."""

    def run(**answers):
        calls = []

        @contextlib.contextmanager
        def started(workers):
            yield {one.name: Fake(one.name, answers[one.name], calls) for one in workers}

        monkeypatch.setattr(throughput, "started", started)
        task = throughput.make_task(1, "nano", "cpu")
        return throughput.measure_passes(dict.fromkeys(answers, task), ["step"], 0, 10**9), calls

    return run


def test_tasks_are_interleaved_and_every_round_is_recorded(measure):
    found, calls = measure(a=timed, b=timed)
    assert calls == ["a", "b"] * (1 + throughput.LEAST_ROUNDS)
    assert found["a"]["pass_seconds"] == {"step": [2.0, 3.0, 4.0]}
    assert found["b"]["peak_bytes"] == {"step": 7}


def test_a_task_that_runs_out_of_memory_does_not_stop_the_others(measure):
    found, calls = measure(a=full_at_second, b=timed)
    assert found["a"] == {"status": passes.FULL, "why": "large"}
    assert len(found["b"]["pass_seconds"]["step"]) == throughput.LEAST_ROUNDS
    assert calls.count("a") == 2


@pytest.mark.parametrize(("code", "reason"), [(-6, "ended by signal 6"), (1, "MemoryError")])
def test_a_process_that_dies_of_memory_is_an_answer(measure, code, reason):
    found, _ = measure(a=killed(code, reason))
    assert found["a"] == {"status": passes.FULL, "why": reason}


def test_a_process_that_dies_of_something_else_is_an_error(measure):
    with pytest.raises(RunFailed, match="OSError: no"):
        measure(a=killed(1, "OSError: no"))


def test_the_limit_holds_where_the_prediction_is_too_low():
    task = throughput.make_task(1, "nano", "cpu", batch_size=1024)
    found = throughput.measure_passes({"a": task}, passes.PASSES[:3], 0.01, 1_150_000_000)["a"]
    assert found["status"] == passes.FULL
    assert found["why"] != "by prediction"


def test_a_step_that_cannot_be_is_refused():
    with pytest.raises(BadInput, match="2000000000 x 64 tokens is too large"):
        throughput.StepFlags(size="nano", batch_size=2_000_000_000).task()
    assert throughput.make_task(2, "nano", "cpu").config.dropout == 0.0, "phase 2's recipe has no dropout"
    assert throughput.make_task(1, "nano", "cpu", dropout=0.3).config.dropout == 0.3
