"""A model made ready for decoding: the same numbers, and the model itself left alone."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_transformer.generate.ready import Joined, Turned, ready
from mlx_transformer.nn.attention import Attention
from mlx_transformer.utils.trees import by_path
from tests.ladder import kinds, tiny, tokens


@pytest.mark.parametrize("name", sorted(kinds()))
def test_it_computes_the_same(name):
    net = tiny(kinds()[name])
    before = by_path(net.parameters())
    made = ready(net)
    np.testing.assert_allclose(np.array(made(tokens())), np.array(net(tokens())), rtol=1e-4, atol=1e-5)
    after = by_path(net.parameters())
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[path], after[path]) for path in before)
    assert not any(isinstance(part, (Joined, Turned)) for part in net.modules())


@pytest.mark.parametrize("name", sorted(kinds()))
def test_no_linear_map_is_left_and_every_attention_is_joined(name):
    parts = ready(tiny(kinds()[name])).modules()
    assert any(isinstance(part, Turned) for part in parts)
    assert not any(isinstance(part, nn.Linear) for part in parts)
    assert all(isinstance(part, Joined) for part in parts if isinstance(part, Attention))
