"""Phase 1 against torch.nn.TransformerEncoder, post-LN and ReLU, from the same weights."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from phases import phase1
from tests.ladder import TINY, V, tiny, tokens

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")


class TorchDecoder(torch.nn.Module):
    """The encoder of torch.nn under a causal mask, sinusoids at the input, an untied head."""

    def __init__(self, config):
        super().__init__()
        self.embedding = torch.nn.Embedding(config.vocab_size, config.d_model)
        layer = torch.nn.TransformerEncoderLayer(
            config.d_model, config.n_heads, config.d_ff, dropout=0.0, activation="relu", batch_first=True
        )
        self.encoder = torch.nn.TransformerEncoder(layer, config.n_layers)
        self.head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, x):
        length, d = x.shape[1], self.embedding.embedding_dim
        table = torch.zeros(length, d)
        for position in range(length):  # the paper's formula, number by number
            for i in range(0, d, 2):
                table[position, i] = math.sin(position / 10000 ** (i / d))
                table[position, i + 1] = math.cos(position / 10000 ** (i / d))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.encoder(self.embedding(x) * math.sqrt(d) + table, mask=mask, is_causal=True))


def torch_weights(model):
    """The weights (or gradients) of a phase 1 model under torch's names."""
    named = {path: torch.from_numpy(np.array(value)) for path, value in tree_flatten(model)}
    out = {"embedding.weight": named.pop("embedding.weight"), "head.weight": named.pop("head.weight")}
    for i in range(TINY["n_layers"]):
        ours, theirs = f"blocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            packed = [named.pop(f"{ours}mixer.{x}_proj.{kind}") for x in "qkv"]
            out[f"{theirs}self_attn.in_proj_{kind}"] = torch.cat(packed)
            out[f"{theirs}self_attn.out_proj.{kind}"] = named.pop(f"{ours}mixer.o_proj.{kind}")
            out[f"{theirs}linear1.{kind}"] = named.pop(f"{ours}ffn.up_proj.{kind}")
            out[f"{theirs}linear2.{kind}"] = named.pop(f"{ours}ffn.down_proj.{kind}")
            for n in (0, 1):
                out[f"{theirs}norm{n + 1}.{kind}"] = named.pop(f"{ours}norms.{n}.{kind}")
    assert not named
    return out


@pytest.fixture
def pair():
    ours = tiny(phase1.Model)
    theirs = TorchDecoder(ours.config)
    theirs.load_state_dict(torch_weights(ours.parameters()))
    return ours, theirs


def test_logits_agree(pair):
    ours, theirs = pair
    x = tokens(4)
    expected = theirs(torch.from_numpy(np.array(x)).long()).detach().numpy()
    np.testing.assert_allclose(np.array(ours(x)), expected, atol=1e-4)


def test_every_gradient_agrees(pair):
    ours, theirs = pair
    batch = tokens(4, 18)
    (loss, _), gradients = nn.value_and_grad(ours, ours.loss)(batch)
    x = torch.from_numpy(np.array(batch)).long()
    expected = torch.nn.functional.cross_entropy(theirs(x[:, :-1]).reshape(-1, V), x[:, 1:].reshape(-1))
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    own = torch_weights(gradients)
    scale = max(parameter.grad.abs().max().item() for parameter in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        # The gradient of a bias of the keys is only rounding: hence the small share of the largest gradient.
        bound = 1e-3 * parameter.grad.abs().max().item() + 1e-6 * scale
        assert (own[name] - parameter.grad).abs().max().item() <= bound, name


def test_another_weight_gives_other_logits(pair):
    ours, theirs = pair
    ours.blocks[0].mixer.o_proj.bias = mx.ones_like(ours.blocks[0].mixer.o_proj.bias)
    x = tokens(4)
    assert np.abs(np.array(ours(x)) - theirs(torch.from_numpy(np.array(x)).long()).detach().numpy()).max() > 1e-3
