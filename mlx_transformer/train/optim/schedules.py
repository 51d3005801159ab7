"""Schedules of the learning rate and of the batch size, as functions of tokens, independent of the batch size."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

# Every number of tokens below is an int, or a BySize until `Recipe.at`.


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """The learning rate as a share of its peak: a linear warm-up to 1, then the subclass's `after_warmup`."""

    warmup_tokens: Any

    def __call__(self, tokens: float) -> float:
        """Return the factor, from 0 to 1, of the step that ends after `tokens` training tokens."""
        return tokens / self.warmup_tokens if tokens < self.warmup_tokens else self.after_warmup(tokens)

    @abstractmethod
    def after_warmup(self, tokens: float) -> float:
        """Return the factor from warmup_tokens on, where it is 1; tokens count from the start of the run."""


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak, without a decay."""

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
    """A linear decay to `final` of the peak at total_tokens, constant from there."""

    total_tokens: Any
    final: float = 0.0

    def after_warmup(self, tokens: float) -> float:
        return self.final + (1 - self.final) * (1 - self.progress(tokens))

    def progress(self, tokens: float) -> float:
        """Return the share of the decay that is over: 0 at the end of the warm-up, 1 from total_tokens on."""
        return min(1.0, (tokens - self.warmup_tokens) / (self.total_tokens - self.warmup_tokens))


@dataclass(frozen=True, kw_only=True)
class Cosine(Linear):
    """Half a cosine from the peak to `final` of it at total_tokens (Loshchilov & Hutter 2017, eq. 5, one cycle)."""

    def after_warmup(self, tokens: float) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * self.progress(tokens))) / 2


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(Schedule):
    """Half cosines from the peak to `final` of it, each `growth` times as long (Loshchilov & Hutter 2017, eq. 5).

    The first lasts cycle_tokens; growth, at least 1, is the paper's T_mult.
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
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, arXiv 2404.06395, sec. 4.2): the peak, then linear to `final`.

    The decay lasts the last decay_tokens before total_tokens; the stable part does not depend on total_tokens. Differs
    from the paper, which decays exponentially: linear as in Hägele et al. 2024, arXiv 2405.18392, sec. 3.
    """

    decay_tokens: Any

    def progress(self, tokens: float) -> float:
        """Return the share of the decay that is over: 0 until it begins, 1 from total_tokens on."""
        return min(1.0, max(0.0, 1 - (self.total_tokens - tokens) / self.decay_tokens))


@dataclass(frozen=True, kw_only=True)
class BatchWarmup:
    """A batch size that doubles `doublings` times at equal distances, up to the recipe's after `tokens` tokens.

    Few sizes mean few compiled graphs. After Smith et al. 2018 ("Don't Decay the Learning Rate, Increase the Batch
    Size", arXiv 1711.00489), and as GPT-3 was trained (Brown et al. 2020, app. B, where it grows linearly).
    """

    tokens: Any
    doublings: int

    def batch_size(self, full: int, tokens: int) -> int:
        """Return the sequences of the step that begins after `tokens` tokens; full: those of the recipe's batch."""
        left = self.doublings - min(self.doublings, tokens * self.doublings // self.tokens)
        return max(1, full >> left)
