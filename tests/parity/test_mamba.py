"""Mamba's mixer against the one of transformers, with the same weights: values, gradients, decoding."""

import numpy as np
import pytest

from phases import phase6
from tests.ladder import TINY, tiny
from tests.parity.mixers import assert_same_values_and_gradients

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")
from transformers import MambaConfig  # noqa: E402
from transformers.models.mamba.modeling_mamba import MambaMixer  # noqa: E402

NAMES = {  # theirs: ours
    "in_proj.weight": "in_proj.weight",
    "conv1d.weight": "conv.weight",
    "conv1d.bias": "conv.bias",
    "x_proj.weight": "x_proj.weight",
    "dt_proj.weight": "dt_proj.weight",
    "dt_proj.bias": "dt_bias",
    "A_log": "a_log",
    "D": "skip",
    "out_proj.weight": "o_proj.weight",
}


@pytest.fixture
def pair():
    kind = phase6.BRANCHES["mamba"]
    net = tiny(kind)
    ours = net.blocks[0].mixer
    theirs = MambaMixer(MambaConfig(hidden_size=TINY["d_model"], num_hidden_layers=1), layer_idx=0)
    weights = {}
    for name, own in NAMES.items():
        value = torch.from_numpy(np.array(find(ours, own)))
        weights[name] = value[:, None] if name == "conv1d.weight" else value
    theirs.load_state_dict(weights)
    return ours, theirs, net


def find(tree, path):
    for name in path.split("."):
        tree = tree[name]
    return tree


def test_values_and_gradients_are_theirs(pair):
    assert_same_values_and_gradients(pair, NAMES, 70, values=1e-5, inputs=1e-4, weights=2e-4)
