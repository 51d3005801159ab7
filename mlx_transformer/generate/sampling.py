"""Sampling of the next token from logits."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_transformer.utils.errors import BadInput

_GREEDY = 1e-6  # temperatures below this take the most probable token: exp(-1 / 1e-6) is 0 in float32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution of the next token. temperature 0 is greedy. The filters apply in the order of the fields.

    Raises BadInput for a number out of its range.
    """

    temperature: float = 0.8
    top_k: int | None = None  # keep the k most probable tokens
    top_p: float | None = None  # keep the smallest set of most probable tokens with this mass (Holtzman et al. 2020)
    min_p: float | None = None  # keep tokens with at least this share of the most probable one's probability

    def __post_init__(self) -> None:
        checks = (
            ("temperature", "a number of at least 0", lambda x: 0 <= x < float("inf")),
            ("top_k", "a whole number of at least 1", lambda x: x is None or x >= 1),
            ("top_p", "a number above 0 and at most 1", lambda x: x is None or 0 < x <= 1),
            ("min_p", "a number from 0 to 1", lambda x: x is None or 0 <= x <= 1),
        )
        for name, expected, holds in checks:
            if not holds(getattr(self, name)):
                raise BadInput(f"{name.replace('_', '-')} = {getattr(self, name)}: expected {expected}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < _GREEDY

    def __call__(self, logits: mx.array, key: mx.array) -> mx.array:
        """Sample from logits (B, V) with a random key: tokens (B,)."""
        if self.is_greedy:
            return mx.argmax(logits, axis=-1)
        return mx.random.categorical(self.filtered(logits), axis=-1, key=key)

    def filtered(self, logits: mx.array) -> mx.array:
        """Divide logits (B, V) by the temperature; -inf for tokens that a filter drops, never for the most probable."""
        logits = logits.astype(mx.float32)
        logits = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature  # no overflow at a low temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = mx.topk(logits, self.top_k, axis=-1).min(axis=-1, keepdims=True)
            logits = _drop(logits, logits < least)
        if self.top_p is not None and self.top_p < 1:
            order = mx.argsort(-logits, axis=-1)
            p = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1)
            before = mx.cumsum(p, axis=-1) - p  # mass of all more probable tokens
            rank = mx.argsort(order, axis=-1)
            logits = _drop(logits, mx.take_along_axis(before, rank, axis=-1) >= self.top_p)
        if self.min_p:
            logits = _drop(logits, logits < logits.max(axis=-1, keepdims=True) + mx.log(mx.array(self.min_p)))
        return logits


def _drop(logits: mx.array, mask: mx.array) -> mx.array:
    return mx.where(mask, mx.array(-mx.inf, logits.dtype), logits)
