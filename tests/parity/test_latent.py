"""Phase 4's latent attention against DeepSeek-V2's and V3's of transformers, with the same weights."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from phases import phase4
from tests.ladder import TINY, tiny, tokens

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")
from transformers import DeepseekV2Config, DeepseekV3Config  # noqa: E402
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3  # noqa: E402

D, H, R, ROPE, WIDTH, LENGTH = TINY["d_model"], TINY["n_heads"], 12, 6, 8, 17
KINDS = {
    "V2": (DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding),
    "V3": (DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding),
}


def theirs(x):
    return torch.from_numpy(np.array(x))


def interleaved(rows):
    """Our rows of a rotary map, pairs (i, i + half), in the order of theirs, pairs (2 i, 2 i + 1)."""
    return rows.reshape(*rows.shape[:-2], 2, ROPE // 2, D).swapaxes(-2, -3).reshape(rows.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_latent_attention_is_deepseeks(kind):
    make_config, attention, rotary = KINDS[kind]
    numbers = {
        "hidden_size": D,
        "num_attention_heads": H,
        "num_key_value_heads": H,
        "q_lora_rank": None,
        "kv_lora_rank": R,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": WIDTH,
        "v_head_dim": WIDTH,
        "rope_theta": 10_000.0,
    }
    config = make_config(**numbers)
    config._attn_implementation = "eager"
    net = tiny(phase4.BRANCHES["mla"], kv_rank=R, rope_dim=ROPE, norm_eps=1e-6)
    ours = net.blocks[1].mixer
    ours.update(tree_map(lambda w: mx.random.normal(w.shape) * 0.3, ours.parameters()))
    q = ours.q_proj.weight.reshape(H, WIDTH + ROPE, D)
    q = mx.concatenate([q[:, :WIDTH], interleaved(q[:, WIDTH:])], axis=1).reshape(-1, D)
    kv = mx.concatenate([ours.k_up_proj.weight, ours.v_up_proj.weight], axis=1).reshape(-1, R)
    weights = {
        "q_proj.weight": q,
        "kv_a_proj_with_mqa.weight": mx.concatenate([ours.latent_proj.weight, interleaved(ours.rope_proj.weight)]),
        "kv_a_layernorm.weight": ours.latent_norm.weight,
        "kv_b_proj.weight": kv,
        "o_proj.weight": ours.o_proj.weight,
    }
    part = attention(config, 0)
    part.load_state_dict({name: theirs(w) for name, w in weights.items()})
    x = mx.random.normal((2, LENGTH, D))
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        positions = rotary(config)(theirs(x), torch.arange(LENGTH)[None])
        expected, _ = part(theirs(x), attention_mask=mask, position_embeddings=positions)
    np.testing.assert_allclose(ours(x, net.context(tokens(length=LENGTH))), expected, atol=2e-5)
    cache = net.make_cache(2)
    for start, end in ((0, 9), (9, 12), *((i, i + 1) for i in range(12, LENGTH))):
        ctx = net.context(tokens(length=end - start), cache).at(1)
        np.testing.assert_allclose(ours(x[:, start:end], ctx), expected[:, start:end], atol=2e-5)
        cache.offset = cache.offset + end - start
