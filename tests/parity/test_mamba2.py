"""Mamba-2's mixer against the one of transformers, with the same weights: values, gradients, decoding."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phases import phase6
from tests.ladder import TINY, tiny
from tests.parity.mixers import assert_same_values_and_gradients

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")
from transformers import Mamba2Config  # noqa: E402
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer  # noqa: E402

LENGTH = 70  # beyond one chunk
NAMES = {  # theirs: ours
    "in_proj.weight": "in_proj.weight",
    "conv1d.weight": "conv.weight",
    "conv1d.bias": "conv.bias",
    "dt_bias": "dt_bias",
    "A_log": "a_log",
    "D": "skip",
    "norm.weight": "norm.weight",
    "out_proj.weight": "o_proj.weight",
}


@pytest.fixture
def pair():
    net = tiny(phase6.BRANCHES["mamba2"])
    ours, heads = net.blocks[0].mixer, TINY["n_heads"]
    numbers = {"hidden_size": TINY["d_model"], "num_heads": heads, "head_dim": 2 * TINY["d_model"] // heads}
    config = Mamba2Config(
        **numbers, state_size=64, n_groups=1, chunk_size=16, layer_norm_epsilon=1e-5, num_hidden_layers=1
    )
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    own = {path: torch.from_numpy(np.array(value)) for path, value in tree_flatten(ours.parameters())}
    assert sorted(own) == sorted(NAMES.values())
    weights = {name: own[path] for name, path in NAMES.items()}
    theirs.load_state_dict(weights | {"conv1d.weight": weights["conv1d.weight"][:, None]})
    return ours, theirs, net


def test_values_and_gradients_are_theirs(pair):
    assert_same_values_and_gradients(pair, NAMES, LENGTH, values=2e-5, inputs=2e-4, weights=3e-4)


def test_decoding_is_theirs(pair):
    ours, theirs, net = pair
    x = np.random.default_rng(2).standard_normal((2, 30, TINY["d_model"])).astype(np.float32)
    whole = theirs(torch.from_numpy(x)).detach()
    cache, parts = net.make_cache(2), []
    for begin, end in ((0, 20), *((i, i + 1) for i in range(20, 30))):
        ctx = net.context(mx.zeros((2, end - begin), mx.int32), cache).at(0)
        parts.append(ours(mx.array(x[:, begin:end]), ctx))
    np.testing.assert_allclose(mx.concatenate(parts, axis=1), whole, atol=2e-5)


def test_the_first_steps_and_decays_are_those_of_the_paper():
    mixer = phase6.BRANCHES["mamba2"](phase6.BRANCHES["mamba2"].Config(**TINY)).blocks[0].mixer
    rates, steps = mx.exp(mixer.a_log), mx.logaddexp(mixer.dt_bias, 0)
    assert (rates >= 1).all()
    assert (rates <= 16).all()
    assert (steps >= 0.999e-3).all()
    assert (steps <= 0.1001).all()
