"""The progress of a run on a terminal and in lines."""

import io

import pytest

from mlx_transformer.run import console
from mlx_transformer.train.trainer import Eval, Limits, Step
from tests.train.test_clock import Clock


def step(number, seconds):
    figures = {"metrics": {"loss": 3.14159}, "learning_rate": 1e-3, "gradient_norm": 1.0, "data_wait_share": 0.0}
    return Step(step=number, tokens=100 * number, epochs=0.1, seconds=seconds, tokens_per_second=123_456.0, **figures)


@pytest.fixture
def ticks(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    return clock


def lines(printer, ticks):
    """Steps of 2 s and an evaluation of 20 s, of 100 steps; step 1 compiles for 50 s."""
    with printer.training(Limits(max_steps=100)):
        for number in range(1, 22):
            ticks.now += 50 if number == 1 else 2
            printer.show(step(number, 2.0 * number if number > 1 else 0.0), memory=2**30)
            if number == 11:
                ticks.now += 20
                printer.show(Eval(step=11, tokens=1100, seconds=22.0, valid_loss=2.5, improved=True))


@pytest.mark.parametrize(
    ("width", "shown", "dropped"),
    [
        (120, ["left", "loss 3.142", "valid 2.500", "123,456 tokens/s", "1.0 GiB"], []),
        (80, ["left", "loss 3.142", "valid 2.500", "123,456 tokens/s"], []),
        (60, ["left", "loss 3.142", "valid 2.500"], ["tokens/s", "GiB"]),
        (40, ["left", "loss 3.142"], ["valid", "tokens/s", "GiB"]),
        (20, ["step 21"], ["loss"]),
    ],
)
def test_the_bar_drops_what_is_worth_least(width, shown, dropped, ticks, monkeypatch):
    printer, screen = console.Console(), io.StringIO()
    monkeypatch.setattr(printer, "terminal", console._Terminal(file=screen, width=width, force_terminal=True))
    lines(printer, ticks)
    bars = [line for line in printer.terminal.file.getvalue().replace("\r", "\n").splitlines() if "step 21" in line]
    assert bars
    for part in shown:
        assert part in bars[-1]
    for part in dropped:
        assert part not in bars[-1]


def test_the_time_left_counts_evaluations_but_not_compilation(ticks, capsys):
    lines(console.Console(), ticks)
    last = capsys.readouterr().out.splitlines()[-1]
    # from step 2 to the last line 20 % of the steps took 2 s each and one evaluation
    number = int(last.split(",")[0].removeprefix("step "))
    expected = (2 * (number - 2) + 20) * (100 - number) / (number - 2)
    assert f" {console.clock(expected)} left" in last
