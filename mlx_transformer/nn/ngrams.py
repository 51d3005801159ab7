"""N-grams beside a network: hashed tables added to the residual stream, and an expert that counts."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

_PRIME, _MIX = 16_777_619, 0x2C1B3C6D  # of FNV-1a, and an odd number whose product moves low bits to high ones


class NGramTable(nn.Module):
    """A vector for each n-gram, by hash, added to the residual stream before every block and before the head.

    x <- x + lambda_i E[hash(t_(j-n+1) .. t_j)], E (ngram_rows, D) initially 0, lambda (n_layers + 1,) initially 0.1.
    After modded-nanogpt (Jordan et al. 2024) and Engram (Cheng et al. 2026, arXiv 2601.07372, sec. 2). Differs from
    Engram: one hash instead of several, no gate, no convolution, and the table is in every block.
    """

    def __init__(self, config: Any, n: int) -> None:
        super().__init__()
        self.n, self.rows = n, config.ngram_rows
        self.gram_embedding = nn.Embedding(config.ngram_rows, config.d_model)
        self.gram_lambda = mx.full((config.n_layers + 1,), 0.1)

    def __call__(self, recent: mx.array) -> mx.array:
        """Return the vectors (B, L, D) of the n-grams that end at each token; recent (B, L, n or more)."""
        return self.gram_embedding(self.row(recent))

    def row(self, recent: mx.array) -> mx.array:
        """Return the row of each n-gram: (B, L, n or more) int32 -> (B, L)."""
        h = mx.full(recent.shape[:-1], self.n, mx.uint32)
        for i in range(self.n):
            h = (h ^ (recent[..., -1 - i] + 1).astype(mx.uint32)) * mx.array(_PRIME, mx.uint32)
        h = (h ^ (h >> 15)) * mx.array(_MIX, mx.uint32)
        return (h ^ (h >> 13)) % self.rows

    def add(self, x: mx.array, grams: mx.array, depth: int) -> mx.array:
        """Return the input x (B, L, D) of block `depth`, or of the head, with the n-grams' vectors added."""
        return x + self.gram_lambda[depth : depth + 1] * grams


class CountedLevel(nn.Module):
    """N-grams of one order, in arrays that are no parameters: for each row of the order below, its tokens, ascending.

    P_k(w | h) = gain(h w) + backoff(h) P_(k-1)(w | h without its oldest token).
    """

    def __init__(self, arrays: dict[str, mx.array]) -> None:
        super().__init__()
        self._starts = arrays["starts"]  # (contexts + 1,) int32: where the n-grams of each context begin
        self._tokens = arrays["tokens"]  # (n,) uint16 or uint32: the last token of each n-gram
        self._gains = arrays["gains"]  # (n,) float32
        self._backoffs = arrays["backoffs"]  # (contexts,) float32
        self.widest = int(np.diff(np.array(self._starts)).max())  # most n-grams of a context

    def arrays(self) -> dict[str, mx.array]:
        """Return the arrays by name."""
        return {name: self[f"_{name}"] for name in ("starts", "tokens", "gains", "backoffs")}

    def find(self, contexts: mx.array, tokens: mx.array) -> mx.array:
        """Return the row of each n-gram, -1 if it was not counted; contexts: rows of the order below, or -1."""
        low, end = self._range(contexts)
        high = end
        for _ in range(self.widest.bit_length()):  # binary search
            middle = (low + high) // 2
            before = (low < high) & (self._token(middle) < tokens)
            low, high = mx.where(before, middle + 1, low), mx.where(before, high, middle)
        return mx.where((low < end) & (self._token(low) == tokens), low, -1)

    def probability(self, contexts: mx.array, tokens: mx.array, lower: mx.array) -> mx.array:
        """Return P_k of each token, given P_(k-1) in `lower`."""
        row = self.find(contexts, tokens)
        return mx.where(row >= 0, self._gains[mx.maximum(row, 0)], 0.0) + self._backoff(contexts) * lower

    def distribution(self, contexts: mx.array, lower: mx.array) -> mx.array:
        """Return P_k of all tokens (N, V) after contexts (N,), given P_(k-1) in `lower`."""
        start, end = self._range(contexts)
        rows = start[:, None] + mx.arange(self.widest)
        gains = mx.where(rows < end[:, None], self._gains[mx.minimum(rows, self._gains.size - 1)], 0.0)
        places = mx.arange(len(contexts))[:, None]
        return (self._backoff(contexts)[:, None] * lower).at[places, self._token(rows)].add(gains)

    def _range(self, contexts: mx.array) -> tuple[mx.array, mx.array]:
        """Return where the n-grams of each context begin and end; of no context, nowhere."""
        row = mx.maximum(contexts, 0)
        start = self._starts[row]
        return start, mx.where(contexts >= 0, self._starts[row + 1], start)

    def _backoff(self, contexts: mx.array) -> mx.array:
        return mx.where(contexts >= 0, self._backoffs[mx.maximum(contexts, 0)], 1.0)

    def _token(self, rows: mx.array) -> mx.array:
        return self._tokens[mx.minimum(rows, self._tokens.size - 1)].astype(mx.int32)


class NGramExpert(nn.Module):
    """An n-gram model mixed with a network: p(y) = g softmax(z)_y + (1 - g) p_KN(y), a gate g for each token.

    g = sigmoid(0.03 (w h + b) + 0.5), h (D,) the network's last hidden state. p_KN is interpolated Kneser-Ney (Chen &
    Goodman 1998), counted on the training text; before anything is counted it is uniform. The counts are tables, no
    parameters. A mixture with a recurrent network: Jelinek & Mercer 1980; as a logit: Li et al. 2022, arXiv 2210.14431.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.order = config.ngram_order
        self.gate_weight = mx.zeros((config.d_model,))
        self.gate_bias = mx.zeros((1,))
        self._unigram = mx.full((config.vocab_size,), 1 / config.vocab_size)
        self.levels: list[CountedLevel] = []  # of orders 2, 3, ...

    def set_counts(self, unigram: mx.array, levels: Sequence[dict[str, mx.array]]) -> None:
        """Set P_1 (V,) and the levels of orders 2, 3, ..."""
        self._unigram = unigram
        self.levels = [CountedLevel(arrays) for arrays in levels]

    def counts(self) -> tuple[mx.array, list[dict[str, mx.array]]]:
        """Return what `set_counts` set."""
        return self._unigram, [level.arrays() for level in self.levels]

    def contexts(self, recent: mx.array) -> list[mx.array]:
        """Return the rows of the contexts of 1, 2, ... tokens after (N, order - 1) tokens, each (N,), -1 if unseen."""
        rows, found = recent, [recent[:, -1]]
        for i, level in enumerate(self.levels[:-1], 1):
            rows = level.find(rows[:, :-1], recent[:, i:])
            found.append(rows[:, -1])
        return found

    def probability(self, recent: mx.array, targets: mx.array) -> mx.array:
        """Return p_KN of targets (B, L) after recent (B, L, order - 1 or more): (B, L) float32."""
        recent, y = recent[..., 1 - self.order :], targets.reshape(-1).astype(mx.int32)
        p = self._unigram[y]
        for level, contexts in zip(self.levels, self.contexts(recent.reshape(y.size, -1)), strict=False):
            p = level.probability(contexts, y, p)
        return p.reshape(targets.shape)

    def distribution(self, recent: mx.array) -> mx.array:
        """Return p_KN of all tokens after recent (B, L, order - 1 or more): (B, L, V) float32."""
        recent, shape = recent[..., 1 - self.order :].flatten(0, 1), recent.shape[:2]
        p = mx.broadcast_to(self._unigram, (len(recent), self._unigram.size))
        for level, contexts in zip(self.levels, self.contexts(recent), strict=False):
            p = level.distribution(contexts, p)
        return p.reshape(*shape, -1)

    def mix(
        self, h: mx.array, log_network: mx.array, p: mx.array, recent: mx.array, targets: mx.array | None = None
    ) -> mx.array:
        """Return the mixture's log-probability of targets (B, L), or of all tokens (B, L, V).

        log_network, p: the network's log-probabilities and p_KN, of the same shape; h (B, L, D); recent (B, L, n).
        """
        gate = self.gate(h).reshape(*h.shape[:2], *[1] * (p.ndim - 2))
        return mx.logaddexp(_log_sigmoid(gate) + log_network, _log_sigmoid(-gate) + mx.log(p))

    def gate(self, h: mx.array) -> mx.array:
        """Return the logit of g (B, L) float32 from h (B, L, D)."""
        return 0.03 * (h.astype(mx.float32) @ self.gate_weight.astype(mx.float32) + self.gate_bias) + 0.5

    def network_share(self, h: mx.array, recent: mx.array) -> mx.array:
        """Return the network's share of the mixture at each token (B, L)."""
        return mx.sigmoid(self.gate(h))


class _Gate(nn.Module):
    """The logit of an expert's share of a mixture: w h + b + start, h (B, L, D) -> (B, L) float32; w, b initially 0."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight, self.bias = mx.zeros((width,)), mx.zeros((1,))

    def __call__(self, h: mx.array) -> mx.array:
        return h.astype(mx.float32) @ self.weight.astype(mx.float32) + self.bias + self.start


class CachedNGramExpert(NGramExpert):
    """The n-gram expert, and two that count what stands in the sequence itself, with a softmax of four gates.

        p(y) = g_1 softmax(z)_y + g_2 p_KN(y) + g_3 p_1(y) + g_4 p_2(y)

    Of the last n tokens p_1 is the share that is y (Kuhn & De Mori 1990), p_2 of those after the same token as here
    (Jelinek et al. 1991); where there is none of these, g_4 is 0. Neither has parameters.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.gate_weight, self.gate_bias
        self.gates = [_Gate(config.d_model, start) for start in (0.0, -0.5, -2.5, -1.5)]

    def mix(
        self, h: mx.array, log_network: mx.array, p: mx.array, recent: mx.array, targets: mx.array | None = None
    ) -> mx.array:
        cached = cached_distributions(recent, p.shape[-1]) if targets is None else cached_probabilities(recent, targets)
        shares = self.log_shares(h, recent).reshape(4, *h.shape[:2], *[1] * (p.ndim - 2))
        known = [log_network, *(mx.log(mx.maximum(one, 1e-30)) for one in (p, *cached))]
        return mx.logsumexp(mx.stack(known) + shares, axis=0)

    def log_shares(self, h: mx.array, recent: mx.array) -> mx.array:
        """Return ln g (4, B, L), of the last one -1e9 where it is 0."""
        *others, last = (gate(h) for gate in self.gates)
        z = mx.stack([*others, mx.where(_follows(recent).any(axis=-1), last, -1e9)])
        return z - mx.logsumexp(z, axis=0)

    def network_share(self, h: mx.array, recent: mx.array) -> mx.array:
        return mx.exp(self.log_shares(h, recent)[0])


def cached_probabilities(recent: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return p_1 and p_2 (B, L) of targets (B, L) after recent (B, L, n), 0 where nothing is counted."""
    same, follows = recent == targets[..., None], _follows(recent)
    return _share(same, recent >= 0), _share(same[..., 1:] & follows, follows)


def cached_distributions(recent: mx.array, vocab_size: int) -> tuple[mx.array, mx.array]:
    """Return p_1 and p_2 of all tokens (B, L, V) after recent (B, L, n)."""

    def spread(tokens: mx.array, counted: mx.array) -> mx.array:
        weights = counted / mx.maximum(counted.sum(axis=-1, keepdims=True), 1)
        places = mx.arange(weights[..., 0].size)[:, None]
        flat = mx.zeros((places.size, vocab_size))
        flat = flat.at[places, mx.maximum(tokens, 0).flatten(0, 1)].add(weights.flatten(0, 1))
        return flat.reshape(*tokens.shape[:2], vocab_size)

    return spread(recent, recent >= 0), spread(recent[..., 1:], _follows(recent))


def _follows(recent: mx.array) -> mx.array:
    """Whether each of the recent tokens (B, L, n) but the first comes after the same token as the next one will."""
    return recent[..., :-1] == recent[..., -1:]


def _share(some: mx.array, of: mx.array) -> mx.array:
    return some.sum(axis=-1) / mx.maximum(of.sum(axis=-1), 1)


def _log_sigmoid(x: mx.array) -> mx.array:
    return -mx.logaddexp(mx.zeros_like(x), -x)
