"""The interface of a task: texts with answers in brackets, levels of difficulty, and their known bounds."""

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from mlx_transformer.data.fables.teller import SplitMix64

T = TypeVar("T")
HELD_OUT = 250  # texts of each level that are no training text


@dataclass(frozen=True, kw_only=True)
class Level:
    """A difficulty. floor: accuracy of the best guess that does not solve the task; ceiling: the best possible one."""

    name: str
    size: int  # what `Task.example` makes it from: pairs, symbols, points, digits, objects
    kind: str = ""  # form of the task, where it has several
    trained: bool = True  # whether the training text has it; the others are longer or harder
    floor: float = 0.0
    ceiling: float = 1.0


@dataclass(frozen=True)
class Example:
    """Words of a text, and which of them are answers: those that the loss counts and the score compares."""

    words: tuple[str, ...]
    scored: tuple[bool, ...]

    @classmethod
    def read(cls, text: str) -> "Example":
        """Read a text whose answers stand in brackets: "2 + 3 = [5 .]"."""
        words, scored, inside = [], [], False
        for word in text.split():
            inside = inside or word.startswith("[")
            words.append(word.removeprefix("[").removesuffix("]"))
            scored.append(inside)
            inside = inside and not word.endswith("]")
        return cls(tuple(words), tuple(scored))

    @property
    def prompt(self) -> tuple[str, ...]:
        """The words before the first answer."""
        return self.words[: self.scored.index(True)]

    @property
    def rest(self) -> tuple[str, ...]:
        """The words from the first answer on."""
        return self.words[self.scored.index(True) :]


class Task(ABC):
    """Generated exercises with an exact score. Every draw comes from the seed: the same bytes on every machine.

    A text is words with one space between them; the answers stand in brackets, which the model never sees.
    """

    name: ClassVar[str]
    asks: ClassVar[str]  # in one sentence
    source: ClassVar[str]
    symbols: ClassVar[tuple[str, ...]]  # the vocabulary, without EOS
    levels: ClassVar[tuple[Level, ...]]  # those that are scored
    training: ClassVar[tuple[Level, ...] | None] = None  # those of the training text; None: all that are `trained`
    train_examples: ClassVar[int] = 20_000
    read_off: ClassVar[bool] = False  # answers are single words, each after the true text: one forward pass reads them
    end: ClassVar[str] = "."  # the word that ends an answer that is decoded
    patches: ClassVar[bool] = False  # whether words like #1a4 are patches of a picture
    tool: ClassVar[str | None] = None  # the runtime that answers calls while the model decodes

    @abstractmethod
    def example(self, random: SplitMix64, level: Level) -> str:
        """Draw one text, its answers in brackets."""

    def final(self, words: Sequence[str]) -> list[str]:
        """Return the part of an answer that the score compares: all of it, or what stands after the worked steps."""
        return list(words)

    def bounds(self, level: Level, examples: Sequence[Example]) -> dict[str, float]:
        """Return floor and ceiling of the accuracy on these examples, and further references by name."""
        return {"floor": level.floor, "ceiling": level.ceiling}

    @property
    def trained_levels(self) -> tuple[Level, ...]:
        """The levels of the training text, equally frequent."""
        return self.training or tuple(level for level in self.levels if level.trained)

    def held_out(self, level: Level, count: int = HELD_OUT) -> list[str]:
        """Return the first `count` held-out texts of a level, at most HELD_OUT, each different."""
        texts: dict[str, None] = {}
        for text in self._draws(f"held out: {level.name}", (level,)):
            texts[text] = None
            if len(texts) == min(count, HELD_OUT):
                break
        return list(texts)

    def train_texts(self, banned: frozenset[str]) -> Iterator[str]:
        """Yield the training texts: levels drawn at random, without the banned texts."""
        draws = self._draws("training", self.trained_levels)
        return itertools.islice((text for text in draws if text not in banned), self.train_examples)

    def _draws(self, stream: str, levels: Sequence[Level]) -> Iterator[str]:
        digest = hashlib.sha256(f"{self.name}: {stream}".encode()).digest()
        random = SplitMix64(int.from_bytes(digest[:8], "little"))
        while True:
            level = levels[random.below(len(levels))]
            yield self.example(random, level)


def sample(random: SplitMix64, items: Sequence[T], count: int) -> list[T]:
    """Draw `count` different items, in random order."""
    pool = list(items)
    for i in range(count):
        j = i + random.below(len(pool) - i)
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:count]


def between(random: SplitMix64, low: int, high: int) -> int:
    """Draw an integer from low to high, both included."""
    return low + random.below(high - low + 1)


def digits(number: int) -> str:
    """Write a number with a space between its digits: -120 -> "- 1 2 0"."""
    return " ".join(str(number))
