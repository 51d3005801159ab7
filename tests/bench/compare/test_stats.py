"""Intervals over data whose answer is known: coverage, no false differences, true ones found, and the unreached."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.compare import stats
from bench.compare.stats import Interval

NOISES = {
    "normal": lambda draw, shape: draw.normal(size=shape),
    "heavy-tailed": lambda draw, shape: draw.standard_t(3, size=shape),
    "one-sided": lambda draw, shape: draw.exponential(size=shape) - math.log(2),  # with median 0
}
INF, NAN = math.inf, math.nan


def pairs(noise, correlation, count, size, spread=0.05):
    """Two sets (count, size) of positive measurements with equal medians, correlated within a pair."""
    draw = np.random.default_rng([count, size, int(10 * correlation)])
    shared, *own = (NOISES[noise](draw, (count, size)) for _ in range(3))
    return [np.exp(spread * (math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * one)) for one in own]


def ratios(above, below):
    return [stats.ratio_of_medians(a, b) for a, b in zip(above, below, strict=True)]


@pytest.mark.parametrize("size", [3, 5, 8])
def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch, size):
    """95 % means 93-97 %: over all kinds of noise together, and of each as exactly as 500 comparisons can tell."""
    monkeypatch.setattr(stats, "RESAMPLES", 399)
    covered = {}
    for noise in NOISES:
        for correlation in (0.0, 0.9):
            found = ratios(*pairs(noise, correlation, 500, size))
            covered[noise, correlation] = np.mean([one.low <= 1 <= one.high for one in found])
    assert 0.93 <= np.mean(list(covered.values())) <= 0.97, covered
    error = 3 * math.sqrt(0.05 * 0.95 / 500)
    assert all(0.93 - error <= share <= 0.97 + error for share in covered.values()), covered


def test_a_comparison_with_itself_shows_nothing_and_a_slowdown_is_found(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 399)
    mine, again = pairs("normal", 0.5, 100, 5)
    verdicts = [one.verdict for one in ratios(mine, again)]
    assert verdicts.count("no difference") >= 0.9 * len(verdicts)
    assert [one.verdict for one in ratios(mine, 1.3 * again)].count("slower") >= 0.99 * len(verdicts)
    assert [one.verdict for one in ratios(1.3 * mine, again)].count("faster") >= 0.99 * len(verdicts)
    assert stats.ratio_of_medians(mine[0], mine[0]) == Interval(value=1, low=1, high=1)


seconds = st.floats(0.5, 2.0)


@given(st.lists(st.tuples(seconds, seconds), min_size=5, max_size=5))
def test_over_five_pairs_the_interval_is_the_range_of_their_ratios(values):
    above, below = np.array(values).T
    found = stats.ratio_of_medians(above, below)
    assert found.value == pytest.approx(np.median(above) / np.median(below))
    assert (found.low, found.high) == pytest.approx(((above / below).min(), (above / below).max()))


@given(st.lists(st.tuples(seconds, seconds), min_size=2, max_size=9), st.floats(0.1, 10))
def test_the_unit_does_not_matter(values, factor):
    above, below = np.array(values).T
    once, scaled = stats.ratio_of_medians(above, below), stats.ratio_of_medians(factor * above, below)
    assert [scaled.value, scaled.low, scaled.high] == pytest.approx(
        [factor * bound for bound in (once.value, once.low, once.high)]
    )


@given(st.lists(st.tuples(seconds, seconds), min_size=2, max_size=5))
def test_an_inverse_is_the_ratio_the_other_way_round(values):
    above, below = np.array(values).T
    found, other = stats.ratio_of_medians(above, below).inverse, stats.ratio_of_medians(below, above)
    assert (found.low, found.high) == pytest.approx((other.low, other.high))
    assert Interval(value=2, low=0, high=INF).inverse == Interval(value=0.5, low=0, high=INF)


def test_what_was_never_reached_is_longer_than_any_other():
    reached, late = np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 2, 3, INF, INF])
    assert stats.median(late) == Interval(value=3, low=1, high=INF)
    assert stats.median(np.array([1.0, INF, INF, INF, INF])).value == INF
    sooner = stats.ratio_of_medians(late, reached / 10)
    assert (sooner.value, sooner.low, sooner.high, sooner.verdict) == (10, 10, INF, "faster")
    never = np.full(5, INF)
    assert stats.ratio_of_medians(never, reached).verdict == "faster"
    assert stats.ratio_of_medians(reached, never).verdict == "not reached"
    assert stats.ratio_of_medians(never, never).verdict == "not reached"
    unknown = stats.ratio_of_medians(np.array([2.0, 2, 2, INF, INF]), np.array([1.0, 1, 1, INF, INF]))
    assert (unknown.value, unknown.low, unknown.high) == (2, 0, INF), "where neither got there, either may be sooner"


def test_few_measurements_say_little():
    one = stats.ratio_of_medians(np.array([3.0]), np.array([1.0]))
    assert (one, one.verdict) == (Interval(value=3, low=0, high=INF), "no difference")
    assert stats.ratio_of_medians(np.array([3.0, INF]), np.array([1.0, 1.0])).low == 0
    assert stats.ratio_of_medians(np.array([3.0, 3.1]), np.array([1.0, 1.0])).verdict == "faster"
    assert stats.ratio_of_medians(np.array([3.0, 1.1]), np.array([1.0, 1.0])).verdict == "no difference"
    with pytest.raises(ValueError, match="2 and 1 measurements"):
        stats.ratio_of_medians(np.ones(2), np.ones(1))


def test_the_product_of_two_estimates():
    tokens, exact = Interval(value=2, low=1.6, high=2.5), Interval(value=1.5, low=1.5, high=1.5)
    found = stats.product(tokens, exact)
    assert [found.value, found.low, found.high] == pytest.approx([3, 2.4, 3.75])
    both = stats.product(tokens, tokens)
    assert both.low == pytest.approx(4 * 0.8 ** math.sqrt(2))
    assert 1.6**2 < both.low < both.high < 2.5**2
    unbounded = stats.product(Interval(value=2, low=1.5, high=INF), exact)
    assert (unbounded.high, unbounded.verdict) == (INF, "faster")
    assert stats.product(Interval(value=INF, low=4, high=INF), exact) == Interval(value=INF, low=6, high=INF)
    assert stats.product(Interval(value=0, low=0, high=0.5), exact).verdict == "not reached"
    assert stats.product(Interval(value=NAN, low=0, high=INF), exact).high == INF


def test_the_product_covers_the_truth(monkeypatch):
    """Tokens from five seeds, the rate from eight rounds, each with noise of its own."""
    monkeypatch.setattr(stats, "RESAMPLES", 399)
    tokens, rates = ratios(*pairs("normal", 0.5, 300, 5)), ratios(*pairs("normal", 0.5, 300, 8, 0.02))
    found = [stats.product(one, other) for one, other in zip(tokens, rates, strict=True)]
    assert 0.92 <= np.mean([one.low <= 1 <= one.high for one in found]) <= 0.98
