"""The copy of a model for decoding: the same outputs, and the model itself unchanged."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_transformer.generate.decoding_model import FusedQKVAttention, TransposedLinear, decoding_model
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.latent import LatentAttention
from mlx_transformer.utils.trees import by_path
from tests.ladder import kinds, tiny, tokens


@pytest.mark.parametrize("name", sorted(kinds()))
def test_it_computes_the_same(name):
    net = tiny(kinds()[name])
    before = by_path(net.parameters())
    made = decoding_model(net)
    np.testing.assert_allclose(np.array(made(tokens())), np.array(net(tokens())), rtol=1e-4, atol=3e-5)
    after = by_path(net.parameters())
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[path], after[path]) for path in before)
    assert not any(isinstance(part, (FusedQKVAttention, TransposedLinear)) for part in net.modules())


@pytest.mark.parametrize("name", sorted(kinds()))
def test_every_linear_map_and_every_attention_is_replaced(name):
    parts = decoding_model(tiny(kinds()[name])).modules()
    assert any(isinstance(part, TransposedLinear) for part in parts)
    assert not any(isinstance(part, nn.Linear) for part in parts)
    attention = (part for part in parts if isinstance(part, Attention) and not isinstance(part, LatentAttention))
    assert all(isinstance(part, FusedQKVAttention) for part in attention)
