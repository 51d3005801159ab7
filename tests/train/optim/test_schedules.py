"""Schedules: each one's equation, what holds for all of them, and their picture."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.tools import schedules as picture
from mlx_transformer.train.optim.schedules import (
    WSD,
    BatchWarmup,
    Constant,
    Cosine,
    CosineRestarts,
    InverseSqrt,
    Linear,
    Schedule,
)
from mlx_transformer.train.recipe import BySize
from phases import phase1

WARMUP, TOTAL = 100, 1100
ALL = {
    "constant": Constant(warmup_tokens=WARMUP),
    "inverse square root": InverseSqrt(warmup_tokens=WARMUP),
    "linear": Linear(warmup_tokens=WARMUP, total_tokens=TOTAL),
    "linear to a tenth": Linear(warmup_tokens=WARMUP, total_tokens=TOTAL, final=0.1),
    "cosine": Cosine(warmup_tokens=WARMUP, total_tokens=TOTAL, final=0.2),
    "restarts": CosineRestarts(warmup_tokens=WARMUP, cycle_tokens=200, growth=2, final=0.1),
    "warm-up, stable, decay": WSD(warmup_tokens=WARMUP, decay_tokens=500, total_tokens=TOTAL, final=0.2),
}
everyone = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)


def kinds(base=Schedule):
    return {kind for subclass in base.__subclasses__() for kind in (subclass, *kinds(subclass))}


@everyone
def test_each_rises_linearly_to_one(schedule):
    assert [schedule(tokens) for tokens in (0, 25, 50, 100)] == pytest.approx([0, 0.25, 0.5, 1])


@everyone
@given(st.floats(0, 1e12))
def test_no_share_is_below_zero_or_above_one(schedule, tokens):
    assert 0 <= schedule(tokens) <= 1


@everyone
def test_no_share_jumps_but_where_it_restarts(schedule):
    """A step of a token moves it by a hundredth at most; a restart goes up to the peak."""
    for tokens in range(5000):
        before, after = schedule(tokens), schedule(tokens + 1)
        assert abs(after - before) <= 0.0101 or (isinstance(schedule, CosineRestarts) and after == 1)


def test_the_equations():
    share = {name: [schedule(t) for t in (350, 600, 850, 1100, 5000)] for name, schedule in ALL.items()}
    assert share["constant"] == [1] * 5
    assert share["inverse square root"] == pytest.approx([math.sqrt(100 / t) for t in (350, 600, 850, 1100, 5000)])
    assert share["linear"] == pytest.approx([0.75, 0.5, 0.25, 0, 0])
    assert share["linear to a tenth"] == pytest.approx([0.775, 0.55, 0.325, 0.1, 0.1])
    assert share["warm-up, stable, decay"] == pytest.approx([1, 1, 0.6, 0.2, 0.2])
    cosine = [0.2 + 0.4 * (1 + math.cos(math.pi * x)) for x in (0.25, 0.5, 0.75, 1, 1)]
    assert share["cosine"] == pytest.approx(cosine)


@given(st.integers(1, 10**9), st.integers(1, 10**7))
def test_inverse_square_root_rises_to_one_and_falls(tokens, warmup):
    schedule = InverseSqrt(warmup_tokens=warmup)
    assert 0 < schedule(tokens) <= 1
    assert schedule(warmup) == 1
    assert schedule(4 * warmup) == 0.5
    paper = min(tokens**-0.5, tokens * warmup**-1.5) * warmup**0.5  # eq. 3, its peak scaled to 1
    assert schedule(tokens) == pytest.approx(paper)


def test_restarts_come_at_the_ends_of_growing_cycles():
    schedule = ALL["restarts"]
    for start, length in ((100, 200), (300, 400), (700, 800), (1500, 1600)):
        assert schedule(start) == 1
        assert schedule(start + length / 2) == pytest.approx(0.55)
        assert schedule(start + length - 1e-6) == pytest.approx(0.1)


def test_a_cosine_is_one_cycle_of_restarts():
    once = CosineRestarts(warmup_tokens=WARMUP, cycle_tokens=TOTAL - WARMUP, final=0.2)
    assert [once(t) for t in range(TOTAL)] == pytest.approx([ALL["cosine"](t) for t in range(TOTAL)])


@given(decay=st.integers(1, TOTAL - WARMUP), tokens=st.integers(0, 2 * TOTAL))
def test_without_a_stable_part_it_is_the_linear_schedule(decay, tokens):
    numbers = {"warmup_tokens": WARMUP, "total_tokens": TOTAL, "final": 0.1}
    line = Linear(**numbers)(tokens)
    assert WSD(**numbers, decay_tokens=TOTAL - WARMUP)(tokens) == pytest.approx(line)
    held = WSD(**numbers, decay_tokens=decay)(tokens)
    assert held >= line - 1e-9
    if WARMUP <= tokens <= TOTAL - decay:
        assert held == 1


def test_a_schedule_is_sized_with_its_recipe():
    total = BySize(nano=1, small=TOTAL, base=3)
    recipe = replace(phase1.RECIPE, schedule=Linear(warmup_tokens=0, total_tokens=total)).at("small")
    assert recipe.schedule(TOTAL / 2) == 0.5


@given(st.integers(1, 10**4), st.integers(1, 6), st.integers(1, 10**9))
def test_the_batch_grows_to_the_full_one_in_few_sizes(full, doublings, tokens):
    warmup = BatchWarmup(tokens=tokens, doublings=doublings)
    sizes = [warmup.batch_size(full, tokens * k // 97) for k in range(200)]
    assert sizes == sorted(sizes)
    assert sizes[0] == max(1, full // 2**doublings)
    assert set(sizes[97:]) == {full}
    assert len(set(sizes)) <= doublings + 1


def test_the_batch_doubles_at_even_distances():
    warmup = BatchWarmup(tokens=200, doublings=2)
    assert [warmup.batch_size(16, tokens) for tokens in (0, 99, 100, 199, 200, 10**9)] == [4, 4, 8, 8, 16, 16]


def test_the_picture_shows_every_schedule_and_is_drawn(tmp_path):
    assert {type(schedule) for schedule in picture.SHOWN.values()} == kinds(), "a schedule is missing in the picture"
    picture.draw(tmp_path / "one.png")
    picture.draw(tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes() != b""
