"""Interpolated Kneser-Ney n-gram models, counted with NumPy."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mlx_transformer.utils.errors import BadInput

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # where there are too few counts of counts; as in KenLM's lmplz


@dataclass(frozen=True)
class Level:
    """N-grams of one order k >= 2. A row is an index into `keys`; contexts h are rows of order k - 1."""

    keys: np.ndarray  # (n,) int64, ascending: context row * vocab_size + token
    gains: np.ndarray  # (n,) (a(hw) - D) / A(h): the n-gram's own share of the probability
    backoffs: np.ndarray  # (contexts,) gamma(h): the share left to order k - 1; 1 where h was never a context

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each key, -1 for an unseen one."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)


@dataclass(frozen=True)
class NGram:
    """Interpolated n-gram model, made by `kneser_ney`.

        P_k(w | h) = gain(hw) + gamma(h) P_{k-1}(w | h without its oldest token)

    and P_k = P_{k-1} where h was never seen or would reach back beyond the separator before the document.
    """

    eos_id: int
    unigram: np.ndarray  # (vocab_size,) P_1; uniform in a model of order 0
    levels: tuple[Level, ...]  # of orders 2, 3, ...

    def log_prob(self, tokens: np.ndarray) -> np.ndarray:
        """Return ln P (n - 1,) of tokens[1:]. tokens (n,): documents, each between two separators."""
        tokens = _checked(tokens, len(self.unigram), self.eos_id)
        room = _room(tokens, self.eos_id)
        probability = self.unigram[tokens]
        rows = tokens
        for order, level in enumerate(self.levels, 2):
            ends = np.flatnonzero(room >= order - 1)
            ends = ends[rows[ends - 1] >= 0]
            contexts = rows[ends - 1]
            found = level.rows(contexts * len(self.unigram) + tokens[ends])
            gains = np.where(found >= 0, level.gains[found], 0.0)
            probability[ends] = gains + level.backoffs[contexts] * probability[ends]
            rows = _scatter(len(tokens), ends, found)
        return np.log(probability[1:])


def kneser_ney(train: np.ndarray, vocab_size: int, eos_id: int, order: int = 5) -> NGram:
    """Fit an interpolated modified Kneser-Ney model (Chen & Goodman 1998, sec. 4.1.6), over 1 / vocab_size.

    train (n,): separator, document, separator, document ... separator. The highest order counts occurrences; a lower
    order counts the distinct tokens before its n-gram, or occurrences if it begins with the separator (Heafield et al.
    2013, sec. 3.2: contexts are padded with one separator). order 0 is the uniform model. Raises BadInput on a negative
    order, tokens outside the vocabulary, and a text that does not begin with a separator.
    """
    if order < 0:
        raise BadInput(f"order {order} of an n-gram model: expected 0 (uniform) or more.")
    tokens = _checked(train, vocab_size, eos_id)
    if order == 0:
        return NGram(eos_id, np.full(vocab_size, 1 / vocab_size), ())
    orders = _count(tokens, vocab_size, eos_id, order)
    return _fit(orders, [one.counts for one in orders], vocab_size, eos_id)


def kneser_ney_held_out(
    train: np.ndarray, vocab_size: int, eos_id: int, order: int, folds: int
) -> tuple[NGram, np.ndarray]:
    """Fit `kneser_ney`, and return ln P (n,) of each training token from counts without the token's own fold.

    The folds are equal parts of the text, one after the other; an n-gram belongs to that of its last token. The text is
    sorted once: a fold's counts are subtracted from those of the whole. The first token, of which nothing is counted,
    has the probability of its unigram.
    """
    tokens = _checked(train, vocab_size, eos_id)
    orders = _count(tokens, vocab_size, eos_id, order)
    bounds = np.linspace(0, len(tokens), folds + 1).astype(int)

    def held_out(start: int, end: int) -> np.ndarray:
        counts = [one.counts - np.bincount(one.within(start, end), minlength=len(one.keys)) for one in orders]
        return _probability(orders, _fit(orders, counts, vocab_size, eos_id), start, end)

    with ThreadPoolExecutor(2) as pool:  # NumPy's loops release the interpreter's lock
        parts = list(pool.map(held_out, bounds[:-1], bounds[1:]))
    return _fit(orders, [one.counts for one in orders], vocab_size, eos_id), np.log(np.concatenate(parts))


def _checked(tokens: np.ndarray, vocab_size: int, eos_id: int) -> np.ndarray:
    tokens = np.asarray(tokens, np.int64)
    if len(tokens) < 2 or tokens[0] != eos_id:
        raise BadInput(f"{len(tokens)} tokens for an n-gram model: expected a separator ({eos_id}), then documents.")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise BadInput(f"tokens {tokens.min()} to {tokens.max()}: expected 0 to {vocab_size - 1}, the vocabulary.")
    return tokens


def _room(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Return (n,): the tokens of context of each position, the separator before its document included."""
    positions = np.arange(len(tokens))
    opened = np.maximum.accumulate(np.where(tokens == eos_id, positions, 0))
    room = np.zeros(len(tokens), np.int64)
    room[1:] = positions[1:] - opened[:-1]
    return room


def _scatter(length: int, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    rows = np.full(length, -1, np.int64)
    rows[places] = values
    return rows


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order in a text."""

    keys: np.ndarray  # (n,) as Level.keys; of order 1 the vocabulary
    counts: np.ndarray  # (n,) occurrences
    suffixes: np.ndarray  # (n,) the row, in the order below, of the n-gram without its oldest token
    rows: np.ndarray  # (T,) the row of the n-gram that ends at each token, -1 for none

    def within(self, start: int, end: int) -> np.ndarray:
        """Return the rows of the n-grams that end in tokens[start:end]; the text's first token is none."""
        rows = self.rows[max(start, 1) : end]
        return rows[rows >= 0]


def _count(tokens: np.ndarray, vocab_size: int, eos_id: int, order: int) -> list[_Order]:
    """Count the n-grams of orders 1, 2, ..., each within one document.

    A key contains the row of the n-gram's context in the order below, so every order fits 64 bits.
    """
    room, rows = _room(tokens, eos_id), tokens
    counts = np.bincount(tokens[1:], minlength=vocab_size)
    orders = [_Order(np.arange(vocab_size), counts, np.zeros(vocab_size, np.int64), rows)]
    for k in range(2, order + 1):
        ends = np.flatnonzero(room >= k - 1)
        if not len(ends):  # no document is that long: the order below is the highest
            break
        grams = rows[ends - 1] * vocab_size + tokens[ends]
        keys, inverse, counts = _distinct(grams)
        suffixes = np.empty(len(keys), np.int64)
        suffixes[inverse] = rows[ends]
        rows = _scatter(len(tokens), ends, inverse)
        orders.append(_Order(keys, counts, suffixes, rows))
    return orders


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct values, ascending, the index of each value among them, and how often each occurs.

    As np.unique, in half of its time where a value and its place fit 63 bits: a sort of both as one number leaves no
    order to be followed through memory.
    """
    n = len(values)
    bits = n.bit_length()
    if int(values.max()) >> (63 - bits):
        return np.unique(values, return_inverse=True, return_counts=True)
    together = np.sort(values << bits | np.arange(n))
    ordered, places = together >> bits, together & ((1 << bits) - 1)
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    starts = np.flatnonzero(is_first)
    inverse = np.empty(n, np.int64)
    inverse[places] = np.cumsum(is_first) - 1
    return ordered[starts], inverse, np.diff(starts, append=n)


def _fit(orders: list[_Order], occurrences: list[np.ndarray], vocab_size: int, eos_id: int) -> NGram:
    """Return the model of so many occurrences of each order's n-grams; those of none are as if never seen."""
    counts = list(occurrences)
    for k in range(1, len(orders)):
        extensions = np.bincount(orders[k].suffixes[occurrences[k] > 0], minlength=len(counts[k - 1]))
        counts[k - 1] = np.where(extensions > 0, extensions, counts[k - 1])
    gains, backoffs = _interpolate(orders[0].keys, counts[0], 1, vocab_size)
    levels = (
        Level(orders[k].keys, *_interpolate(orders[k].keys, counts[k], len(orders[k - 1].keys), vocab_size))
        for k in range(1, len(orders))
    )
    return NGram(eos_id, gains + backoffs[0] / vocab_size, tuple(levels))


def _probability(orders: list[_Order], model: NGram, start: int, end: int) -> np.ndarray:
    """Return P (end - start,) of tokens[start:end] of the text that was counted, by a model of some of its n-grams."""
    probability = model.unigram[orders[0].rows[start:end]]
    for below, one, level in zip(orders[:-1], orders[1:], model.levels, strict=True):
        ends = start + np.flatnonzero(one.rows[start:end] >= 0)
        lower = level.backoffs[below.rows[ends - 1]] * probability[ends - start]
        probability[ends - start] = level.gains[one.rows[ends]] + lower
    return probability


def _interpolate(
    keys: np.ndarray, counts: np.ndarray, n_contexts: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return gains and backoffs of one order: a context's backoff is the sum of the discounts of its counts."""
    discounts = np.array([0.0, *_discounts(counts)])[np.minimum(counts, 3)]
    contexts = keys // vocab_size
    totals = np.bincount(contexts, counts, minlength=n_contexts)
    given_up = np.bincount(contexts, discounts, minlength=n_contexts)
    backoffs = np.where(totals > 0, given_up / np.maximum(totals, 1), 1.0)
    return (counts - discounts) / np.maximum(totals, 1)[contexts], backoffs


def _discounts(counts: np.ndarray) -> tuple[float, ...]:
    """Estimate D1, D2, D3+ from the counts of counts n1 ... n4 (Chen & Goodman 1998, eq. 26)."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == c)) for c in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return estimates if min(estimates) > 0 else FALLBACK_DISCOUNTS
