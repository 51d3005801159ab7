"""The story grammar: templates with slots, and the `Author` that generates a story from it.

A plot is a Python function that calls `Teller.say` with several templates, step by step. An `Author` chooses one at
random (generation), a `Reader` (parse.py) the one that continues the text (parsing): one grammar for both. Every
choice has integer weights, so a story's probability is an exact product of rationals.

A template is text with slots in braces, filled from left to right:

    {key}  {key.form}       the word bound to `key` before, in one of its forms: determined by the state of the story
    {key=pool.form}         a free choice from a pool, bound to `key` ({=pool}: bound to nothing)
    {key=pool!other}        ... but not the word bound to `other`
    {key#noun}              a number and a noun that agrees with it: "three apples", "one apple"
    {he} {him} {his} {He}   the hero's pronouns

A text has one derivation because the texts of one step are a prefix code (a test searches for second derivations).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import fsum, log2
from typing import NamedTuple

from mlx_transformer.data.fables.lexicon import NUMBERS, POOLS, numbers
from mlx_transformer.data.fables.words import Item, Pool

Alternative = str | tuple[int, str]  # a template, or (weight, template); weight 0: impossible in this state


class Slot(NamedTuple):
    """A parsed `{...}` of a template."""

    key: str
    pool: str
    unlike: tuple[str, ...]
    form: str
    number: str = ""  # for a noun after a number: the number's key

    def agreeing(self, state: Mapping[str, Item]) -> str:
        """Return the form of the word: singular or plural after a number."""
        if self.number:
            return "" if state[self.number].value == 1 else "many"
        return self.form


PRONOUNS = ("he", "him", "his", "himself")
_SLOT = re.compile(r"\{(\w*)(?:=(\w+))?((?:!\w+)*)(?:#(\w+))?(?:\.(\w+))?\}")


@cache
def compiled(template: str) -> tuple[str | Slot, ...]:
    """Return the parts of a template, literal texts and slots, in order. Raises ValueError for a malformed slot."""
    parts: list[str | Slot] = []
    end = 0
    for slot in _SLOT.finditer(template):
        if slot.start() > end:
            parts.append(template[end : slot.start()])
        key, pool, unlike, noun, form = (group or "" for group in slot.groups())
        if key.lower() in PRONOUNS:
            key, form = "hero", key
        parts.append(Slot(key, pool, tuple(unlike.split("!")[1:]), form))
        if noun:
            parts.extend((" ", Slot(noun, "", (), "", number=key)))
        end = slot.end()
    if end < len(template):
        parts.append(template[end:])
    if any("{" in part or "}" in part for part in parts if isinstance(part, str)):
        raise ValueError(f"malformed slot in the template {template!r}")
    return tuple(parts)


def weighted(alternatives: tuple[Alternative, ...]) -> list[tuple[int, str]]:
    """Return the alternatives as (weight, template); a plain template has weight 1."""
    return [(1, each) if isinstance(each, str) else each for each in alternatives]


@cache
def _log2(number: int) -> float:
    return log2(number)


class Teller:
    """The interface of the plots: `say`, `add`, `paragraph` for text; `let`, `count`, `between` for the state."""

    def __init__(self) -> None:
        self.state: dict[str, Item] = {}
        self.plot = ""
        self._ranges: dict[str, Pool] = {}
        self._gap = ""
        self._trace: list[int] = []
        self._odds: list[tuple[int, int]] = []

    def __getitem__(self, key: str) -> Item:
        return self.state[key]

    def __contains__(self, key: str) -> bool:
        return key in self.state

    def let(self, **items: Item) -> None:
        """Bind words to keys of the state."""
        self.state.update(items)

    def count(self, **values: int) -> None:
        """Bind numbers, clamped to those that have a word (parsing a wrong story may give a number below zero)."""
        for key, value in values.items():
            self.state[key] = NUMBERS[min(max(value, 0), len(NUMBERS) - 1)]

    def between(self, pool: str, low: int, high: int) -> None:
        """Define `pool` as the numbers low..high."""
        self._ranges[pool] = numbers(low, max(low, high))

    def paragraph(self) -> None:
        """Begin a new line with the next step."""
        self._gap = "\n"

    def say(self, *alternatives: Alternative) -> int:
        """Add one of the alternatives after a space (or a new line); return its index."""
        chosen = self._say(self._gap, alternatives)
        self._gap = " "
        return chosen

    def add(self, *alternatives: Alternative) -> int:
        """Add one of the alternatives with nothing in between; return its index."""
        return self._say("", alternatives)

    def _say(self, gap: str, alternatives: tuple[Alternative, ...]) -> int:
        raise NotImplementedError

    def _pool(self, slot: Slot) -> Pool:
        return self._ranges.get(slot.pool) or POOLS[slot.pool]

    @property
    def derivation(self) -> tuple[int, ...]:
        """All decisions so far: the index of each alternative, then the index in its pool of each free word in it."""
        return tuple(self._trace)

    @property
    def log2_prob(self) -> float:
        """log2 of the exact probability of the decisions so far, a product of weight / total."""
        return fsum(_log2(weight) - _log2(total) for weight, total in self._odds)


class SplitMix64:
    """Integer random generator (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", fig. 2)."""

    def __init__(self, seed: int):
        self._state = seed & 0xFFFFFFFFFFFFFFFF

    def next(self) -> int:
        """Return the next 64 bits."""
        self._state = z = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """Return an integer in [0, n), exactly uniform: draws past the last multiple of n are rejected."""
        limit = (1 << 64) - (1 << 64) % n
        while (drawn := self.next()) >= limit:
            pass
        return drawn % n


class Author(Teller):
    """Generate a story: draw each decision and append its text."""

    def __init__(self, random: SplitMix64):
        super().__init__()
        self._random = random
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """The story so far."""
        return "".join(self._parts)

    def _say(self, gap: str, alternatives: tuple[Alternative, ...]) -> int:
        options = weighted(alternatives)
        total = sum(weight for weight, _ in options)
        left = self._random.below(total)
        chosen = 0
        while left >= options[chosen][0]:
            left -= options[chosen][0]
            chosen += 1
        weight, template = options[chosen]
        self._decide(chosen, weight, total)
        self._parts.append(gap)
        for part in compiled(template):
            self._parts.append(part if isinstance(part, str) else self._fill(part))
        return chosen

    def _decide(self, index: int, weight: int, total: int) -> None:
        self._trace.append(index)
        self._odds.append((weight, total))

    def _fill(self, slot: Slot) -> str:
        item = self._draw(slot) if slot.pool else self.state[slot.key]
        return item.forms[slot.agreeing(self.state)]

    def _draw(self, slot: Slot) -> Item:
        pool = self._pool(slot)
        banned = pool.places(self.state[key] for key in slot.unlike)
        total = len(pool.items) - len(banned)
        index = self._random.below(total)
        for place in banned:
            index += index >= place
        self._decide(index, 1, total)
        item = pool.items[index]
        if slot.key:
            self.state[slot.key] = item
        return item


@dataclass(frozen=True)
class Story:
    """A story, its exact log2 probability, its one derivation, and the name of its plot."""

    text: str
    log2_prob: float
    derivation: tuple[int, ...]
    plot: str
