"""Time to target: when a loss curve reaches it, and what a row says of tokens and throughput."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.compare import target
from bench.compare.runs import Finished
from bench.compare.stats import Interval
from bench.compare.target import Throughput
from bench.compare.variants import Variant
from tests.bench.compare.tiny import STEPS_OF_100

ONE = Variant(phase=1)


def seeds(*ends):
    """A run for each number of tokens at which it meets a loss of 2."""
    evals = [({"tokens": end, "seconds": end / 50, "valid_loss": 2.0},) for end in ends]
    return {seed: Finished(status="done", evals=own) for seed, own in enumerate(evals)}


def over_throughput(runs, median):
    throughput = Throughput(medians={"phase 1": median}, ratio=lambda a, b: pytest.fail("no pair"))
    return target.time_to_target(ONE, runs, 2.0, throughput)["tokens_over_throughput"]


def test_a_run_that_met_the_target_and_then_diverged_has_not_reached_it():
    runs = seeds(100, 200, 300, 400, 500)
    runs[0] = replace(runs[0], status="diverged")
    row = target.time_to_target(ONE, runs, 2.0, Throughput(medians={}, ratio=lambda a, b: pytest.fail("no pair")))
    assert (row["reached"], row["tokens"]["median"]) == (4, 400)


def test_the_rates_own_uncertainty_is_in_the_time():
    exact = over_throughput(seeds(*[1000] * 5), Interval(value=100, low=80, high=125))
    assert exact == pytest.approx({"median": 10, "low": 8, "high": 12.5})
    both = over_throughput(seeds(800, 900, 1000, 1100, 1250), Interval(value=100, low=80, high=125))
    assert both == pytest.approx({"median": 10, "low": 10 * 0.8**2**0.5, "high": 10 * 1.25**2**0.5})


def test_a_rate_of_one_round_has_no_bounds():
    found = over_throughput(seeds(*[1000] * 5), Interval(value=100, low=0, high=math.inf))
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


def curve(*pairs):
    return tuple({"tokens": t, "seconds": t / 10, "valid_loss": loss} for t, loss in pairs)


def test_a_target_is_crossed_between_two_evaluations():
    evals = curve((100, 4.0), (200, 3.0), (300, 3.5), (400, 2.0))
    assert target.crossing(evals, 3.25) == (175, 17.5)
    assert target.crossing(evals, 3.0) == (200, 20.0)
    assert target.crossing(evals, 2.75) == (350, 35.0)
    assert target.crossing(evals, 5.0) == (100, 10.0)
    assert target.crossing(evals, 1.0) == target.crossing((), 1.0) == (math.inf, math.inf)


@given(st.lists(st.floats(1, 9), min_size=1, max_size=12), st.floats(0.5, 9.5), st.floats(0.5, 9.5))
def test_a_lower_target_is_never_crossed_sooner(losses, one, other):
    evals = curve(*enumerate(losses, 1))
    easy, hard = (target.crossing(evals, loss)[0] for loss in (max(one, other), min(one, other)))
    assert easy <= hard
    assert (hard < math.inf) == (min(losses) <= min(one, other))


def test_the_step_that_uses_up_the_budget_counts():
    result = {"steps": 12, "tokens": 1070, **STEPS_OF_100}  # the first steps were smaller
    finished = Finished(status="done", result=result, evals=curve((500, 4.0), (1070, 3.0)))
    assert target.best_within(finished, 1000) == 3.0
    assert target.best_within(finished, 900) == 4.0
    assert target.best_within(finished, 300) == math.inf
