"""The optimizer's state divided among ranks: each keeps its share, and nothing else changes."""

import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer.run import memory
from mlx_transformer.train.checkpoint import load_newest
from mlx_transformer.train.parallel import Ranks
from mlx_transformer.train.sharding import Shards, divided
from mlx_transformer.utils.errors import BadInput
from phases import phase1
from tests.faults.runs import ON_CPU, assert_bad, train
from tests.train.ranks.rings import ring
from tests.train.ranks.test_ranks import ENDLESS, SCHEMA, command, losses, wait_for_checkpoint, worked


def test_every_parameter_has_one_place_and_the_loads_are_equal():
    shapes = {f"blocks.{i}.proj": (16, 16) for i in range(8)}
    shapes |= {"embedding": (13, 64), "bias": (5,), "short": (3, 64)}
    whole = {path: mx.random.normal(shape) for path, shape in shapes.items()}
    layout = divided(whole, {"embedding", "short"}, 4)
    assert [(own.start, own.end) for own in layout["embedding"]] == [(0, 3), (3, 6), (6, 9), (9, 13)]
    assert len(layout["short"]) == 1, "fewer rows than ranks"
    ranks = [Ranks(SimpleNamespace(rank=lambda i=i: i, size=lambda: 4), "ring") for i in range(4)]
    cut = [Shards(one, layout).cut(whole) for one in ranks]
    for path, value in whole.items():
        np.testing.assert_array_equal(mx.concatenate([own[path] for own in cut if path in own]), value)
    loads = [sum(value.size for value in own.values()) for own in cut]
    assert max(loads) <= 1.3 * min(loads)


def test_every_optimizer_computes_the_same_and_checkpoints_are_alike(tmp_path):
    """Sophia, Lion, RigL of Muon, Adafactor, AdamW, an average and AGC, in one recipe, on two ranks.

    One run is never stopped. The other is sharded, not sharded, and sharded again.
    """
    whole, again = ({"phase": 1, "mixed": True, "folder": str(tmp_path / name)} for name in ("whole", "again"))
    parts = [
        {**again, "steps": steps, "shard": how} for steps, how in ((4, "optimizer"), (8, "none"), (12, "optimizer"))
    ]
    everyone = worked(tmp_path, 2, [{**whole, "steps": 12}, *parts])
    for never_stopped, *_, resumed in everyone:
        assert resumed["metrics"] == never_stopped["metrics"][8:]
        assert resumed["bits"] == never_stopped["bits"]
        assert sum(resumed["held"]) < 1.1 * never_stopped["held"][0] == 1.1 * never_stopped["held"][1]
    (expected, *_), (found, *_) = (load_newest(tmp_path / name) for name in ("whole", "again"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


WIDE = {"d_model": 64, "n_layers": 1, "n_heads": 4, "d_ff": 256, "seq_len": 24, "dropout": 0.0}


@pytest.fixture
def small_memory(monkeypatch):
    """A limit of memory that the step of one sequence of a model fits with a quarter of the optimizer's state alone."""
    model = phase1.Model(phase1.Config(vocab_size=384, **WIDE))
    recipe = replace(phase1.RECIPE.at("nano"), batch_tokens=WIDE["seq_len"])
    limit = 1.2 * memory.step_bound(model, recipe, 1, 4)
    monkeypatch.setenv(memory.LIMIT, str(limit / 2**30))
    memory.check_memory(model, recipe, 0, (), 4)
    with pytest.raises(BadInput, match=rf"need at least .* and {memory.LIMIT} allows 0\.00"):
        memory.check_memory(model, recipe, 0, ())


@pytest.mark.usefixtures("small_memory")
def test_a_model_that_one_process_refuses_trains_with_four(text, tmp_path, monkeypatch):
    numbers = [part for name, value in WIDE.items() for part in (f"--{name.replace('_', '-')}", value)]
    flags = [*ON_CPU, *numbers, "--batch-size", 4, "--data", text, "--max-steps", 3, "--shard", "optimizer"]
    assert_bad(train(*flags, "--out", tmp_path / "one"), "need at least", "MLX_TRANSFORMER_MEMORY allows")
    with ring(tmp_path / "ring", *[command(flags, "--out", tmp_path / "four")] * 4) as four:
        assert four.wait() == [0] * 4, four.err(0)
        assert "each with 1 sequences of a batch and 1/4 of the optimizer's state" in four.out(0)
        assert "largest memory of a rank: " in four.out(0)
    result = json.loads((tmp_path / "four" / "result.json").read_text())
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    ranks, weights = result["ranks"], 4 * result["parameters"]["total"]
    assert (ranks["shard"], ranks["weights_bytes"]) == ("optimizer", [weights] * 4)
    assert sum(ranks["optimizer_bytes"]) == pytest.approx(2 * weights, rel=0.01)
    assert max(ranks["optimizer_bytes"]) < 1.3 * min(ranks["optimizer_bytes"])
    monkeypatch.setenv(memory.LIMIT, "much")
    assert_bad(train(*flags, "--out", tmp_path / "one"), "MLX_TRANSFORMER_MEMORY=much")


def test_one_process_has_nothing_to_divide(text, tmp_path):
    done = train(*ON_CPU, "--data", text, "--max-steps", 1, "--shard", "optimizer", "--out", tmp_path)
    assert done.code == 0
    assert "note: --shard optimizer divides nothing in one process" in done.out


def test_a_killed_run_resumes_bit_for_bit(text, tmp_path):
    run, never_stopped = tmp_path / "run", tmp_path / "never_stopped"
    flags = [*ON_CPU, "--batch-size", 4, "--dropout", 0.1, "--data", text, "--quiet", "--shard", "optimizer"]
    often = ("--eval-every", 8, "--save-every", 5)
    with ring(tmp_path / "a", *[command(flags, *ENDLESS, *often, "--out", run)] * 2) as two:
        wait_for_checkpoint(run)
        two.processes[1].send_signal(signal.SIGKILL)
        assert two.processes[0].wait(60) == 1
    steps = load_newest(run / "checkpoints")[1]["step"] + 8
    commands = ["-m", "phases.phase1", "--quiet", "--resume", run], command(flags, *often, "--out", never_stopped)
    for name, one in zip("bc", commands, strict=True):
        with ring(tmp_path / name, *[command(one, "--max-steps", steps)] * 2) as own:
            assert own.wait() == [0, 0], own.err(0)
    assert losses(run) == losses(never_stopped)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, never_stopped)]
    assert weights[0] == weights[1]
