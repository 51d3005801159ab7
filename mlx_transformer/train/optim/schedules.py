"""Schedules as functions of tokens, so that they do not change with the batch: of the learning rate, of the batch."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

# Every number of tokens below is an int, or in an unsized recipe a BySize.


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """The share of the peak learning rate in force: a linear warm-up to 1, then what the heir says."""

    warmup_tokens: Any

    def __call__(self, tokens: float) -> float:
        """tokens: those seen once the step is done -> a factor from 0 to 1."""
        return tokens / self.warmup_tokens if tokens < self.warmup_tokens else self.after_warmup(tokens)

    @abstractmethod
    def after_warmup(self, tokens: float) -> float:
        """The factor from warmup_tokens on, where it is 1; tokens count from the start of the run."""


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak for ever."""

    def after_warmup(self, tokens: float) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
    """1 / sqrt(tokens) (Vaswani et al. 2017, sec. 5.3, eq. 3), scaled to peak at 1; warmup_tokens must be above 0.

    Differs from the paper: the horizon counts tokens, not steps, and the peak is the recipe's learning rate.
    """

    def after_warmup(self, tokens: float) -> float:
        return (self.warmup_tokens / tokens) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line that is down at `final` of the peak at total_tokens, and stays there."""

    total_tokens: Any
    final: float = 0.0

    def after_warmup(self, tokens: float) -> float:
        return self.final + (1 - self.final) * (1 - self.progress(tokens))

    def progress(self, tokens: float) -> float:
        """0 at the end of the warm-up, 1 from total_tokens on."""
        return min(1.0, (tokens - self.warmup_tokens) / (self.total_tokens - self.warmup_tokens))


@dataclass(frozen=True, kw_only=True)
class Cosine(Linear):
    """Half a cosine from the peak to `final` of it at total_tokens (Loshchilov & Hutter 2017, eq. 5, one cycle)."""

    def after_warmup(self, tokens: float) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * self.progress(tokens))) / 2


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(Schedule):
    """Half cosines from the peak to `final` of it, each `growth` times as long (Loshchilov & Hutter 2017, eq. 5).

    The first takes cycle_tokens; growth, at least 1, is the paper's T_mult.
    """

    cycle_tokens: Any
    growth: float = 1.0
    final: float = 0.0

    def after_warmup(self, tokens: float) -> float:
        since, cycle = tokens - self.warmup_tokens, float(self.cycle_tokens)
        while since >= cycle:
            since, cycle = since - cycle, cycle * self.growth
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * since / cycle)) / 2


@dataclass(frozen=True, kw_only=True)
class WSD(Linear):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, arXiv 2404.06395, sec. 4.2): the peak, then a line to `final`.

    The decay takes the last decay_tokens before total_tokens: a run may go on from the stable part, which knows no end.
    Differs from the paper, which decays exponentially: a straight line (Hägele et al. 2024, arXiv 2405.18392, sec. 3).
    """

    decay_tokens: Any

    def progress(self, tokens: float) -> float:
        """0 until the decay begins, 1 from total_tokens on."""
        return min(1.0, max(0.0, 1 - (self.total_tokens - tokens) / self.decay_tokens))


@dataclass(frozen=True, kw_only=True)
class BatchWarmup:
    """Small steps first: the batch doubles `doublings` times at even distances, to the recipe's once `tokens` are seen.

    Few sizes, so few compiled graphs. After Smith et al. 2018 ("Don't Decay the Learning Rate, Increase the Batch
    Size", arXiv 1711.00489), and as GPT-3 was trained (Brown et al. 2020, app. B, where it grows linearly).
    """

    tokens: Any
    doublings: int

    def batch_size(self, full: int, tokens: int) -> int:
        """Sequences of the step that begins after `tokens` tokens; full: those of the recipe's batch."""
        left = self.doublings - min(self.doublings, tokens * self.doublings // self.tokens)
        return max(1, full >> left)
