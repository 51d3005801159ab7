"""Phase 3's parts against those of transformers and torch, on the same inputs and weights."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer import ops
from mlx_transformer.nn.feedforward import GEGLU, SwiGLU
from mlx_transformer.nn.norm import RMSNorm
from mlx_transformer.nn.position import alibi_slopes, t5_buckets
from mlx_transformer.utils.trees import by_path
from phases import phase3
from tests.ladder import TINY, tiny, tokens

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, T5Config  # noqa: E402
from transformers.activations import NewGELUActivation  # noqa: E402
from transformers.models.bloom.modeling_bloom import build_alibi_tensor  # noqa: E402
from transformers.models.llama.modeling_llama import (  # noqa: E402
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseGatedActDense  # noqa: E402

L, D, H = TINY["seq_len"], TINY["d_model"], TINY["n_heads"]


def theirs(x):
    return torch.from_numpy(np.array(x))


def agree(ours, expected, atol=1e-5):
    np.testing.assert_allclose(np.array(ours), expected.detach().numpy(), atol=atol)


def net_and_ctx(branch, **numbers):
    net = tiny(phase3.BRANCHES[branch], **numbers)
    return net, net.context(tokens())


# Our paths of GPT-2's parameters -> Hugging Face's, independent of mlx_transformer.interop.
BLOCK = {
    "norms.0": "ln_1",
    "mixer.o_proj": "attn.c_proj",
    "norms.1": "ln_2",
    "ffn.up_proj": "mlp.c_fc",
    "ffn.down_proj": "mlp.c_proj",
}


def gpt2_weights(net):
    """The weights of the branch `tied` under Hugging Face's names; its maps are kept transposed."""
    own = {path: theirs(w) for path, w in by_path(net.parameters()).items()}
    maps = {path: w.T if w.ndim == 2 else w for path, w in own.items()}
    named = {"wte.weight": own["embedding.weight"], "wpe.weight": own["position.weight"]}
    for kind in ("weight", "bias"):
        named[f"ln_f.{kind}"] = own[f"final_norm.{kind}"]
        for i in range(TINY["n_layers"]):
            packed = [maps[f"blocks.{i}.mixer.{x}_proj.{kind}"] for x in "qkv"]
            named[f"h.{i}.attn.c_attn.{kind}"] = torch.cat(packed, dim=-1)
            for path, name in BLOCK.items():
                named[f"h.{i}.{name}.{kind}"] = maps[f"blocks.{i}.{path}.{kind}"]
    return {f"transformer.{name}": w for name, w in named.items()} | {"lm_head.weight": own["embedding.weight"]}


def test_the_branch_tied_is_gpt_2():
    net = tiny(phase3.BRANCHES["tied"], max_len=19)
    config = GPT2Config(
        vocab_size=net.config.vocab_size, n_positions=19, n_embd=D, n_layer=TINY["n_layers"], n_head=H, n_inner=48
    )
    gpt2 = GPT2LMHeadModel(config).eval()
    gpt2.load_state_dict(gpt2_weights(net))
    x = tokens(2, 19)
    agree(net(x), gpt2(theirs(x).long()).logits, atol=1e-4)


def test_gelu_is_gpt_2_s():
    x = mx.random.normal((50,)) * 3
    agree(ops.gelu_tanh(x), NewGELUActivation()(theirs(x)))


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope_is_llama_s(theta):
    net, ctx = net_and_ctx("rope", rope_theta=theta)
    q, k = mx.random.normal((2, 2, H, L, D // H))
    rope = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(hidden_size=D, num_attention_heads=H, rope_parameters=rope)
    cos, sin = LlamaRotaryEmbedding(config)(theirs(q), torch.arange(L)[None])
    ours, expected = net.position.rotate(q, k, ctx), apply_rotary_pos_emb(theirs(q), theirs(k), cos, sin)
    agree(ours[0], expected[0])
    agree(ours[1], expected[1])


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 6, 8, 12, 16, 20])
def test_alibi_s_slopes_are_bloom_s(n_heads):
    bloom = build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)  # slope * position of the key
    np.testing.assert_allclose(alibi_slopes(n_heads), bloom[:, 0, 1].numpy(), rtol=1e-6)


def test_alibi_gives_bloom_s_softmax():
    """Bloom adds slope * position of the key: the same for each query up to a number that the softmax cancels."""
    net, ctx = net_and_ctx("alibi")
    q, k = mx.random.normal((2, 2, H, L, D // H))
    scores = q @ k.swapaxes(-1, -2)
    ours = mx.softmax(scores + net.position.bias(q, k, ctx.positions, ctx) + causal(), axis=-1)
    bloom = build_alibi_tensor(torch.ones(2, L), H, torch.float32).reshape(2, H, 1, L)
    agree(ours, torch.softmax(theirs(scores) + bloom + theirs(causal()), dim=-1))


def causal():
    return mx.where(mx.arange(L)[:, None] >= mx.arange(L), 0.0, -mx.inf)


@pytest.mark.parametrize(
    ("n_buckets", "max_distance"),
    [(32, 128), (32, 64), (8, 20), (8, 64), (16, 200), (7, 33), (2, 9), (9, 128), (54, 64)],
)
def test_t5_s_buckets_are_t5_s(n_buckets, max_distance):
    distance = torch.arange(0, 3 * max_distance)
    expected = T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=n_buckets, max_distance=max_distance
    )
    ours = t5_buckets(n_buckets, max_distance)
    assert [ours[min(d, max_distance)] for d in distance.tolist()] == expected.tolist()


def test_t5_s_bias_is_t5_s():
    net, ctx = net_and_ctx("t5", n_buckets=8, max_distance=12)
    config = T5Config(
        d_model=D, num_heads=H, d_kv=D // H, relative_attention_num_buckets=8, relative_attention_max_distance=12,
        is_decoder=True,
    )  # fmt: skip
    attention = T5Attention(config, has_relative_attention_bias=True)
    attention.relative_attention_bias.weight.data = theirs(net.position.weight)
    q = mx.zeros((2, H, L, D // H))
    seen = theirs(causal()) == 0
    expected = attention.compute_bias(L, L)[0].masked_fill(~seen, 0.0)
    ours = net.position.bias(q, q, ctx.positions, ctx) * mx.array(seen.numpy())
    agree(ours, expected)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_grouped_attention_is_torch_s(n_kv_heads):
    net, ctx = net_and_ctx("gqa", n_kv_heads=n_kv_heads)
    mixer = net.blocks[0].mixer
    q, k, v = mixer.project(mx.random.normal((2, L, D)), ctx)
    expected = scaled_dot_product_attention(theirs(q), theirs(k), theirs(v), is_causal=True, enable_gqa=True)
    agree(mixer.attend(q, k, v, ctx), expected)


def test_rms_norm_is_llama_s_and_torch_s():
    x, ours = mx.random.normal((3, D)) * 4, RMSNorm(D, 1e-5)
    ours.weight = mx.random.normal((D,))
    for norm in (LlamaRMSNorm(D, 1e-5), torch.nn.RMSNorm(D, 1e-5)):
        norm.weight.data = theirs(ours.weight)
        agree(ours(x), norm(theirs(x)))


def copied(ffn, **names):
    """Give their feed-forward part our weights; our biases, which theirs lacks, become 0."""
    for path, module in names.items():
        ffn[path].bias = mx.zeros_like(ffn[path].bias)
        ffn[path].weight = mx.random.normal(ffn[path].weight.shape)
        module.weight.data = theirs(ffn[path].weight)


def test_geglu_is_t5_1_1_s():
    ours = GEGLU(phase3.Config(**TINY))
    t5 = T5DenseGatedActDense(T5Config(d_model=D, d_ff=48, dropout_rate=0.0, feed_forward_proj="gated-gelu"))
    copied(ours, gate_proj=t5.wi_0, up_proj=t5.wi_1, down_proj=t5.wo)
    x = mx.random.normal((2, 3, D))
    agree(ours(x, None), t5.eval()(theirs(x)), atol=1e-3)


def test_swiglu_is_llama_s():
    ours = SwiGLU(phase3.Config(**TINY))
    llama = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=48))
    copied(ours, gate_proj=llama.gate_proj, up_proj=llama.up_proj, down_proj=llama.down_proj)
    x = mx.random.normal((2, 3, D))
    agree(ours(x, None), llama(theirs(x)), atol=1e-3)
