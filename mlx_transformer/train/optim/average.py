"""An average of the weights over the steps, which is evaluated and kept; training continues from the weights."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EMA:
    """An exponential moving average (Polyak & Juditsky 1992; in this form Szegedy et al. 2016, sec. 8).

    average += share * (weights - average), share = step_tokens / window. The window is the last tenth of the run so
    far, which leaves out the poor early weights, but at most horizon_tokens.
    """

    horizon_tokens: Any  # int, or a BySize

    def share(self, step_tokens: int, tokens: int) -> float:
        """Return the share of the new weights in the average, after a step of step_tokens that ended at `tokens`."""
        return min(1.0, step_tokens / min(self.horizon_tokens, tokens / 10))
