"""In-context regression: a linear function from its points."""

from collections.abc import Sequence

import numpy as np

from mlx_transformer.data.fables.teller import SplitMix64
from mlx_transformer.data.tasks.base import Example, Level, Task, between

SLOPES, INTERCEPTS, INPUTS = range(-3, 4), range(-9, 10), range(10)
NOISE = {-1: 0.25, 0: 0.5, 1: 0.25}
_LEAST, _MOST = -3 * 9 - 9 - 1, 3 * 9 + 9 + 1
_SEEN = (1, 2, 4, 8, 16, 30)


class Regression(Task):
    """Points x, y of y = a x + b + noise, each number one token; every y is predicted from the points before.

    Garg et al. 2022, arXiv 2208.01066, sec. 2: functions learned in context. Differs from the paper: one input, with an
    intercept, and whole numbers as tokens. slope -3 ... 3, intercept -9 ... 9, x 0 ... 9, noise -1, 0, 1 with
    probabilities 1/4, 1/2, 1/4. The ceiling is the expected accuracy of the exact posterior (Bayes), the floor the
    most frequent y; least squares, rounded, is measured on the same examples.
    """

    name = "regression"
    asks = "Predict y of the next point of a noisy line."
    source = "Garg et al. 2022, arXiv 2208.01066"
    symbols = (*map(str, INPUTS), *(f"y{y}" for y in range(_LEAST, _MOST + 1)))
    read_off = True
    levels = (
        *(Level(name=f"after {n} points", size=n + 1, kind="last") for n in _SEEN),
        Level(name="after 61 points, 2x length", size=62, kind="last", trained=False),
    )
    training = (Level(name="31 points", size=31),)

    def example(self, random: SplitMix64, level: Level) -> str:
        slope, intercept = (between(random, one[0], one[-1]) for one in (SLOPES, INTERCEPTS))
        points = []
        for i in range(level.size):
            x = random.below(len(INPUTS))
            y = slope * x + intercept + (-1, 0, 0, 1)[random.below(4)]
            scored = level.kind != "last" or i == level.size - 1
            points.append(f"{x} [y{y}]" if scored else f"{x} y{y}")
        return " ".join(points)

    def bounds(self, level: Level, examples: Sequence[Example]) -> dict[str, float]:
        points = np.array([[int(word.removeprefix("y")) for word in each.words] for each in examples])
        x, y = points[:, ::2], points[:, 1::2]
        fitted = np.array([_least_squares(*each) for each in zip(x, y, strict=True)])
        return {
            "floor": _most_frequent(),
            "ceiling": float(np.mean([_best_accuracy(*each) for each in zip(x, y, strict=True)])),
            "least_squares": float(np.mean(fitted == y[:, -1])),
        }


def _hypotheses() -> np.ndarray:
    """Return every slope and intercept: (H, 2)."""
    return np.array([(slope, intercept) for slope in SLOPES for intercept in INTERCEPTS])


def _probability(error: np.ndarray) -> np.ndarray:
    """Return the probability of a noise of this size."""
    return np.select([error == value for value in NOISE], list(NOISE.values()), 0.0)


def _best_accuracy(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the probability of the most probable last y given the points before: x, y (n,)."""
    lines = _hypotheses()
    means = lines[:, :1] * x + lines[:, 1:]
    likelihood = _probability(y[:-1] - means[:, :-1]).prod(axis=1)
    posterior = likelihood / likelihood.sum()
    values = np.arange(_LEAST, _MOST + 1)
    return float((posterior @ _probability(values - means[:, -1:])).max())


def _least_squares(x: np.ndarray, y: np.ndarray) -> int:
    """Fit a line to the points but the last, and return its rounded value there; of several lines the smallest."""
    inputs = np.stack([x, np.ones_like(x)], axis=1).astype(float)
    line = np.linalg.lstsq(inputs[:-1], y[:-1].astype(float), rcond=None)[0]
    return round(float(inputs[-1] @ line))


def _most_frequent() -> float:
    """Return the probability of the most frequent y."""
    lines = _hypotheses()
    means = (lines[:, :1] * np.array(INPUTS) + lines[:, 1:]).reshape(-1)
    values = np.arange(_LEAST, _MOST + 1)
    return float(_probability(values[:, None] - means).mean(axis=1).max())
