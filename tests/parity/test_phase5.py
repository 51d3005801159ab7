"""Phase 5's parts against those of transformers, same weights; whole models: tests/interop/test_llama.py."""

import mlx.core as mx
import numpy as np
import pytest

from phases import phase5
from tests.ladder import TINY, tiny, tokens

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")
from transformers import LlamaConfig, MistralConfig, Qwen3Config  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, apply_rotary_pos_emb  # noqa: E402
from transformers.models.mistral.modeling_mistral import MistralForCausalLM  # noqa: E402
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention  # noqa: E402

L, D, H = TINY["seq_len"], TINY["d_model"], TINY["n_heads"]


def theirs(x):
    return torch.from_numpy(np.array(x))


def agree(ours, expected, atol=1e-5):
    np.testing.assert_allclose(np.array(ours), expected.detach().numpy(), atol=atol)


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
@pytest.mark.parametrize("original", [3, 40, 8192])
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (0.5, 1.5)])
def test_the_scaled_positions_are_llama_3_1_s(factor, original, low, high):
    head_dim = 32
    numbers = {"rope_factor": factor, "rope_low_freq_factor": low, "rope_high_freq_factor": high}
    net = tiny(phase5.Model, head_dim=head_dim, rope_theta=5e4, rope_original_len=original, **numbers)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e4,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    q, k = mx.random.normal((2, 2, H, L, head_dim))
    config = LlamaConfig(hidden_size=D, num_attention_heads=H, head_dim=head_dim, rope_parameters=rope)
    cos, sin = LlamaRotaryEmbedding(config)(theirs(q), torch.arange(L)[None])
    ours, expected = (
        net.position.rotate(q, k, net.context(tokens())),
        apply_rotary_pos_emb(theirs(q), theirs(k), cos, sin),
    )
    agree(ours[0], expected[0])
    agree(ours[1], expected[1])


def test_the_feed_forward_part_is_llama_s():
    ffn, llama = tiny(phase5.Model).blocks[0].ffn, LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=48))
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert set(ffn[name]) == {"weight"}
        llama.get_submodule(name).weight.data = theirs(ffn[name].weight)
    x = mx.random.normal((2, 3, D))
    agree(ffn(x, None), llama(theirs(x)))


def test_attention_with_qk_norm_is_qwen3_s():
    net = tiny(phase5.BRANCHES["qwen3"], head_dim=12, n_kv_heads=2)
    mixer, ctx, x = net.blocks[0].mixer, net.context(tokens()), mx.random.normal((2, L, D))
    config = Qwen3Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=2, head_dim=12, rms_norm_eps=net.config.norm_eps
    )
    config._attn_implementation = "sdpa"
    attention = Qwen3Attention(config, 0)
    for name, parameter in attention.named_parameters():
        parameter.data = theirs(mixer[name.removesuffix(".weight")].weight)
    rotation = LlamaRotaryEmbedding(config)(theirs(x), torch.arange(L)[None])
    agree(mixer(x, ctx), attention(theirs(x), rotation, None)[0], atol=1e-4)


@pytest.mark.parametrize("window", [1, 4, 16, 17, 40])
def test_the_window_is_mistral_s(window):
    """The branch's weights under Hugging Face's names, independent of mlx_transformer.interop."""
    net = tiny(phase5.BRANCHES["mistral"], window=window, head_dim=10)
    config = MistralConfig(
        vocab_size=net.config.vocab_size, hidden_size=D, intermediate_size=48, num_hidden_layers=TINY["n_layers"],
        num_attention_heads=H, num_key_value_heads=net.config.n_kv_heads, head_dim=10, sliding_window=window,
        rms_norm_eps=net.config.norm_eps,
    )  # fmt: skip
    named = {"model.embed_tokens": net.embedding, "model.norm": net.final_norm, "lm_head": net.head}
    for i, block in enumerate(net.blocks):
        named[f"model.layers.{i}.input_layernorm"] = block.norms[0]
        named[f"model.layers.{i}.post_attention_layernorm"] = block.norms[1]
        named |= {f"model.layers.{i}.self_attn.{x}_proj": block.mixer[f"{x}_proj"] for x in "qkvo"}
        named |= {f"model.layers.{i}.mlp.{x}_proj": block.ffn[f"{x}_proj"] for x in ("gate", "up", "down")}
    mistral = MistralForCausalLM(config).eval()
    mistral.load_state_dict({f"{name}.weight": theirs(module.weight) for name, module in named.items()})
    x = tokens(2, 40)
    agree(net(x), mistral(theirs(x).long()).logits, atol=1e-4)
