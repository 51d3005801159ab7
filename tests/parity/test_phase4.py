"""Phase 4's experts against Mixtral's block of transformers, with the same weights."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_transformer.nn.moe import SwiGLUMixture
from phases import phase4
from tests.ladder import TINY, tiny, tokens

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")
from transformers import MixtralConfig  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import (  # noqa: E402
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)

D, F = TINY["d_model"], TINY["d_ff"]


def theirs(x):
    return torch.from_numpy(np.array(x))


@pytest.fixture(params=[(8, 2), (4, 1), (5, 3), (3, 3)], ids=str)
def pair(request):
    n_experts, per_token = request.param
    numbers = {"n_experts": n_experts, "experts_per_token": per_token, "capacity_factor": n_experts}
    ours = SwiGLUMixture(phase4.BRANCHES["moe"].Config(**TINY, **numbers))
    ours.update(tree_map(lambda w: mx.random.normal(w.shape) * 0.3, ours.parameters()))
    config = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=n_experts, num_experts_per_tok=per_token
    )  # fmt: skip
    mixtral = MixtralSparseMoeBlock(config).eval()
    stacked = [theirs(ours.experts[name].weight) for name in ("gate_proj", "up_proj", "down_proj")]
    mixtral.load_state_dict(
        {
            "gate.weight": theirs(ours.router_proj.weight),
            "experts.gate_up_proj": torch.cat(stacked[:2], dim=1),
            "experts.down_proj": stacked[2],
        }
    )
    return ours, mixtral


@pytest.mark.parametrize("training", [False, True], ids=["dropless", "capacity for all"])
def test_the_block_is_mixtral_s(pair, training):
    ours, mixtral = pair
    ours.train(training)
    x = mx.random.normal((3, 29, D))
    ctx = tiny(phase4.Model).context(tokens())
    with torch.no_grad():
        expected = mixtral(theirs(x))
    np.testing.assert_allclose(np.array(ours(x, ctx)), expected.numpy(), atol=1e-4)


def test_the_balance_loss_is_mixtral_s(pair):
    """Mixtral counts choices per token; ours are shares of all choices, so that 1 is balanced."""
    ours, mixtral = pair
    x = mx.random.normal((3, 29, D))
    ctx = tiny(phase4.Model).context(tokens())
    ours(x, ctx)
    balance = next(value.item() for name, value, _ in ctx.auxiliary if name == "router_balance")
    logits = mixtral.gate(theirs(x))[0]
    expected = load_balancing_loss_func((logits,), ours.n_experts, ours.per_token).item()
    assert ours.per_token * balance == pytest.approx(expected, rel=1e-5)
