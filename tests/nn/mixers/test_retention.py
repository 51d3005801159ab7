"""Retention: equal to the recurrent equation of the paper, in PyTorch with complex numbers."""

import mlx.core as mx
import numpy as np
import torch

from phases import phase6
from tests.ladder import TINY, tiny, tokens


def test_retention_equals_the_recurrence_of_the_paper():
    """Sun et al. 2023, arXiv 2307.08621, eq. 6 with the rotation in S: S_n = gamma e^(-i theta) S_(n-1) + ..."""
    net = tiny(phase6.BRANCHES["retnet"])
    mixer, length, heads, d = net.blocks[0].mixer, 100, TINY["n_heads"], TINY["d_model"] // TINY["n_heads"]
    x = mx.random.normal((2, length, TINY["d_model"]), key=mx.random.key(1))
    y = mixer(x, net.context(tokens(length=length)))

    weights = {name: torch.tensor(np.array(mixer[f"{name}_proj"].weight)).double() for name in "qkvgo"}
    wide = torch.tensor(np.array(x)).double()
    q, k, v = ((wide @ weights[name].T).reshape(2, length, heads, -1) for name in "qkv")
    q, k = (torch.complex(*one.chunk(2, dim=-1)) for one in (q, k / d**0.5))  # pairs (i, i + d / 2)
    theta = 10_000.0 ** (-torch.arange(d // 2).double() / (d // 2))
    turn = torch.polar(1 - 2.0 ** (-5 - torch.arange(heads).double())[:, None], theta)  # gamma e^(i theta)
    state, outputs = torch.zeros(2, heads, d // 2, 2 * d, dtype=torch.complex128), []
    for t in range(length):
        state = turn[..., None] * state + k[:, t, :, :, None].conj() * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(2).real)
    o = torch.stack(outputs, dim=1)
    o = torch.nn.functional.group_norm(o.flatten(0, 1).flatten(1), heads, eps=1e-5).reshape(2, length, -1)
    expected = (torch.nn.functional.silu(wide @ weights["g"].T) * o) @ weights["o"].T
    np.testing.assert_allclose(y, expected, atol=5e-5)


def test_a_head_forgets_as_fast_as_its_decay_says():
    decays = mx.exp(tiny(phase6.BRANCHES["retnet"]).blocks[0].mixer.log_decay()).flatten().tolist()
    np.testing.assert_allclose(decays, [31 / 32, 63 / 64, 127 / 128, 255 / 256], rtol=1e-6)
