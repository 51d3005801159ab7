"""Sums, answered at once or with worked steps."""

from collections.abc import Sequence

from mlx_transformer.data.fables.teller import SplitMix64
from mlx_transformer.data.tasks.base import Level, Task, between, digits

DIGITS = tuple("0123456789")


def number(random: SplitMix64, n_digits: int) -> int:
    """Draw a number with so many digits, the first of them not 0."""
    return between(random, 10 ** (n_digits - 1), 10**n_digits - 1)


def _levels() -> tuple[Level, ...]:
    return tuple(
        Level(
            name=f"{n} digits" if n < 5 else f"{n} digits, longer",
            size=n,
            trained=n < 5,
            floor=1 / (9 * 10 ** (n - 1)),  # of the most frequent sum
        )
        for n in (2, 3, 4, 5)
    )


class Sums(Task):
    """The sum of two numbers, digit by digit from the left, without any steps in between."""

    name = "sums"
    asks = "Add two numbers and write the sum at once."
    source = "Nye et al. 2021, arXiv 2112.00114, sec. 3, the direct form"
    symbols = ("+", "=", ".", *DIGITS)
    levels = _levels()
    train_examples = 60_000

    def example(self, random: SplitMix64, level: Level) -> str:
        a, b = number(random, level.size), number(random, level.size)
        return f"{digits(a)} + {digits(b)} = [{digits(a + b)} .]"


class SumsWithSteps(Task):
    """The same sums with worked steps: from the right, two digits and the carry, then their sum and the next carry.

    A scratchpad (Nye et al. 2021, arXiv 2112.00114, sec. 3), as chain of thought writes it. The score compares what
    stands after `=` alone.
    """

    name = "sums_steps"
    asks = "Add two numbers digit by digit, then write the sum."
    source = "Nye et al. 2021, arXiv 2112.00114"
    symbols = ("+", ":", ">", ";", "=", ".", *DIGITS)
    levels = _levels()
    train_examples = 30_000

    def example(self, random: SplitMix64, level: Level) -> str:
        a, b = number(random, level.size), number(random, level.size)
        steps, carry = [], 0
        for i in range(level.size):
            one, other = (value // 10**i % 10 for value in (a, b))
            total = one + other + carry
            steps.append(f"{one} {other} {carry} > {total % 10} {total // 10} ;")
            carry = total // 10
        return f"{digits(a)} + {digits(b)} : [{' '.join(steps)} = {digits(a + b)} .]"

    def final(self, words: Sequence[str]) -> list[str]:
        return list(words[words.index("=") + 1 :]) if "=" in words else []
