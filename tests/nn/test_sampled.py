"""The sampled softmax: its predecessor, its equation written out, and what its correction is for."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_transformer.nn import sampled as sampling
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path
from phases import phase6
from tests.ladder import TINY, V, tiny, tokens
from tests.phases.test_architecture import apart, like


def sampled(n):
    """Return phase 6 with a loss over n tokens of the vocabulary."""
    return type("Sampled", (phase6.Model,), {"sample_size": lambda self, n_targets: n})


def gradients(net, batch):
    mx.random.seed(11)
    (loss, _), found = nn.value_and_grad(net, net.loss)(batch)
    return loss.item(), by_path(found)


def test_a_sample_of_the_whole_vocabulary_is_the_full_softmax():
    full, batch = tiny(phase6.BRANCHES["without_sampled_softmax"]), tokens(3, 18)
    loss, theirs = gradients(full, batch)
    for kind in (phase6.Model, sampled(V)):  # a vocabulary as small as this one is not sampled
        own, ours = gradients(like(kind, full), batch)
        assert own == loss
        assert all(mx.array_equal(ours[path], theirs[path]) for path in theirs)
    assert gradients(like(sampled(V - 1), full), batch)[0] != loss


def test_bounded_logits_have_the_full_loss():
    net, batch = tiny(phase6.BRANCHES["with_softcap"]), tokens(3, 18)
    loss = gradients(net, batch)[0]
    net.__class__ = type("Sampled", (type(net),), {"sample_size": lambda self, n_targets: 40})
    assert gradients(net, batch)[0] == loss


def test_the_size_of_a_sample_follows_the_targets_and_their_distribution():
    net = phase6.Model(phase6.Config(**TINY | {"vocab_size": 4096}))
    assert net.sample_size(1024) == math.ceil(1.15 * 4096 * (1 - (1 - 1 / 4096) ** 1024))
    assert net.sample_size(10**6) == 4096
    net.prepare(np.repeat(np.arange(100), 1000), 0)
    assert net.sample_size(1024) == sampling.LEAST
    draws = np.random.default_rng(0).geometric(0.001, 100_000) % 4096
    net.prepare(draws, 0)
    distinct = np.mean([len(np.unique(draws[i : i + 2048])) for i in range(0, 90_000, 2048)])
    assert net.sample_size(2048) == pytest.approx(1.15 * distinct, rel=0.02)
    with pytest.raises(BadInput, match=r"sample_ratio = -0.1: expected at least 0"):
        phase6.Config(**TINY, sample_ratio=-0.1)


def test_evaluation_and_decoding_are_those_of_the_full_softmax():
    full, x = tiny(phase6.BRANCHES["without_sampled_softmax"]), tokens(3, 18)
    net = like(sampled(40), full)
    assert apart(net, full) == 0
    (ctx, targets), (other, _) = net.inputs(x), full.inputs(x)
    ours, theirs = (one.evaluation_loss(one.hidden(c), targets, c) for one, c in ((net, ctx), (full, other)))
    assert mx.array_equal(ours, theirs)


def plain(h, weight, y, sample, log_q, scored):
    """Return the mean loss over the sample, and of each token the loss whose sum has the token itself uncorrected."""
    z = h @ weight[sample].T
    corrected = z - log_q
    at = mx.argmax(sample == y[:, None], axis=-1)
    own = mx.take_along_axis(z, at[:, None], -1)[:, 0]
    losses = mx.logsumexp(corrected, axis=-1) - (own - log_q[at])
    others = mx.where(sample == y[:, None], z, corrected)
    return (losses * scored).sum() / scored.sum(), mx.logsumexp(others, axis=-1) - own


@pytest.mark.parametrize("n", [50, 20])  # 20: fewer than there are targets
def test_loss_and_gradients_are_those_of_the_equation(n):
    net, batch = tiny(sampled(n)), tokens(3, 18)
    ctx, targets = net.inputs(batch)
    h, y = net.hidden(ctx).reshape(-1, TINY["d_model"]), targets.reshape(-1)
    mx.random.seed(4)
    sample, log_q = net.draw(targets, n)
    scored = mx.any(sample == y[:, None], axis=-1)
    assert scored.all().item() == (n == 50)

    def ours(h, weight):
        mx.random.seed(4)
        net.head.weight = weight
        return net.training_losses(h.reshape(*targets.shape, -1), targets, ctx)

    def theirs(h, weight):
        return plain(h, weight, y, sample, log_q, scored)

    weight = net.head.weight
    (mean, each), (own, nats) = theirs(h, weight), ours(h, weight)
    assert own.item() == pytest.approx(mean.item(), rel=1e-5)
    np.testing.assert_allclose(nats.reshape(-1) * scored, each * scored, rtol=1e-4)
    found, expected = (mx.grad(lambda h, w, f=f: f(h, w)[0], (0, 1))(h, weight) for f in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_sample_has_the_targets_first_and_no_token_twice():
    net, targets = tiny(sampled(50)), tokens(2, 10)
    sample, log_q = net.draw(targets, 50)
    here = set(targets.flatten().tolist())
    assert set(sample[: len(here)].tolist()) == here
    assert len(set(sample.tolist())) == 50
    assert (log_q <= 0).all()


def test_the_correction_makes_a_sampled_sum_right_on_average():
    net, u = tiny(sampled(32)), np.random.default_rng(0)
    net.prepare(np.minimum(u.geometric(0.06, 4000) - 1, V - 1), 0)
    terms = np.array(mx.random.normal((V,), key=mx.random.key(1)))
    sums, included = [], np.zeros(V)
    probabilities = np.array(net._frequency, np.float64)
    probabilities /= probabilities.sum()
    for _ in range(3000):
        sample, log_q = net.draw(mx.array(u.choice(V, size=24, p=probabilities)), 32)
        share = np.exp(-np.array(log_q))
        sums.append((np.exp(terms)[np.array(sample)] * share).sum())
        included[np.array(sample)] += share
    assert np.mean(sums) == pytest.approx(np.exp(terms).sum(), rel=0.02)
    np.testing.assert_allclose(included / 3000, 1, atol=0.2)  # of each token, the rarest too


def test_the_sample_follows_the_seed_and_the_counts_of_the_text():
    net, targets = tiny(sampled(32)), mx.array([[0, 1]])
    net.prepare(np.repeat(np.arange(V), np.where(np.arange(V) < 20, 500, 1)), 0)
    mx.random.seed(2)
    first = net.draw(targets, 20)[0].tolist()
    mx.random.seed(2)
    assert first == net.draw(targets, 20)[0].tolist() != net.draw(targets, 20)[0].tolist()
    assert sum(token < 20 for token in first) >= 18
