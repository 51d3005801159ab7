"""Throughput: which variants are measured interleaved, and what their workers do."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bench.compare import throughput
from bench.compare.stats import Interval
from bench.workers import training_step
from bench.workers.mlx_worker import TrainingRounds
from mlx_transformer.nn.config import SIZES
from mlx_transformer.train.optim.schedules import BatchWarmup
from phases import phase1
from tests.bench.compare.tiny import TINY


def family(name, *backends, size="nano", step_tokens=2048, accumulate=1):
    """A variant as grouped() sees it: names, and what its memory is guessed from."""
    made = SimpleNamespace(config=SimpleNamespace(**SIZES[size]), recipe=SimpleNamespace(accumulate=accumulate))
    return [
        SimpleNamespace(
            variant=SimpleNamespace(name=f"{name}{own}", backend=own or "mlx"), plan=made, step_tokens=step_tokens
        )
        for own in ("", *backends)
    ]


def grouped(*by_variant, parameters=250_000, bases=("a",)):
    names = [run.variant.name for family in by_variant for run in family]
    groups = throughput.grouped(by_variant, dict.fromkeys(names, parameters), bases)
    return [[run.variant.name for run in group] for group in groups]


def test_the_baseline_is_measured_in_every_group():
    by_variant = [family("a", "t"), *(family(f"{i}", "t") for i in range(5))]
    groups = grouped(*by_variant)
    assert groups[0] == ["a", "at"], "by itself: with its reference it takes the most memory"
    assert [group[0] for group in groups[1:]] == ["a"] * 3
    assert [group[1:] for group in groups[1:]] == [["0", "0t", "1", "1t"], ["2", "2t", "3", "3t"], ["4", "4t"]]
    assert grouped(by_variant[0]) == [["a", "at"]]
    assert grouped(*by_variant[:3]) == [["a", "at", "0", "0t", "1", "1t"]], "all in turn where there is room"
    assert grouped(family("a"), family("b"), family("c")) == [["a", "b", "c"]]


def test_what_others_are_compared_with_is_measured_in_every_group():
    by_variant = [family("a"), family("b"), *(family(f"{i}") for i in range(6))]
    assert grouped(*by_variant, bases=("a", "b")) == [["a", "b", "0", "1", "2", "3"], ["a", "b", "4", "5"]]


def test_a_group_is_as_large_as_memory_allows():
    def base(name, *backends, **odd):
        return family(name, *backends, **{"size": "base", "step_tokens": 8192, **odd})

    a, rest = base("a", step_tokens=32_768), [base(f"{i}", "t") for i in range(3)]
    assert throughput._bytes(a[0], 7_400_000) == pytest.approx(4.9e9, rel=0.05)
    assert throughput._bytes(base("t", "t", step_tokens=32_768)[1], 7_400_000) == pytest.approx(8.2e9, rel=0.05)
    assert grouped(a, *rest, parameters=7_400_000) == [["a", "0", "0t", "1", "1t"], ["a", "2", "2t"]]
    large = [base(f"{i}", step_tokens=32_768) for i in range(3)]
    assert grouped(a, *large, parameters=7_400_000) == [["a", "0"], ["a", "1"], ["a", "2"]]
    parts = [base(f"{i}", step_tokens=32_768, accumulate=8) for i in range(3)]
    assert grouped(a, *parts, parameters=7_400_000) == [["a", "0", "1", "2"]]
    assert grouped(a, *large[:2], parameters=10**10) == [["a", "0"], ["a", "1"]], "never less than a family"


def test_rates_of_one_group_are_compared():
    def one(seconds, tokens):
        return {"step_tokens": tokens, "seconds_per_step": seconds, "memory_bytes": 1}

    a, b, c = one([1.0, 2, 4, 1, 1], 100), one([2.0, 4, 8, 2, 2], 400), one([1.0] * 5, 300)
    groups = [{"a": a, "b": b}, {"a": one([2.0] * 5, 100), "c": c}]
    assert throughput.read(groups).ratio("b", "a") == Interval(value=2, low=2, high=2)
    assert throughput.read(groups).ratio("c", "a").value == 6, "against what was measured beside it"
    assert [row["ratio"] for row in throughput.speed(groups, [("b", "a"), ("c", "a"), ("d", "a")])] == [2, 6]
    assert [row["tokens_per_second"]["median"] for row in throughput.rows(groups, {"a": 7, "c": 8})] == [100, 300]


def test_steps_are_timed_at_a_rate_at_which_none_diverges(tiny, tmp_path):
    ours = tiny(learning_rate=1e6)
    runs = [ours, replace(ours, variant=replace(ours.variant, backend="torch"))]
    first, second = (one.settings for one in throughput._workers(runs, tmp_path))
    assert first["learning_rate"] == second["recipe"]["learning_rate"] == 1e-6


def test_steps_are_timed_with_the_full_batch(tmp_path, monkeypatch):
    growing = replace(phase1.RECIPE, batch_warmup=BatchWarmup(tokens=10**6, doublings=2))
    monkeypatch.setattr(phase1, "RECIPES", {"growing": growing})
    config = phase1.Config(**{**SIZES["nano"], **{name: TINY[name] for name in TINY if name != "batch_size"}})
    np.save(tmp_path / "tokens.npy", training_step.text_like(1000, config.vocab_size))
    settings = {
        "experiment": "1",
        "size": "nano",
        "batch_size": 8,
        "config": config.to_dict(),
        "recipe": "growing",
        "device": "cpu",
    }
    worker = TrainingRounds(tokens=str(tmp_path / "tokens.npy"), folder=str(tmp_path), **settings)
    assert next(worker.events).tokens == 8 * config.seq_len
    worker.events.close()
