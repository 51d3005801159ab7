"""Growth: a larger model that starts with the weights of a smaller run, by --init-from."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer.nn.growth import grow
from mlx_transformer.nn.weights import put_weights
from mlx_transformer.run import training
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path
from phases import phase4, phase5, phase6
from tests.faults.runs import ON_CPU, assert_bad, command, result, write_text
from tests.ladder import TINY, tiny, tokens

pytestmark = pytest.mark.usefixtures("no_pictures")
SOURCE = Path("source")


def grown(kind, source, **numbers):
    """The model of a class with the weights of a smaller model, and what was said."""
    net = kind(kind.Config(**{**TINY, **numbers}), seed=1)
    arrays, notes = grow(net, by_path(source.parameters()), SOURCE)
    put_weights(net, arrays, SOURCE)
    net.eval()
    return net, notes


@pytest.mark.parametrize("phase", [phase5, phase6], ids=lambda phase: phase.__name__)
def test_an_upcycled_model_computes_what_its_source_does(phase):
    source = tiny(phase.Model)
    net, notes = grown(phase.BRANCHES["moe"], source)
    assert notes == ["each expert starts as the feed-forward layer of its block in 'source', with a new router"]
    np.testing.assert_allclose(np.array(net(tokens())), np.array(source(tokens())), atol=1e-5)
    net.train()
    routers = [block.ffn.router_proj.weight for block in net.blocks]
    fresh = phase.BRANCHES["moe"](net.config, seed=1)
    assert all(mx.array_equal(w, block.ffn.router_proj.weight) for w, block in zip(routers, fresh.blocks, strict=True))


def test_without_normalized_gates_an_upcycled_model_differs():
    """Switch weights its one expert by a probability below 1."""
    kind = phase5.BRANCHES["moe"]

    class Top1(kind.FFN):
        def gates(self, p):
            return p

    class Model(kind):
        FFN = Top1

    source = tiny(phase5.Model)
    net, _ = grown(Model, source, experts_per_token=1)
    assert mx.abs(net(tokens()) - source(tokens())).max() > 1e-2


def test_a_stacked_model_repeats_the_layers_of_its_source_in_order():
    source = tiny(phase6.Model, n_layers=2)
    net, notes = grown(phase6.Model, source, n_layers=6)
    assert notes == ["the 2 layers of 'source' are repeated in order, to 6"]
    ours, theirs = by_path(net.parameters()), by_path(source.parameters())
    for i in range(6):
        own = {name: value for name, value in ours.items() if name.startswith(f"blocks.{i}.")}
        assert own
        for name, value in own.items():
            assert mx.array_equal(value, theirs[name.replace(f"blocks.{i}.", f"blocks.{i % 2}.")])
    assert mx.array_equal(net.head.weight, source.head.weight)


def test_layers_are_repeated_and_become_experts_at_once():
    source = tiny(phase5.Model, n_layers=1)
    net, notes = grown(phase5.BRANCHES["moe"], source, n_layers=2)
    assert len(notes) == 2
    stacked, _ = grown(phase5.Model, source, n_layers=2)
    np.testing.assert_allclose(np.array(net(tokens())), np.array(stacked(tokens())), atol=1e-5)


def test_weights_of_the_same_size_are_left_alone():
    source = tiny(phase5.BRANCHES["moe"])
    net, notes = grown(phase5.BRANCHES["moe"], source)
    assert notes == []
    assert all(mx.array_equal(w, by_path(source.parameters())[name]) for name, w in by_path(net.parameters()).items())


def test_what_cannot_grow_is_named():
    with pytest.raises(BadInput, match="has 2 layers, which cannot become 3: expected n_layers to be a multiple of 2"):
        grown(phase5.Model, tiny(phase5.Model, n_layers=2), n_layers=3)
    with pytest.raises(BadInput, match="'source' has biases in its feed-forward layers, which experts have not"):
        grown(phase4.BRANCHES["moe"], tiny(phase4.Model))
    with pytest.raises(BadInput, match=r"'source' does not fit this model: 'blocks.0.ffn.gate_proj.weight'"):
        grown(phase6.BRANCHES["moe"], tiny(phase5.Model, n_kv_heads=2, d_ff=TINY["d_ff"] // 2))
    with pytest.raises(BadInput, match=r"does not fit this model: .blocks\.2"):
        grown(phase5.Model, tiny(phase5.Model), n_layers=2)


def test_a_run_grows_into_experts_and_into_layers_and_trains_on(tmp_path):
    text = write_text(tmp_path / "text.txt")

    def train(phase, *args):
        return command(lambda: training.main(find_phase(phase)), *args)

    flags = ["--data", text, "--max-steps", 2, "--eval-every", 2, "--prompt", "a"]
    assert train(5, *ON_CPU, *flags, "--out", tmp_path / "dense").code == 0
    on = ["--size", "nano", "--device", "cpu", *flags, "--init-from", tmp_path / "dense", "--batch-size", 3]
    ended = train(5, *on, "--branch", "moe", "--out", tmp_path / "experts")
    assert ended.code == 0, ended.err
    assert "each expert starts as the feed-forward layer" in ended.out
    ended = train(5, *on, "--n-layers", 2, "--out", tmp_path / "deep")
    assert ended.code == 0, ended.err
    assert "the 1 layer of" in ended.out
    losses = [result(tmp_path / name)["best_valid_loss"] for name in ("dense", "experts", "deep")]
    assert max(losses[1:]) < losses[0] + 0.1
    assert_bad(train(6, *on, "--branch", "moe", "--out", tmp_path / "x"), "does not fit this model", "down_proj")
    assert not (tmp_path / "x").exists()
