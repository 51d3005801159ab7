"""Our mixers against PyTorch's, with the same weights."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")


def assert_same_values_and_gradients(pair, names, length, *, values, inputs, weights):
    """The outputs of (our mixer, theirs, our model) and their gradients agree, each within its absolute tolerance.

    names: of their parameters -> ours.
    """
    ours, theirs, net = pair
    x = np.random.default_rng(0).standard_normal((2, length, net.config.d_model)).astype(np.float32)
    weight = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    ctx = net.context(mx.zeros((2, length), mx.int32))

    def loss(parameters, x):
        ours.update(parameters)
        y = ours(x, ctx)
        return (y * mx.array(weight)).sum(), y

    (_, y), (gradients, dx) = mx.value_and_grad(loss, argnums=(0, 1))(ours.trainable_parameters(), mx.array(x))
    given = torch.from_numpy(x).requires_grad_()
    expected = theirs(given)
    (expected * torch.from_numpy(weight)).sum().backward()
    np.testing.assert_allclose(np.array(y), expected.detach(), atol=values)
    np.testing.assert_allclose(np.array(dx), given.grad, atol=inputs)
    own = dict(tree_flatten(gradients))
    for name, parameter in theirs.named_parameters():
        found = np.array(own[names[name]])
        np.testing.assert_allclose(found, parameter.grad.reshape(found.shape), rtol=1e-3, atol=weights, err_msg=name)
