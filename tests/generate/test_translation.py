"""Beam search of an encoder-decoder: cached, batched, and how it is scored."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer.generate import translation
from mlx_transformer.generate.beam import GREEDY, Beam, _Sentence, search
from mlx_transformer.generate.decoding import Decoder
from mlx_transformer.utils.errors import BadInput
from phases import phase1
from tests.ladder import tiny

BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def net():
    return tiny(phase1.BRANCHES["translator"], vocab_size=23, n_layers=2)


@pytest.fixture(scope="module")
def sources():
    random = np.random.default_rng(4)
    return [random.integers(2, 23, length).tolist() for length in (3, 11, 6, 1, 8)]


def log_p(net, source, prefixes):
    """Log-probabilities after each prefix of a target, without a cache: (N, V)."""
    n = max(len(source), len(prefixes[0]) + 1)
    pairs = np.full((len(prefixes), 2, n), -1, np.int32)
    for row, prefix in enumerate(prefixes):
        pairs[row, 0, : len(source)] = source
        pairs[row, 1, : len(prefix) + 1] = [BOS, *prefix]
    logits = net(mx.array(pairs))[:, len(prefixes[0])]
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def plain_beam(net, source, beam, limit):
    """The same search written without batches, caches and arrays."""
    alive, finished = [(0.0, [])], []
    for length in range(1, limit + 1):
        scores = log_p(net, source, [prefix for _, prefix in alive])
        grown = [
            (total + scores[i, token], [*prefix, token])
            for i, (total, prefix) in enumerate(alive)
            for token in range(scores.shape[1])
        ]
        grown = sorted(grown, key=lambda one: -one[0])[: 2 * beam.size]
        ended = [one for one in grown[: beam.size] if one[1][-1] == EOS]
        finished += [(total / beam.penalty(length), prefix[:-1]) for total, prefix in ended]
        alive = [one for one in grown if one[1][-1] != EOS][: beam.size]
        best = max((score for score, _ in finished), default=-math.inf)
        if (beam.size == 1 and finished) or best >= alive[0][0] / beam.penalty(limit):
            break
    return max(finished) if finished else (alive[0][0] / beam.penalty(limit), alive[0][1])


@pytest.mark.parametrize("beam", [GREEDY, Beam(), Beam(size=3, alpha=0.0)], ids=["greedy", "paper", "no penalty"])
def test_the_cached_batched_search_equals_a_plain_one(beam, net, sources):
    together = search(Decoder(net), sources, BOS, EOS, beam, [12] * 5)
    for source, found in zip(sources, together, strict=True):
        (alone,) = search(Decoder(net), [source], BOS, EOS, beam, [12])
        assert alone.tokens == found.tokens
        assert alone.score == pytest.approx(found.score, abs=1e-4)
        score, tokens = plain_beam(net, source, beam, 12)
        assert tokens == found.tokens
        assert score == pytest.approx(found.score, abs=1e-4)


def test_greedy_takes_the_most_probable_token_each_time(net, sources):
    for source, found in zip(sources, search(Decoder(net), sources, BOS, EOS, GREEDY, [9] * 5), strict=True):
        tokens = []
        while len(tokens) < 9:
            tokens.append(int(log_p(net, source, [tokens])[0].argmax()))
            if tokens[-1] == EOS:
                break
        assert [*found.tokens, *([EOS] if found.ended else [])] == tokens


def test_a_beam_over_everything_finds_the_best_translation_of_all(net, sources):
    """With a beam as wide as there are hypotheses, nothing is cut off."""
    beam, limit = Beam(size=23**2, alpha=0.6), 3
    (found,) = search(Decoder(net), sources[:1], BOS, EOS, beam, [limit])
    every = []
    for length in range(limit):
        for prefix in itertools.product([t for t in range(23) if t != EOS], repeat=length):
            every.append(list(prefix))
    scores = {}
    for length in range(limit):
        prefixes = [prefix for prefix in every if len(prefix) == length]
        total = np.zeros(len(prefixes))
        for i in range(length + 1):
            after = log_p(net, sources[0], [prefix[:i] for prefix in prefixes])
            total += [row[prefix[i] if i < length else EOS] for row, prefix in zip(after, prefixes, strict=True)]
        scores |= {tuple(p): t / beam.penalty(length + 1) for p, t in zip(prefixes, total, strict=True)}
    best = max(scores, key=scores.get)
    assert tuple(found.tokens) == best
    assert found.score == pytest.approx(scores[best], abs=1e-4)


def test_a_wider_beam_scores_higher(net):
    random = np.random.default_rng(0)
    sources = [random.integers(2, 23, 1 + i % 9).tolist() for i in range(30)]
    scores = [
        np.mean([one.score for one in search(Decoder(net), sources, BOS, EOS, Beam(size=size), [10] * 30)])
        for size in (1, 2, 4, 8)
    ]
    assert sorted(scores) == scores


def test_hypotheses_that_end_too_soon_do_not_end_the_search():
    """A sentence of which each step ends with a small probability: as many ends as the beam has come first."""
    sentence = _Sentence(Beam(size=2), EOS, 20)
    for length in range(1, 5):
        sentence.extend(np.log([0.9**length, 0.01, 0.005, 1e-6]), np.array([[0, 5], [0, EOS], [0, 6], [1, 7]]))
    assert len(sentence.finished) == 4
    assert not sentence.done
    sentence.extend(np.log([0.9**5, 1e-3, 1e-4, 1e-5]), np.array([[0, EOS], [0, 8], [0, 9], [1, 5]]))
    assert sentence.done
    assert sentence.best().tokens == [5] * 4


def test_the_length_penalty_is_that_of_gnmt():
    assert Beam(alpha=0.6).penalty(1) == 1
    assert Beam(alpha=0.6).penalty(7) == pytest.approx(2**0.6)
    assert Beam(alpha=0.0).penalty(50) == 1


def test_scores_of_translations():
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: make test installs it")
    same = translation.compare(["a b c d e", "f g h i"], ["a b c d e", "f g h i"])
    assert same == pytest.approx({"exact_match": 1.0, "chrf": 100.0, "bleu": 100.0})
    other = translation.compare(["a b c d e", "f g h x"], ["a b c d e", "f g h i"])
    assert other["exact_match"] == 0.5
    assert 50 < other["bleu"] < 100
    assert 50 < other["chrf"] < 100


def test_numbers_out_of_range_and_models_that_do_not_translate(net):
    with pytest.raises(BadInput, match="beam = 0: expected a whole number of at least 1"):
        Beam(size=0)
    with pytest.raises(BadInput, match="length-penalty = -1"):
        Beam(alpha=-1)
    with pytest.raises(BadInput, match="does not translate: use generate"):
        translation.translate(tiny(phase1.Model), None, "a")
    with pytest.raises(BadInput, match="sentence '  ' is empty"):
        translation.translate(net, None, ["a", "  "])
