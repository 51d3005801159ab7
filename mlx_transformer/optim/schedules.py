"""Learning-rate schedules as functions of tokens, so that they do not change with the batch."""

from dataclasses import dataclass
from typing import Any, Protocol


class Schedule(Protocol):
    """The share of the peak learning rate in force."""

    def __call__(self, tokens: int) -> float:
        """tokens: those seen once the step is done, at least 1 -> a factor, at most 1."""


@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """Linear warm-up, then 1 / sqrt(tokens) (Vaswani et al. 2017, sec. 5.3, eq. 3), scaled to peak at 1.

    Differs from the paper: the horizon counts tokens, not steps, and the peak is the recipe's learning rate.
    """

    warmup_tokens: Any  # int, or in an unsized recipe a BySize

    def __call__(self, tokens: int) -> float:
        return min(tokens / self.warmup_tokens, (self.warmup_tokens / tokens) ** 0.5)
