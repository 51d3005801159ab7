"""Time to target: what a row says of the tokens and of the rate that it divides them by."""

import math
from dataclasses import replace

import pytest

from bench.compare import target
from bench.compare.plan import Finished, Variant
from bench.compare.stats import Interval
from bench.compare.target import Rates

ONE = Variant(phase=1)


def seeds(*ends):
    """A run for each number of tokens at which it meets a loss of 2."""
    evals = [({"tokens": end, "seconds": end / 50, "valid_loss": 2.0},) for end in ends]
    return {seed: Finished(status="done", evals=own) for seed, own in enumerate(evals)}


def over_rate(runs, rate):
    rates = Rates(medians={"phase 1": rate}, ratio=lambda a, b: pytest.fail("no pair"))
    return target.time_to_target(ONE, runs, 2.0, rates)["tokens_over_rate"]


def test_a_run_that_met_the_target_and_then_diverged_has_not_reached_it():
    runs = seeds(100, 200, 300, 400, 500)
    runs[0] = replace(runs[0], status="diverged")
    row = target.time_to_target(ONE, runs, 2.0, Rates(medians={}, ratio=lambda a, b: pytest.fail("no pair")))
    assert (row["reached"], row["tokens"]["median"]) == (4, 400)


def test_the_rates_own_uncertainty_is_in_the_time():
    exact = over_rate(seeds(*[1000] * 5), Interval(value=100, low=80, high=125))
    assert exact == pytest.approx({"median": 10, "low": 8, "high": 12.5})
    both = over_rate(seeds(800, 900, 1000, 1100, 1250), Interval(value=100, low=80, high=125))
    assert both == pytest.approx({"median": 10, "low": 10 * 0.8**2**0.5, "high": 10 * 1.25**2**0.5})


def test_a_rate_of_one_round_has_no_bounds():
    found = over_rate(seeds(*[1000] * 5), Interval(value=100, low=0, high=math.inf))
    assert found == {"median": 10, "low": None, "high": None}


def test_only_seeds_with_a_loss_decide_the_target():
    def run(status, loss):
        evals = ({"tokens": 100, "seconds": 1.0, "valid_loss": loss},)
        return Finished(
            status=status,
            result={"steps": 1, "tokens": 100, "recipe": {"batch_tokens": 100}, "config": {"seq_len": 10}},
            evals=evals,
        )

    runs = {0: run("done", 2.0), 1: run("diverged", 9.0), 2: Finished(status="failed"), 3: run("done", 3.0)}
    assert target.best_losses(runs, 100) == [2.0, 3.0]
    assert target.target_of(runs, 100) == 3.0
    assert target.target_of({1: runs[1], 2: runs[2]}, 100) is None
