"""Mixture of Depths and multi-token prediction: equal to phase 6 in one setting, and to their equations in others."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path
from phases import phase4, phase6
from phases.ablations.phase4 import FusedWindow, WindowConfig
from tests.ladder import TINY, tiny, tokens
from tests.phases.test_architecture import apart, like, set_all

BRANCHES = phase6.BRANCHES
D = TINY["d_model"]


def loss_of(net, batch):
    return net.loss(batch)[0].item()


# --- Mixture of Depths ----------------------------------------------------------------------------------------------


def test_all_tokens_through_a_router_of_zero_are_phase_6():
    before, batch = tiny(phase6.Model), tokens(2, 18)
    net = set_all(like(BRANCHES["mod"], before, depth_capacity=1.0, depth_router_weight=0.0), "router_proj.weight", 0)
    assert apart(net, before) < 1e-5  # x + (y - x) for y
    net.train()
    np.testing.assert_allclose(loss_of(net, batch), loss_of(before, batch), rtol=1e-6)
    routed = like(BRANCHES["mod"], before)
    assert apart(routed, before) > 1e-3
    assert abs(loss_of(routed, batch) - loss_of(before, batch)) > 1e-4


def routed_block(**numbers):
    """The first block with a router, its input and context, in training mode."""
    net = tiny(BRANCHES["mod"], depth_capacity=0.3, **numbers)
    net.train()
    return net.blocks[1], mx.random.normal((2, 17, D)), net.context(tokens())


def test_training_computes_the_tokens_with_the_largest_scores_as_a_sequence_of_their_own():
    block, x, ctx = routed_block()
    found, expected = block(x, ctx), np.array(x)
    scores = np.array(x) @ np.array(block.router_proj.weight)[0]
    for b in range(2):
        chosen = np.sort(np.argsort(-scores[b])[:5])  # 0.3 of 17 tokens
        some = x[b : b + 1, mx.array(chosen)]
        alone = replace(ctx, tokens=ctx.tokens[b : b + 1, mx.array(chosen)], positions=mx.array(chosen))
        change = super(type(block).__mro__[1], block).__call__(some, alone) - some
        expected[b, chosen] += np.array(change[0]) * (2 / (1 + np.exp(-scores[b, chosen])))[:, None]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    metrics = ctx.auxiliary_loss()[1]
    among = scores >= np.sort(scores, axis=1)[:, -5:][:, :1]
    np.testing.assert_allclose(metrics["depth_router"], (np.logaddexp(0, scores) - scores * among).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["depth_agreement"], ((scores >= 0) == among).mean())


def test_a_token_that_is_not_chosen_is_passed_on_and_seen_by_no_other():
    block, x, ctx = routed_block()
    block.eval()
    chosen = np.array(block.router_proj(x)[0, :, 0] >= 0)
    assert 0 < chosen.sum() < 17
    out = np.array(block(x, ctx)[0])
    assert (out[~chosen] == np.array(x[0])[~chosen]).all()
    other = mx.where(mx.array(chosen)[:, None], x, 1.5 * x)  # the same choice
    np.testing.assert_array_equal(np.array(block(other, ctx)[0])[chosen], out[chosen])


def test_recomputed_depths_have_the_same_gradients():
    net = tiny(BRANCHES["mod"])
    net.train()
    expected = by_path(nn.value_and_grad(net, net.loss)(tokens(2, 18))[1])
    net.checkpoint = "block"
    for path, gradient in by_path(nn.value_and_grad(net, net.loss)(tokens(2, 18))[1]).items():
        np.testing.assert_allclose(gradient, expected[path], atol=1e-5, err_msg=path)


def test_depths_refuse_a_mixer_that_cannot_hide_a_token_and_a_capacity_of_none():
    class Windowed(BRANCHES["mod"]):
        Config = type("Config", (WindowConfig, BRANCHES["mod"].Config), {})
        Mixer = FusedWindow

    with pytest.raises(BadInput, match="FusedWindow cannot hide the tokens"):
        tiny(Windowed)
    with pytest.raises(BadInput, match=r"depth_capacity = 0.0: expected a number above 0, up to 1"):
        tiny(BRANCHES["mod"], depth_capacity=0.0)


def test_a_part_of_the_tokens_of_a_masked_sequence_is_refused():
    net = tiny(phase4.Model)
    with pytest.raises(ValueError, match="cannot be taken"):
        replace(net.context(tokens()), mask=mx.ones((17, 17), mx.bool_)).take(mx.array([[0], [1]]))


# --- multi-token prediction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["mtp", "mtp_parallel"])
def test_further_tokens_change_the_training_loss_alone(branch):
    before, batch = tiny(phase6.Model), tokens(2, 18)
    none, net = like(BRANCHES[branch], before, n_predict=1), like(BRANCHES[branch], before, n_predict=3)
    assert by_path(none.parameters()).keys() == by_path(before.parameters()).keys()
    assert loss_of(none, batch) == loss_of(before, batch)
    assert apart(net, before) == 0
    assert net.count_parameters()["active"] == before.count_parameters()["total"] < net.count_parameters()["total"]
    loss, metrics = net.loss(batch)
    assert metrics["loss"].item() == loss_of(before, batch)
    further = [metrics[f"loss_token_{i}"].item() for i in (2, 3)]
    np.testing.assert_allclose(loss.item(), metrics["loss"].item() + 0.3 * np.mean(further), rtol=1e-6)


def test_the_losses_of_further_tokens_are_those_of_the_equations():
    batch = tokens(2, 18)
    inputs, targets = batch[:, :-1], batch[:, 1:]
    net = tiny(BRANCHES["mtp_parallel"], n_predict=3)
    ctx = net.context(inputs)
    h = net.hidden(ctx)
    for i, part in enumerate(net.further):
        own = net.context(targets[:, i:-1])
        logits = net.unembed(part.out_norm(part.block(h[:, : 16 - i], own)))
        check_loss(net, batch, i + 2, logits)

    net = tiny(BRANCHES["mtp"], n_predict=3)
    h = net.hidden(ctx)
    for i, part in enumerate(net.further):
        own = net.context(targets[:, i:-1])
        both = [part.hidden_norm(h[:, :-1]), part.token_norm(net.embed_tokens(ctx.after(1 + i)))]
        h = part.out_norm(part.block(part.merge_proj(mx.concatenate(both, axis=-1)), own))
        check_loss(net, batch, i + 2, net.unembed(h))


def check_loss(net, batch, ahead, logits):
    """Compare a logged loss with that of logits for the token `ahead` tokens after each."""
    expected = nn.losses.cross_entropy(logits, batch[:, ahead:]).mean()
    np.testing.assert_allclose(net.loss(batch)[1][f"loss_token_{ahead}"], expected, rtol=1e-5)


def test_further_tokens_beyond_the_sequence_are_refused():
    with pytest.raises(BadInput, match="n_predict = 18 exceeds seq_len = 17"):
        tiny(BRANCHES["mtp"], n_predict=18)
