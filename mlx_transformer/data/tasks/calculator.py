"""A story in which the model calls a calculator: tool use."""

from collections.abc import Sequence

from mlx_transformer.data.fables.teller import SplitMix64
from mlx_transformer.data.tasks.base import Level, Task, digits, sample
from mlx_transformer.data.tasks.sums import DIGITS, number

NAMES = ("ann", "ben", "cora", "dan", "eva", "finn", "gina", "hugo")
THINGS = ("apples", "shells", "stones", "coins", "beads", "nuts", "cards", "stamps")
OPEN, EQUALS, CLOSE = "(", "=", ")"


class Calculator(Task):
    """A story about a number of things; the model writes `( a + b =`, the runtime the result and `)`.

    Calls within the text as in Toolformer (Schick et al. 2023, arXiv 2302.04761, sec. 2). Differs from the paper: the
    calls are part of the training text from the start, not found by the model. The loss counts the call and what the
    model writes after the result, not the result. The score compares the number in the last sentence.
    """

    name = "calculator"
    asks = "Call the calculator, read its result, and finish the story with the right number."
    source = "Schick et al. 2023, arXiv 2302.04761"
    symbols = (
        *("has", "is", "years", "old", "gets", "gives", "away", "more", "now", ".", "+", "-", OPEN, EQUALS, CLOSE),
        *NAMES,
        *THINGS,
        *DIGITS,
    )
    levels = tuple(
        Level(
            name=f"{n} digits" if n < 5 else f"{n} digits, longer",
            size=n,
            trained=n < 5,
            floor=1 / (9 * 10 ** (n - 1)),  # of the most frequent result
        )
        for n in (2, 3, 4, 5)
    )
    tool = "calculator"

    def example(self, random: SplitMix64, level: Level) -> str:
        name, thing = NAMES[random.below(len(NAMES))], THINGS[random.below(len(THINGS))]
        a, b = number(random, level.size), number(random, level.size)
        facts = [f"{name} has {digits(a)} {thing} .", f"{name} is {digits(number(random, 1))} years old ."]
        facts = sample(random, facts, 2)
        if random.below(2):
            change, sign, result = f"{name} gets {digits(b)} more .", "+", a + b
        else:
            a, b = max(a, b), min(a, b)
            facts = [fact if "old" in fact else f"{name} has {digits(a)} {thing} ." for fact in facts]
            change, sign, result = f"{name} gives {digits(b)} away .", "-", a - b
        call = f"[{OPEN} {digits(a)} {sign} {digits(b)} {EQUALS}] {digits(result)} {CLOSE}"
        return f"{' '.join(facts)} {change} {call} [{name} has {digits(result)} {thing} now .]"

    def final(self, words: Sequence[str]) -> list[str]:
        """Return the number in the sentence after the call."""
        after = words[words.index(CLOSE) + 1 :] if CLOSE in words else []
        return [word for word in after if word in DIGITS or word == "-"]


def answer(call: Sequence[str]) -> list[str]:
    """Compute a call, the words between `(` and `=`: "1 2 + 3" -> the words of 15; none for what is no sum."""
    signs = [i for i, word in enumerate(call) if word in ("+", "-")]
    if len(signs) != 1:
        return []
    left, right = "".join(call[: signs[0]]), "".join(call[signs[0] + 1 :])
    if not (left.isdecimal() and right.isdecimal()):
        return []
    return digits(int(left) + int(right) if call[signs[0]] == "+" else int(left) - int(right)).split()
