"""Gated DeltaNet against transformers' Qwen3-Next, and mLSTM against its xLSTM: functions and layers, same weights."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer.nn.mixers.delta import gated_delta_rule
from mlx_transformer.nn.mixers.mlstm import stabilized_recurrence
from phases import phase6
from tests.ladder import TINY, tiny, tokens

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")
from transformers import Qwen3NextConfig, xLSTMConfig  # noqa: E402
from transformers.models.qwen3_next import modeling_qwen3_next as qwen  # noqa: E402
from transformers.models.xlstm import modeling_xlstm as xlstm  # noqa: E402

D, H, L = TINY["d_model"], TINY["n_heads"], 90
HEAD = D // H


def theirs(x):
    return torch.from_numpy(np.array(x))


def agree(ours, expected, atol=1e-4):
    np.testing.assert_allclose(np.array(ours), expected.detach().numpy(), atol=atol)


@pytest.mark.parametrize("rule", [qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule])
def test_the_gated_delta_rule_is_qwen3_next_s(rule):
    q, k, v = mx.random.normal((3, 2, H, L, HEAD))
    log_decay, beta = -mx.random.uniform(shape=(2, H, L)), mx.random.uniform(shape=(2, H, L))
    state = mx.random.normal((2, H, HEAD, HEAD))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    o, last = gated_delta_rule(q * HEAD**-0.5, k, v, log_decay, beta, state)
    inputs = (theirs(x).transpose(1, 2) for x in (q, k, v, log_decay, beta))
    expected, state = rule(*inputs, initial_state=theirs(state), output_final_state=True)
    agree(o, expected.transpose(1, 2))
    agree(last, state)


def test_the_layer_is_qwen3_next_s():
    net = tiny(phase6.BRANCHES["deltanet"])
    mixer, x = net.blocks[0].mixer, mx.random.normal((2, L, D))
    config = Qwen3NextConfig(
        hidden_size=D, linear_num_value_heads=H, linear_num_key_heads=H, linear_key_head_dim=HEAD,
        linear_value_head_dim=HEAD, linear_conv_kernel_dim=4, rms_norm_eps=net.config.norm_eps,
    )  # fmt: skip
    layer = qwen.Qwen3NextGatedDeltaNet(config, 0)
    by_head = [mixer[f"{name}_proj"].weight.reshape(H, HEAD, D) for name in "qkvg"]
    gates = mx.stack([mixer.beta_proj.weight, mixer.decay_proj.weight], axis=1)
    weights = {
        "in_proj_qkvz.weight": mx.concatenate(by_head, axis=1).reshape(-1, D),  # for each head its q, k, v and gate
        "in_proj_ba.weight": gates.reshape(-1, D),
        "conv1d.weight": mixer.conv.weight[:, None],
        "dt_bias": mixer.dt_bias,
        "A_log": mixer.a_log,
        "norm.weight": mixer.o_norm.weight,
        "out_proj.weight": mixer.o_proj.weight,
    }
    layer.load_state_dict({name: theirs(w) for name, w in weights.items()})
    agree(mixer(x, net.context(tokens(length=L))), layer(theirs(x)))


@pytest.mark.parametrize("form", ["chunkwise", "recurrent"])
def test_the_stabilized_recurrence_is_xlstm_s(form):
    q, k, v = mx.random.normal((3, 2, H, 96, HEAD))
    log_input, forget = 2 * mx.random.normal((2, H, 96)), 1 + mx.random.normal((2, H, 96))
    start = {"sums": mx.zeros((2, H, HEAD, HEAD + 1)), "m": mx.zeros((2, H))}
    h, _ = stabilized_recurrence(q * HEAD**-0.5, k, v, log_input, -mx.logaddexp(0, -forget), start)
    inputs = [theirs(x) for x in (q, k, v, log_input, forget)]
    if form == "chunkwise":
        expected = xlstm.mlstm_chunkwise_native_autograd(*inputs, chunk_size=32)
    else:
        expected = xlstm.mlstm_recurrent_sequence_native(*inputs)
    agree(h, expected, atol=5e-4)


def test_the_layer_is_xlstm_s():
    net = tiny(phase6.BRANCHES["mlstm"])
    mixer, x = net.blocks[0].mixer, mx.random.normal((2, L, D))
    config = xLSTMConfig(
        hidden_size=D, num_heads=H, qk_dim_factor=1.0, v_dim_factor=1.0, norm_eps=net.config.norm_eps,
        weight_mode="single", use_bias=False, chunk_size=32, mode="inference",
    )  # fmt: skip
    layer = xlstm.xLSTMLayer(config)
    weights = {f"{name}.weight": mixer[f"{name}_proj"].weight for name in "qkv"} | {
        "ogate_preact.weight": mixer.g_proj.weight,
        "igate_preact.weight": mixer.input_proj.weight,
        "igate_preact.bias": mixer.input_bias,
        "fgate_preact.weight": mixer.forget_proj.weight,
        "fgate_preact.bias": mixer.forget_bias,
        "multihead_norm.weight": mixer.h_norm.weight,
        "out_proj.weight": mixer.o_proj.weight,
    }
    layer.load_state_dict({name: theirs(w) for name, w in weights.items()})
    agree(mixer(x, net.context(tokens(length=L))), layer(theirs(x))[0])
