"""An average of the weights over the steps, to evaluate and to keep; training goes on from the weights themselves."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EMA:
    """An exponential moving average (Polyak & Juditsky 1992; in this form Szegedy et al. 2016, sec. 8).

    average += share * (weights - average), share = step_tokens / window: the window is the last tenth of the run so
    far, so that the bad weights of the start are soon forgotten, and horizon_tokens at most.
    """

    horizon_tokens: Any  # int, or in an unsized recipe a BySize

    def share(self, step_tokens: int, tokens: int) -> float:
        """Of the new weights in the average, after a step of step_tokens that made it so many tokens in all."""
        return min(1.0, step_tokens / min(self.horizon_tokens, tokens / 10))
