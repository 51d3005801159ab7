"""The encoder-decoder agrees with torch.nn.Transformer, from the same weights and with padding."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn import value_and_grad
from mlx.utils import tree_flatten

from mlx_transformer import nn
from phases import phase1
from tests.ladder import V, tiny

torch = pytest.importorskip("torch")
POST = phase1.BRANCHES["translator"]


class PreNorm(POST):
    EncoderBlock, Block = nn.PreNormBlock, nn.CrossPreNormBlock

    def make_final_norm(self):
        return self.make_norm()


def pairs(batch=3, n=11):
    """Pairs whose sources and targets end at different places."""
    x = np.array(mx.random.randint(0, V, (batch, 2, n)))
    for row, (source, target) in enumerate(((n, 6), (4, n), (1, 2))):
        x[row, 0, source:] = x[row, 1, target:] = nn.PAD
    return x


def theirs(net):
    """Return torch's module and embedding with the weights of ours, and which of ours each of its parameters holds."""
    c, pre = net.config, isinstance(net, PreNorm)
    module = torch.nn.Transformer(
        c.d_model, c.n_heads, c.n_layers, c.n_layers, c.d_ff, 0.0, layer_norm_eps=c.norm_eps, batch_first=True,
        norm_first=pre,
    )  # fmt: skip
    if not pre:
        module.encoder.norm = module.decoder.norm = None
    own = {path: torch.tensor(np.array(value)) for path, value in tree_flatten(net.parameters())}
    places = dict(_places(c.n_layers, pre))
    state = {}
    for name, paths in places.items():
        state[name] = torch.cat([own[path] for path in paths])
    module.load_state_dict(state)
    embedding = torch.nn.Parameter(own["embedding.weight"])
    return module, embedding, places


def _places(n_layers, pre):
    """Yield a name of torch's and the paths of ours that it stacks."""
    for side, parts in (
        ("encoder", {"self_attn": "mixer"}),
        ("decoder", {"self_attn": "mixer", "multihead_attn": "cross"}),
    ):
        for i in range(n_layers):
            there, here = f"{side}.layers.{i}", ("encoder." if side == "encoder" else "") + f"blocks.{i}"
            for kind in ("weight", "bias"):
                for theirs, ours in parts.items():
                    joined = [f"{here}.{ours}.{name}_proj.{kind}" for name in "qkv"]
                    yield f"{there}.{theirs}.in_proj_{kind}", joined
                    yield f"{there}.{theirs}.out_proj.{kind}", [f"{here}.{ours}.o_proj.{kind}"]
                yield f"{there}.linear1.{kind}", [f"{here}.ffn.up_proj.{kind}"]
                yield f"{there}.linear2.{kind}", [f"{here}.ffn.down_proj.{kind}"]
                for norm in range(len(parts) + 1):
                    yield f"{there}.norm{norm + 1}.{kind}", [f"{here}.norms.{norm}.{kind}"]
        if pre:
            for kind in ("weight", "bias"):
                yield f"{side}.norm.{kind}", [("encoder." if side == "encoder" else "") + f"final_norm.{kind}"]


def their_logits(module, embedding, x):
    source, target = torch.tensor(x[:, 0]), torch.tensor(x[:, 1])
    n, d = source.shape[1], embedding.shape[1]
    angle = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    position = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    def embedded(tokens):
        return embedding[tokens.clamp(min=0)] * d**0.5 + position

    h = module(
        embedded(source),
        embedded(target),
        tgt_mask=torch.triu(torch.ones(n, n, dtype=torch.bool), 1),
        src_key_padding_mask=source < 0,
        tgt_key_padding_mask=target < 0,
        memory_key_padding_mask=source < 0,
    )
    return h @ embedding.T


@pytest.mark.parametrize("kind", [POST, PreNorm], ids=["post-norm", "pre-norm"])
def test_outputs_and_gradients_agree_with_pytorch(kind):
    net, x = tiny(kind, n_layers=2), pairs()
    net.label_smoothing = 0.1
    net.train()
    (loss, _), gradients = value_and_grad(net, net.loss)(mx.array(x))
    module, embedding, places = theirs(net)
    logits, told = their_logits(module, embedding, x), np.array(net(mx.array(x)))
    real = x[:, 1] >= 0
    np.testing.assert_allclose(told[real], logits.detach().numpy()[real], atol=1e-4)
    targets = torch.tensor(x[:, 1, 1:])
    their_loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets.long(), ignore_index=nn.PAD, label_smoothing=0.1
    )
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    their_loss.backward()
    own = {path: np.array(value) for path, value in tree_flatten(gradients)}
    found = {"embedding.weight": embedding.grad} | {
        path: part
        for name, paths in places.items()
        for path, part in zip(paths, module.get_parameter(name).grad.chunk(len(paths)), strict=True)
    }
    assert found.keys() == own.keys()
    for path, value in found.items():
        scale = np.abs(value.numpy()).max()
        np.testing.assert_allclose(own[path], value.numpy(), atol=1e-3 * scale + 1e-6, err_msg=path)
