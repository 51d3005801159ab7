"""The built-in pairs: English <-> digits, and English -> Velan, each with one correct translation."""

from collections.abc import Iterator

from mlx_transformer.data.fables.teller import SplitMix64
from mlx_transformer.data.pairs import numbers
from mlx_transformer.data.pairs.language import Pair, Speaker

LONGEST = 14  # words of the longest English sentence, and
MOST_TERMS = 3  # terms of the longest sum, of every split but `longer`
LONGER = 24  # words of the longest sentence in `longer`, and
MORE_TERMS = 6  # terms


def draw(random: SplitMix64) -> Pair:
    """Draw a pair: two in three a sentence, else a number, date, time or sum, from words or from digits."""
    if random.below(3):
        return draw_sentence(random, 1, LONGEST)
    kind = random.below(4)
    if kind == 3:
        return either_way(numbers.draw_sum(random, 2 + random.below(MOST_TERMS - 1)), random)
    return either_way((numbers.draw_number, numbers.draw_date, numbers.draw_clock)[kind](random), random)


def draw_longer(random: SplitMix64) -> Pair:
    """Draw a pair that is longer than any that `draw` gives: nine in ten a sentence, else a sum."""
    if random.below(10):
        return draw_sentence(random, LONGEST + 1, LONGER)
    terms = MOST_TERMS + 1 + random.below(MORE_TERMS - MOST_TERMS)
    return either_way(numbers.draw_sum(random, terms), random)


def draw_sentence(random: SplitMix64, shortest: int, longest: int) -> Pair:
    """Draw a sentence of so many English words."""
    speaker = Speaker(random)
    while True:
        english, velan = speaker.clause(depth=2)
        if shortest <= len(english.split()) <= longest:
            return english, velan


def _is_small_number(pair: Pair) -> bool:
    return any(side.isdigit() and int(side) < 1000 for side in pair)


def either_way(pair: Pair, random: SplitMix64) -> Pair:
    """Return the pair, or with the same probability its reverse."""
    return pair if random.below(2) else pair[::-1]


def generate(counts: dict[str, int], seed: int = 0) -> Iterator[tuple[str, Pair]]:
    """Yield (split, pair) for so many pairs of each split; no source occurs twice, in one split or in two.

    A split named `longer` has the longer pairs. Numbers below a thousand are in `train` alone: they are too few to be
    held out, since the others are made of them. The same counts and seed give the same pairs.
    """
    seen: set[str] = set()
    for number, (split, count) in enumerate(counts.items()):
        random = SplitMix64(seed << 8 | number)
        left = count
        while left:
            pair = draw_longer(random) if split == "longer" else draw(random)
            if pair[0] not in seen and (split == "train" or not _is_small_number(pair)):
                seen.add(pair[0])
                left -= 1
                yield split, pair
