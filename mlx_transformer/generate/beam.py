"""Beam search with cached decoding, batched over sentences; a beam of one is greedy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transformer.generate.decoding import Decoder
from mlx_transformer.nn.translator import PAD
from mlx_transformer.utils.errors import BadInput

Step = Callable[[mx.array], mx.array]  # tokens (B,) -> logits (B, V) after them
_EXTRA_TOKENS = 50  # of a translation over its source (Vaswani et al. 2017, sec. 6.1)
_WIDTH = 8  # sources are padded to a multiple of this: few shapes, each of which is compiled


@dataclass(frozen=True, kw_only=True)
class Beam:
    """How translations are searched: hypotheses kept, and the exponent of the length penalty (sec. 6.1: 4 and 0.6).

    Raises BadInput for a number out of its range.
    """

    size: int = 4
    alpha: float = 0.6

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadInput(f"beam = {self.size}: expected a whole number of at least 1")
        if not 0 <= self.alpha < float("inf"):
            raise BadInput(f"length-penalty = {self.alpha}: expected a number of at least 0")

    def penalty(self, length: int) -> float:
        """Return lp(Y) = ((5 + |Y|) / 6)^alpha (Wu et al. 2016, arXiv 1609.08144, eq. 14); |Y| counts EOS."""
        return ((5 + length) / 6) ** self.alpha


GREEDY = Beam(size=1)


@dataclass(frozen=True)
class Hypothesis:
    """A translation as token ids without EOS, and log P(Y | X) / lp(Y)."""

    tokens: list[int]
    score: float
    ended: bool  # by EOS rather than by the limit


def search(
    decoder: Decoder, sources: Sequence[Sequence[int]], bos: int, eos: int, beam: Beam, limits: Sequence[int | None]
) -> list[Hypothesis]:
    """Return the best translation of each source, row by row as if alone.

    limits: the most tokens of each, EOS included; None: 50 more than the source has.
    """
    width, n = -(-max(map(len, sources)) // _WIDTH) * _WIDTH, len(sources)
    padded = np.full((n, width), PAD, np.int32)
    for row, source in zip(padded, sources, strict=True):
        row[: len(source)] = source
    cache = decoder.model.make_cache(n)
    decoder.model.read(mx.array(padded), cache)
    cache.select(mx.repeat(mx.arange(n), beam.size))
    sentences = [
        _Sentence(beam, eos, limit or len(source) + _EXTRA_TOKENS)
        for source, limit in zip(sources, limits, strict=True)
    ]
    tokens = mx.full((n * beam.size,), bos)
    while not all(sentence.done for sentence in sentences):
        totals = np.array([sentence.scores for sentence in sentences], np.float32)
        values, places = _best(decoder.step(tokens, cache), mx.array(totals), 2 * beam.size)
        chosen = [
            sentence.extend(*best) for sentence, best in zip(sentences, zip(values, places, strict=True), strict=True)
        ]
        rows = [i * beam.size + parent for i, kept in enumerate(chosen) for parent, _ in kept]
        if beam.size > 1:
            cache.select(mx.array(rows))
        tokens = mx.array([token for kept in chosen for _, token in kept])
    return [sentence.best() for sentence in sentences]


def _best(logits: mx.array, totals: mx.array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest log-probabilities over all extensions of each sentence's hypotheses, and (parent, token).

    logits (n * beam, V), totals (n, beam) -> values (n, count), places (n, count, 2), the highest first.
    """
    logits = logits.astype(mx.float32)
    vocab = logits.shape[-1]
    log_p = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).reshape(*totals.shape, vocab)
    flat = (log_p + totals[..., None]).reshape(totals.shape[0], -1)
    count = min(count, flat.shape[-1])
    found = mx.argpartition(-flat, kth=count - 1, axis=-1)[:, :count] if count < flat.shape[-1] else mx.argsort(-flat)
    values, index = np.array(mx.take_along_axis(flat, found, axis=-1)), np.array(found)
    order = np.lexsort((index, -values))  # equal values in the order of their index
    values, index = np.take_along_axis(values, order, -1), np.take_along_axis(index, order, -1)
    return values, np.stack([index // vocab, index % vocab], -1)


class _Sentence:
    """The hypotheses of one source."""

    def __init__(self, beam: Beam, eos: int, limit: int) -> None:
        self.beam, self.eos, self.limit = beam, eos, limit
        self.alive: list[list[int]] = [[] for _ in range(beam.size)]
        self.scores = [0.0] + [-np.inf] * (beam.size - 1)  # log P of each; at first there is one
        self.finished: list[Hypothesis] = []
        self.length, self.done = 0, False

    def extend(self, values: Any, places: Any) -> list[tuple[int, int]]:
        """Take the best extensions, the highest first; return the parent and the token of each that stays alive.

        One that ends is finished if it is among the best `beam`. Done where no living one can become better, or at the
        limit; a beam of one at its first end. To stop at so many finished ones would be wrong: those that end too soon
        come first, and are as many while the best one is still alive.
        """
        if self.done:
            return [(i, self.eos) for i in range(self.beam.size)]
        self.length += 1
        kept: list[tuple[int, int]] = []
        scores: list[float] = []
        for rank, (value, (parent, token)) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            if token == self.eos:
                if rank < self.beam.size and value > -np.inf:
                    score = value / self.beam.penalty(self.length)
                    self.finished.append(Hypothesis(self.alive[parent], score, ended=True))
            elif len(kept) < self.beam.size:
                kept.append((parent, token))
                scores.append(value)
        while len(kept) < self.beam.size:  # a vocabulary of fewer tokens
            kept.append((0, self.eos))
            scores.append(-np.inf)
        self.alive, self.scores = [[*self.alive[parent], token] for parent, token in kept], scores
        best = max((one.score for one in self.finished), default=-np.inf)
        hopeless = best >= max(scores) / self.beam.penalty(self.limit)
        ended = self.beam.size == 1 and bool(self.finished)
        self.done = ended or hopeless or self.length >= self.limit
        return kept

    def best(self) -> Hypothesis:
        """Return the finished hypothesis of the highest score; the best living one where none has ended."""
        if self.finished:
            return max(self.finished, key=lambda one: one.score)
        return Hypothesis(self.alive[0], self.scores[0] / self.beam.penalty(self.length), ended=False)
