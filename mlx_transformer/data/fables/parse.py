"""Reading stories: the same plots that write them, run against a text; and the scores of a text by a model.

Strictly read, a text parses if and only if an `Author` can write it; its derivation, and so its probability, is
recovered. Loosely read, every word that the story's state demands (a name, a pronoun, a thing, a place, a count) may be
any other of its kind, and every branch that the state decides may be taken: that is what "grammatical" means here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from mlx_transformer.data.fables.lexicon import ALL_ITEMS
from mlx_transformer.data.fables.plots import tell
from mlx_transformer.data.fables.teller import Alternative, Slot, Story, Teller, compiled, weighted
from mlx_transformer.data.fables.words import Item, Option, Pool

_MAX_READINGS = 64  # a loose reading may have to try several; a story of the corpus is read strictly in one
_SENTENCE_END = re.compile(r"[.!?]\"?(?=\s+[A-Z\"]|$)")  # not: "Oh no!" cried Lily


class UnreadableError(Exception):
    """No alternative of a step goes on with the text."""


class Match(NamedTuple):
    """One way in which a step reads the text."""

    end: int
    state: Mapping[str, Item]
    trace: tuple[int, ...]
    odds: tuple[tuple[int, int], ...]
    slips: int  # words that are not those the state demands


@cache
def _of_kind(kind: str, form: str) -> Pool:
    """All words of a kind, one for each different text of `form`."""
    unique: dict[str, Item] = {}
    for item in ALL_ITEMS:
        if item.kind == kind and form in item.forms:
            unique.setdefault(item.forms[form], item)
    return Pool(kind, tuple(unique.values()))


class Reader(Teller):
    """A teller that finds its decisions in a text; where several fit, `script` says which to take, step by step."""

    def __init__(self, text: str, strict: bool, script: list[int]):
        super().__init__()
        self.text = text
        self.strict = strict
        self.at = 0
        self.furthest = 0  # where the best attempt stopped understanding
        self.slips = 0
        self.taken: list[tuple[int, int]] = []  # (which match, of how many), for each step so far
        self._script = script

    def _say(self, gap: str, alternatives: tuple[Alternative, ...]) -> int:
        found = self._matches(gap, weighted(alternatives))
        if not found:
            raise UnreadableError
        step = len(self.taken)
        which = self._script[step] if step < len(self._script) else 0
        self.taken.append((which, len(found)))
        match = found[which]
        self.at, self.state, self.slips = match.end, dict(match.state), self.slips + match.slips
        self._trace.extend(match.trace)
        self._odds.extend(match.odds)
        return match.trace[0]

    def _matches(self, gap: str, options: list[tuple[int, str]]) -> list[Match]:
        if not self._literal(gap, self.at):
            return []
        total = sum(weight for weight, _ in options)
        found: list[Match] = []
        for index, (weight, template) in enumerate(options):
            if weight or not self.strict:
                start = Match(self.at + len(gap), self.state, (index,), ((weight, total),), int(weight == 0))
                found.extend(self._read(compiled(template), 0, start))
        return found if len(found) < 2 else sorted(found, key=lambda match: match.slips)

    def _read(self, pieces: tuple[str | Slot, ...], index: int, match: Match) -> Iterator[Match]:
        """Every way in which the pieces from `index` on read the text where `match` ends."""
        while index < len(pieces):
            piece = pieces[index]
            if not isinstance(piece, str):
                for longer in self._drawn(piece, match) if piece.pool else self._demanded(piece, match):
                    yield from self._read(pieces, index + 1, longer)
                return
            if not self._literal(piece, match.end):
                return
            match = match._replace(end=match.end + len(piece))
            index += 1
        yield match

    def _literal(self, literal: str, at: int) -> bool:
        if self.text.startswith(literal, at):
            self.furthest = max(self.furthest, at + len(literal))
            return True
        if at + len(literal) > self.furthest:
            here = self.text[at : at + len(literal)]
            same = next((i for i, (a, b) in enumerate(zip(literal, here, strict=False)) if a != b), len(here))
            self.furthest = max(self.furthest, at + same)
        return False

    def _drawn(self, slot: Slot, match: Match) -> Iterator[Match]:
        """Every free word that the text goes on with."""
        pool = self._pool(slot)
        banned = pool.places(match.state[key] for key in slot.unlike if key in match.state)
        odds = (*match.odds, (1, len(pool.items) - len(banned)))
        for text, item, place in self._heard(pool if self.strict else pool.wide, slot.form, match.end):
            slipped = place in banned or item not in pool
            if not (slipped and self.strict):
                state = {**match.state, slot.key: item} if slot.key else match.state
                yield Match(match.end + len(text), state, (*match.trace, place), odds, match.slips + slipped)

    def _demanded(self, slot: Slot, match: Match) -> Iterator[Match]:
        """The word that the state demands; read loosely, any of its kind."""
        if slot.key not in match.state:  # only a loose reader gets into a branch that never bound it
            return
        item = match.state[slot.key]
        form = slot.agreeing(match.state)
        if self.strict:
            if self._literal(item.forms[form], match.end):
                yield match._replace(end=match.end + len(item.forms[form]))
            return
        for text, heard, _ in self._heard(_of_kind(item.kind, form), form, match.end):
            # a wrong number is believed from here on, so that its noun agrees with it
            state = {**match.state, slot.key: heard} if item.kind == "number" else match.state
            slips = match.slips + (text != item.forms[form])
            yield match._replace(end=match.end + len(text), state=state, slips=slips)

    def _heard(self, pool: Pool, form: str, at: int) -> Iterator[Option]:
        """The words of a pool that stand at `at`."""
        for option in pool.starting(form, self.text[at : at + 1]):
            if self._literal(option.text, at):
                yield option


def _readings(text: str, strict: bool, limit: int = _MAX_READINGS) -> Iterator[tuple[Reader, bool]]:
    """Depth-first over all ways to read the text: each reader, and whether it read a whole story; at most `limit`."""
    script: list[int] = []
    for _ in range(limit):
        reader = Reader(text, strict, script)
        try:
            tell(reader)
            whole = reader.at == len(text)
        except UnreadableError:
            whole = False
        yield reader, whole
        taken = reader.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        script = [which for which, _ in taken[:-1]] + [taken[-1][0] + 1]


def derivations(text: str) -> list[Story]:
    """All strict readings of a text: one for a story, none for anything else (never more: a tested property)."""
    return [
        Story(text, reader.log2_prob, reader.derivation, reader.plot)
        for reader, whole in _readings(text, strict=True)
        if whole
    ]


def parse(text: str) -> Story | None:
    """The story that this text is, with its exact log2 probability and its one derivation; None if it is not one."""
    return next(iter(derivations(text.strip())), None)


@dataclass(frozen=True)
class Score:
    """How well a text keeps to the grammar and to its own story.

    A text cut off by a length limit is neither grammatical nor consistent, and `complete` is False: count such texts
    apart, or judge them by their shares, which look only at whole sentences.
    """

    complete: bool  # False: no mistake up to the end of the text, but the story was not over
    grammatical: bool  # a whole story, were its names, things, places and counts others
    consistent: bool  # a whole story with the right ones
    log2_prob: float | None  # of a consistent story
    slips: int | None  # words other than those the story demanded, in a grammatical text
    sentences: int  # whole sentences in the text
    grammatical_share: float  # of them, those before the first that fits no story, loosely read
    consistent_share: float  # ... strictly read


def score(text: str) -> Score:
    """Score a text that should be one story; never fails, and takes bounded time on any text."""
    text = text.strip()
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    strict, strict_reach = _best(text, strict=True)
    loose, loose_reach = (strict, strict_reach) if strict else _best(text, strict=False)
    share = [sum(end <= reach for end in ends) / len(ends) if ends else 0.0 for reach in (loose_reach, strict_reach)]
    return Score(
        complete=loose is not None or loose_reach < len(text),
        grammatical=loose is not None,
        consistent=strict is not None,
        log2_prob=strict.log2_prob if strict else None,
        slips=loose.slips if loose else None,
        sentences=len(ends),
        grammatical_share=share[0],
        consistent_share=share[1],
    )


def _best(text: str, strict: bool) -> tuple[Reader | None, int]:
    """The first reading of the whole text (None if there is none), and how far the best attempt understood it."""
    reach = 0
    for reader, whole in _readings(text, strict):
        reach = max(reach, reader.furthest)
        if whole:
            return reader, reach
    return None, reach
