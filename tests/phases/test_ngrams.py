"""Phase 6's branches that look up n-grams: their predecessor, their definitions, their runs on disk."""

import math
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_transformer.data.ngrams import kneser_ney, kneser_ney_held_out
from mlx_transformer.data.stream import validation_batches
from mlx_transformer.generate.decoding import Decoder
from mlx_transformer.nn import sampled
from mlx_transformer.nn.ngrams import cached_distributions, cached_probabilities
from mlx_transformer.run import training
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.run.saved import load
from mlx_transformer.train.evaluate import Evaluator
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path
from phases import phase6
from tests.bench.tools.test_baselines import SEPARATOR, VOCAB, Dictionaries, joined
from tests.faults.runs import ON_CPU, assert_bad, assert_same_run, command, curve, generate, result, write_text
from tests.ladder import TEXT, TINY, V, tiny, tokens
from tests.phases.test_architecture import apart, like, set_all

TABLES, EXPERT = phase6.BRANCHES["ngram_tables"], phase6.BRANCHES["ngram_expert"]
CACHE, SPRINT = phase6.BRANCHES["ngram_cache"], phase6.BRANCHES["sprint"]


# --- tables ---------------------------------------------------------------------------------------------------------


def test_tables_of_zeros_or_factors_of_zero_are_phase_6():
    phase = tiny(phase6.Model)
    net = like(TABLES, phase)
    assert apart(net, phase) > 1e-3
    assert apart(set_all(net, "gram_lambda", 0.0), phase) == 0
    assert apart(set_all(like(TABLES, phase), "gram_embedding.weight", 0.0), phase) == 0
    started = TABLES(TABLES.Config(**TINY))
    assert started.config.ngram_rows == 5 * V
    assert all(mx.abs(table.gram_embedding.weight).max() == 0 for table in started.ngrams)
    assert all((table.gram_lambda == 0.1).all() for table in started.ngrams)


def test_a_row_depends_on_the_last_n_tokens_and_rows_are_spread_evenly():
    net = TABLES(TABLES.Config(**TINY, ngram_rows=4096))
    for table in net.ngrams:
        x = tokens(1, 12)
        rows = table.row(net.context(x).recent)[0].tolist()
        changed = mx.array(np.array(x))
        changed[:, 5] = (x[:, 5] + 1) % V
        other = table.row(net.context(changed).recent)[0].tolist()
        assert [i for i in range(12) if rows[i] != other[i]] == list(range(5, 5 + table.n))
        pairs = mx.stack([mx.arange(V * V) // V, mx.arange(V * V) // V, mx.arange(V * V) % V], axis=-1)
        used = len(set(table.row(pairs).tolist())) / 4096
        assert abs(used - (1 - math.exp(-(V**2) / 4096))) < 0.03  # as of a random function


# --- the expert's counts --------------------------------------------------------------------------------------------


def of_six(documents, order=4):
    """A tiny model whose expert is counted on documents of the vocabulary of test_baselines."""
    net = tiny(EXPERT, vocab_size=VOCAB, ngram_order=order)
    net.prepare(joined(documents), SEPARATOR)
    return net


def test_the_expert_is_kneser_ney_written_with_dictionaries():
    draw = np.random.default_rng(0)
    documents = [
        draw.choice(np.arange(1, 5), size=draw.integers(1, 30), p=[0.5, 0.3, 0.1, 0.1]).tolist() for _ in range(20)
    ]
    net, slow = of_six(documents), Dictionaries(documents, 4)
    x = mx.array([[0, 1, 1, 2, 1, 5, 1, 2, 3, 0, 2, 1]])
    recent = net.context(x).recent
    given = net.expert.distribution(recent)
    np.testing.assert_allclose(given.sum(-1), 1, atol=1e-6)
    text = x[0].tolist()
    for i in range(len(text)):
        history = text[max(0, i - 2) : i + 1]
        history = history[max([0, *(j for j, token in enumerate(history) if token == SEPARATOR)]) :]
        expected = [slow.probability(history, token) for token in range(VOCAB)]
        np.testing.assert_allclose(given[0, i], expected, rtol=1e-5)
    for token in range(VOCAB):
        p = net.expert.probability(recent, mx.full(x.shape, token))
        np.testing.assert_allclose(p, given[..., token], rtol=1e-6)


def held_out(text, order):
    return kneser_ney_held_out(text, V, 0, order, 4)[1]


def test_counts_that_know_the_answer_would_be_trusted_too_much():
    assert kneser_ney(TEXT, V, 0, 3).log_prob(TEXT).mean() > held_out(TEXT, 3)[1:].mean() + 0.3


def test_only_the_start_of_a_long_text_is_counted():
    net = tiny(EXPERT, ngram_order=3, ngram_tokens=400)
    found = net.prepare(TEXT, 0)[:, 0].copy().view(np.float32)
    counted = kneser_ney(TEXT[:400], V, 0, 3)
    np.testing.assert_allclose(found[:400], held_out(TEXT[:400], 3), rtol=1e-6)
    np.testing.assert_allclose(found[400:], counted.log_prob(np.array([0, *TEXT[400:]])), rtol=1e-6)
    np.testing.assert_allclose(net.tables()["unigram"], counted.unigram, rtol=1e-6)


def test_batches_carry_each_tokens_probability():
    net = tiny(EXPERT)
    train = net.prepare(TEXT, 0)
    assert (train.shape, train.dtype) == ((600, 2), np.int32)
    batch = mx.array(train[:36].reshape(2, 18, 2)).swapaxes(1, 2)
    ctx, targets = net.inputs(batch)
    np.testing.assert_array_equal(targets, TEXT[:36].reshape(2, 18)[:, 1:])
    expected = held_out(TEXT, 5).astype(np.float32)[:36].reshape(2, 18)
    np.testing.assert_array_equal(ctx.target_log_prob, expected[:, 1:])


def test_the_counts_are_equal_after_they_are_saved():
    net = tiny(EXPERT)
    other = like(EXPERT, net)
    other.prepare(TEXT[::-1].copy() * (np.arange(600) > 0), 0)
    assert apart(net, other) > 1e-4
    other.load_tables(net.tables())
    assert apart(net, other) == 0
    with pytest.raises(BadInput, match="missing or of another vocabulary"):
        other.load_tables({})


# --- the mixture ----------------------------------------------------------------------------------------------------


def test_a_gate_of_one_is_phase_6_and_a_gate_of_zero_is_the_expert():
    phase, x = tiny(phase6.Model), tokens()
    net = like(EXPERT, phase)
    logits = phase(x)
    network = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert mx.abs(net(x) - network).max() > 1e-2
    np.testing.assert_allclose(set_all(net, "gate_bias", 1e4)(x), network, atol=1e-5)
    expert = mx.log(net.expert.distribution(net.context(x).recent))
    np.testing.assert_allclose(set_all(net, "gate_bias", -1e4)(x), expert, atol=1e-4)


@pytest.mark.parametrize("kind", [EXPERT, CACHE, SPRINT])
def test_decoding_predicts_what_evaluation_measures(kind):
    net, x = tiny(kind, ngram_order=3), mx.array(TEXT[None, 40:61])
    ctx, targets = net.inputs(x)
    nats = net.evaluation_loss(net.hidden(ctx), targets, ctx)
    logits = net(x[:, :-1])
    np.testing.assert_allclose(mx.logsumexp(logits, axis=-1), 0, atol=1e-5)  # logits are log-probabilities
    np.testing.assert_allclose(mx.take_along_axis(logits, targets[..., None], -1)[..., 0], -nats, atol=1e-5)
    assert Evaluator(net, validation_batches(TEXT[40:61], 20, 20))() == pytest.approx(nats.mean().item(), abs=1e-5)
    decoder, text = Decoder(net), TEXT[40:60].tolist()
    cache = net.make_cache(1)
    given = [decoder.model.last_logits(mx.array([text[:5]]), cache)]
    given += [decoder.step(mx.array([token]), cache) for token in text[5:]]
    np.testing.assert_allclose(mx.concatenate(given), logits[0, 4:], atol=1e-4)


@pytest.mark.parametrize(("kind", "gates"), [(EXPERT, ["gate_"]), (CACHE, [f"gates.{i}." for i in range(4)])])
def test_the_network_learns_by_its_own_loss_and_the_gate_by_the_mixtures(kind, gates):
    phase, batch = tiny(phase6.Model), tokens(3, 18)
    net = like(kind, phase)
    (loss, metrics), ours = nn.value_and_grad(net, net.loss)(batch)
    (own, _), theirs = nn.value_and_grad(phase, phase.loss)(batch)
    assert metrics["loss"].item() == pytest.approx(own.item(), rel=1e-6)
    ours, theirs = by_path(ours), by_path(theirs)
    for path, gradient in theirs.items():
        np.testing.assert_allclose(ours[path], gradient, atol=1e-6, err_msg=path)
    ctx, targets = net.inputs(batch)
    mixture = net.evaluation_loss(net.hidden(ctx), targets, ctx).mean()
    assert metrics["mixture_loss"].item() == pytest.approx(mixture.item(), rel=1e-5)
    assert loss.item() == pytest.approx(own.item() + mixture.item(), rel=1e-5)

    for gate in gates:
        path, size = f"expert.{gate}bias", 1 if kind is EXPERT else 0.03

        def at(bias, path=path):
            changed = set_all(net, path, bias)
            return changed.evaluation_loss(changed.hidden(ctx), targets, ctx).mean().item()

        bias = by_path(net.parameters())[path].item()
        slope = (at(bias + size) - at(bias - size)) / (2 * size)
        assert ours[path].item() == pytest.approx(slope, abs=1e-4)
        set_all(net, path, bias)
    names = {f"expert.{gate}{name}" for gate in gates for name in ("bias", "weight")}
    assert {path for path in ours if path.startswith("expert.")} == names


def test_a_training_step_learns_from_batches_with_probabilities():
    net = EXPERT(EXPERT.Config(**TINY))
    batch = mx.array(net.prepare(TEXT, 0)[: 4 * 18].reshape(4, 18, 2)).swapaxes(1, 2)
    step = TrainingStep(net, replace(phase6.RECIPE.at("nano"), learning_rate=0.01))
    losses = [step(batch, 0.01)[0] for _ in range(8)]
    assert losses[-1]["loss"].item() < losses[0]["loss"].item() - 0.1
    assert losses[0]["gate"].item() == pytest.approx(1 / (1 + math.exp(-0.5)), abs=1e-3)
    _, targets = net.inputs(batch)
    first = held_out(TEXT, 5)[: 4 * 18].reshape(4, 18)[:, 1:]
    gate = 1 / (1 + math.exp(-0.5))
    mixture = -np.log(gate / V + (1 - gate) * np.exp(first)).mean()  # the head starts at 0: the network is uniform
    assert losses[0]["mixture_loss"].item() == pytest.approx(mixture, rel=1e-5)
    assert targets.shape == first.shape


# --- the caches -----------------------------------------------------------------------------------------------------


def test_caches_that_are_gated_off_are_the_expert():
    expert = tiny(EXPERT)
    net = like(CACHE, expert)
    assert apart(net, expert) > 1e-2
    for path in ("gates.2.bias", "gates.3.bias"):
        set_all(net, path, -1e4)
    for path in ("gates.0.bias", "gates.1.bias", *(f"gates.{i}.weight" for i in range(4))):
        set_all(net, path, 0.0)  # of a new model: g = sigmoid(0.5), as the expert's
    expert = set_all(set_all(expert, "gate_weight", 0.0), "gate_bias", 0.0)
    assert apart(net, expert) < 1e-4


def test_the_caches_are_shares_counted_by_hand():
    net = tiny(CACHE, seq_len=6, ngram_order=3)
    text = [3, 1, 2, 3, 1, 2, 2, 3, 1, 4]
    recent = net.context(mx.array([text])).recent
    assert recent.shape == (1, 10, 6)
    unigram, bigram = cached_distributions(recent, V)
    for i, token in enumerate(text):
        seen = text[max(0, i - 5) : i + 1]
        after = [y for x, y in pairwise(seen) if x == token]
        for found, counted in ((unigram, seen), (bigram, after)):
            expected = np.bincount(counted, minlength=V) / max(1, len(counted))
            np.testing.assert_allclose(found[0, i], expected, atol=1e-6)
    for token in range(5):
        given = cached_probabilities(recent, mx.full((1, 10), token))
        np.testing.assert_allclose(given[0], unigram[..., token], atol=1e-6)
        np.testing.assert_allclose(given[1], bigram[..., token], atol=1e-6)


def test_the_shares_of_the_gates_are_one_and_that_of_an_empty_cache_is_zero():
    net = tiny(CACHE)
    x = mx.array([[5, 6, 5, 7]])
    recent = net.context(x).recent
    shares = mx.exp(net.expert.log_shares(net.last_hidden(x), recent))
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-6)
    assert (shares[3, 0] > 0).tolist() == [False, False, True, False]  # 5 alone was followed by something
    np.testing.assert_allclose(shares[0], net.expert.network_share(net.last_hidden(x), recent), atol=1e-6)


def test_the_sprint_is_the_cache_in_a_quarter_of_the_blocks():
    sprint = tiny(SPRINT)
    net = like(CACHE, sprint, n_layers=1)
    assert len(sprint.blocks) == 1
    assert apart(net, sprint) == 0
    batch = tokens(3, 18)
    assert net.loss(batch)[0].item() == sprint.loss(batch)[0].item()


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["ngram_expert", "ngram_tables", "mtp", "sprint"])
def test_a_run_resumes_loads_and_generates(branch, tmp_path, no_pictures, monkeypatch):
    monkeypatch.setattr(sampled, "LEAST", 1)  # so that the softmax is sampled in so small a vocabulary too
    text = write_text(tmp_path / "text.txt")
    flags = [*ON_CPU, "--branch", branch, "--data", text, "--eval-every", 2, "--sample-ratio", 0.5]
    counts = branch in ("ngram_expert", "sprint")
    flags += ["--ngram-order", 3] if counts else []

    def train(*args):
        ended = command(lambda: training.main(find_phase(6)), *args)
        assert ended.code == 0, ended
        return ended.out

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    told = train(*flags, "--max-steps", 4, "--out", whole)
    assert ("prepared from the training text in" in told) == (counts)
    train(*flags, "--max-steps", 2, "--out", stopped, "--quiet")
    train("--resume", stopped, "--max-steps", 4, "--quiet")
    assert_same_run(stopped, whole)
    saved = whole / "model" / "tables.safetensors"
    assert saved.exists() == (counts)
    assert curve(whole)[-1]["valid_loss"] == result(whole)["final_valid_loss"]
    assert generate(whole, "--prompt", "the", "--max-tokens", 5, "--temperature", 0).code == 0
    if counts:
        ours, theirs = (load(folder)[0].tables() for folder in (whole, stopped))
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
        saved.unlink()
        assert_bad(generate(whole, "--prompt", "the"), "tables.safetensors", "missing")
