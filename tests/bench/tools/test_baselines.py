"""The n-gram baseline: a probability, equal to the formula written out with dictionaries, within one document."""

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.tools.baselines import bits_per_byte, main
from mlx_transformer.data.ngrams import FALLBACK_DISCOUNTS, kneser_ney, kneser_ney_held_out
from mlx_transformer.utils.errors import BadInput

VOCAB, SEPARATOR = 6, 0


def joined(documents):
    return np.array([SEPARATOR, *(token for document in documents for token in [*document, SEPARATOR])])


documents = st.lists(st.lists(st.integers(1, VOCAB - 2), max_size=12), min_size=1, max_size=12)
held_out = st.lists(st.integers(1, VOCAB - 1), max_size=6)  # VOCAB - 1 is never seen in training


class Dictionaries:
    """Modified Kneser-Ney as the papers write it, one dictionary an order; slow and obvious."""

    def __init__(self, docs, order, uncounted=()):
        """`uncounted`: positions in joined(docs) whose n-grams are not counted."""
        self.order = order
        occurrences, before = Counter(), defaultdict(set)
        place = 0  # of the separator before the document
        for document in docs:
            padded = [SEPARATOR, *document, SEPARATOR]
            counted = [end for end in range(1, len(padded)) if place + end not in uncounted]
            place += len(padded) - 1
            for end in counted:
                for k in range(1, min(order, end + 1) + 1):
                    gram = tuple(padded[end - k + 1 : end + 1])
                    occurrences[gram] += 1
                    if end - k >= 0:
                        before[gram].add(padded[end - k])
        self.count = {
            gram: n if len(gram) == order or not before[gram] else len(before[gram]) for gram, n in occurrences.items()
        }
        self.discounts = {k: self.estimate(k) for k in range(1, order + 1)}
        self.continuations = defaultdict(dict)
        for gram, n in self.count.items():
            self.continuations[gram[:-1]][gram[-1]] = n

    def estimate(self, k):
        n = Counter(c for gram, c in self.count.items() if len(gram) == k)
        if not all(n[c] for c in (1, 2, 3, 4)):
            return FALLBACK_DISCOUNTS
        y = n[1] / (n[1] + 2 * n[2])
        found = tuple(c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3))
        return found if min(found) > 0 else FALLBACK_DISCOUNTS

    def discount(self, k, count):
        return self.discounts[k][min(count, 3) - 1] if count else 0.0

    def probability(self, history, token):
        context, k = tuple(history), len(history) + 1
        lower = self.probability(context[1:], token) if context else 1 / VOCAB
        seen = self.continuations.get(context)
        if not seen:
            return lower
        given_up = sum(self.discount(k, n) for n in seen.values())
        count = seen.get(token, 0)
        return (count - self.discount(k, count) + given_up * lower) / sum(seen.values())

    def log_prob(self, docs):
        return [
            math.log(self.probability(padded[max(0, end - self.order + 1) : end], padded[end]))
            for padded in ([SEPARATOR, *document, SEPARATOR] for document in docs)
            for end in range(1, len(padded))
        ]


@settings(max_examples=60)
@given(train=documents, valid=documents, order=st.integers(1, 6))
def test_equals_the_formula_written_with_dictionaries(train, valid, order):
    model = kneser_ney(joined(train), VOCAB, SEPARATOR, order)
    np.testing.assert_allclose(model.log_prob(joined(valid)), Dictionaries(train, order).log_prob(valid), rtol=1e-9)


@settings(max_examples=60)
@given(train=documents, order=st.integers(1, 6), folds=st.integers(1, 4))
def test_held_out_a_token_is_not_counted_for_its_own_probability(train, order, folds):
    text = joined(train)
    model, found = kneser_ney_held_out(text, VOCAB, SEPARATOR, order, folds)
    np.testing.assert_array_equal(model.log_prob(text), kneser_ney(text, VOCAB, SEPARATOR, order).log_prob(text))
    bounds = np.linspace(0, len(text), folds + 1).astype(int)
    for start, end in pairwise(bounds):
        if end < 2:
            continue  # the first token has no probability
        expected = Dictionaries(train, order, uncounted=range(start, end)).log_prob(train)
        first = max(start, 1)
        np.testing.assert_allclose(found[first:end], expected[first - 1 : end - 1], rtol=1e-9)


def test_equals_the_dictionaries_where_the_discounts_are_estimated():
    rng = np.random.default_rng(0)
    train = [
        rng.choice(np.arange(1, VOCAB), size=rng.integers(1, 30), p=[0.4, 0.3, 0.2, 0.05, 0.05]) for _ in range(40)
    ]
    slow = Dictionaries([list(document) for document in train], 4)
    assert slow.discounts[4] != FALLBACK_DISCOUNTS
    np.testing.assert_allclose(
        kneser_ney(joined(train), VOCAB, SEPARATOR, 4).log_prob(joined(train)), slow.log_prob(train)
    )


def probability(model, history, token):
    return math.exp(model.log_prob(np.array([SEPARATOR, *history, token]))[-1])


@settings(max_examples=60)
@given(train=documents, document=held_out, order=st.integers(0, 6))
def test_the_continuations_of_a_context_sum_to_one(train, document, order):
    model = kneser_ney(joined(train), VOCAB, SEPARATOR, order)
    shares = [probability(model, document, token) for token in range(VOCAB)]
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    assert min(shares) > 0


def test_known_example():
    # "a b", "a c", a=1, b=2, c=3. Continuation counts: a 1 (at the start), b 1, c 1, separator 2 (after b and c).
    # Fallback discounts .5 and 1: given up 2.5 of 5; P1(b) = (1 - .5) / 5 + .5 / 6.  After a: (1 - .5) / 2 + .5 P1(b).
    model = kneser_ney(joined([[1, 2], [1, 3]]), VOCAB, SEPARATOR, 2)
    unigram = 0.5 / 5 + 2.5 / 5 / VOCAB
    assert probability(model, [1], 2) == pytest.approx(0.5 / 2 + 0.5 * unigram)
    assert probability(model, [5], 2) == pytest.approx(unigram)  # a context never seen leaves it to the order below


def test_uniform_and_bits_per_byte():
    log_prob = kneser_ney(joined([[1]]), VOCAB, SEPARATOR, 0).log_prob(joined([[1, 2], [3]]))
    np.testing.assert_allclose(log_prob, -math.log(VOCAB))
    assert len(log_prob) == 5  # every token but the first separator, once
    assert bits_per_byte(log_prob, 10) == pytest.approx(5 * math.log2(VOCAB) / 10)


@settings(max_examples=30)
@given(train=documents, first=held_out, second=held_out)
def test_contexts_do_not_cross_a_separator(train, first, second):
    model = kneser_ney(joined(train), VOCAB, SEPARATOR)
    both = model.log_prob(joined([first, second]))
    alone = [model.log_prob(joined([document])) for document in (first, second)]
    np.testing.assert_allclose(both, np.concatenate(alone))


def test_sixty_five_thousand_tokens_at_order_five_do_not_overflow():
    rng = np.random.default_rng(0)
    train = [rng.integers(1, 65_536, 50) for _ in range(100)]
    model = kneser_ney(joined(train).astype(np.uint16), 65_536, SEPARATOR)
    assert model.log_prob(joined(train)).mean() > -3
    assert model.log_prob(joined([rng.permutation(document) for document in train])).mean() < -9


@pytest.mark.parametrize("tokens", [[], [SEPARATOR], [1, 2, SEPARATOR], [SEPARATOR, VOCAB], [SEPARATOR, -1]])
def test_bad_tokens_are_refused(tokens):
    with pytest.raises(BadInput, match="token"):
        kneser_ney(np.array(tokens), VOCAB, SEPARATOR)


def test_the_command_prints_each_order_over_the_validation_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLX_TRANSFORMER_CACHE", str(tmp_path / "cache"))
    stories = [
        f"The {who} saw the {what}.\n<|endoftext|>\n" for who in ("cat", "dog", "cow") for what in ("sun", "sea")
    ]
    (tmp_path / "train.txt").write_text("".join(stories[1:] * 20), encoding="utf-8")
    (tmp_path / "valid.txt").write_text(stories[0], encoding="utf-8")
    texts = ["--data", str(tmp_path / "train.txt"), "--valid", str(tmp_path / "valid.txt")]
    monkeypatch.setattr("sys.argv", ["baselines", *texts, "--order", "3"])
    main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[0] for row in rows] == ["uniform", "1-gram", "2-gram", "3-gram"]
    nats, bits = ([float(row[column]) for row in rows] for column in (1, 2))
    assert nats == sorted(nats, reverse=True)
    assert bits == sorted(bits, reverse=True)
