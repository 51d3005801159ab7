"""Mamba's mixer against the one of transformers, with the same weights: values, gradients, decoding."""

import mlx.core as mx
import numpy as np
import pytest

from phases import phase6
from tests.ladder import TINY, tiny

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
    ours, theirs, net = pair
    x = np.random.default_rng(0).standard_normal((2, 70, TINY["d_model"])).astype(np.float32)
    weight = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    ctx = net.context(mx.zeros((2, 70), mx.int32))

    def loss(parameters, x):
        ours.update(parameters)
        y = ours(x, ctx)
        return (y * mx.array(weight)).sum(), y

    (_, y), (gradients, dx) = mx.value_and_grad(loss, argnums=(0, 1))(ours.trainable_parameters(), mx.array(x))
    given = torch.from_numpy(x).requires_grad_()
    expected = theirs(given)
    (expected * torch.from_numpy(weight)).sum().backward()
    np.testing.assert_allclose(np.array(y), expected.detach(), atol=1e-5)
    np.testing.assert_allclose(np.array(dx), given.grad, atol=1e-4)
    for name, parameter in theirs.named_parameters():
        own = np.array(find(gradients, NAMES[name]))
        np.testing.assert_allclose(own, parameter.grad.reshape(own.shape), rtol=1e-3, atol=2e-4, err_msg=name)
