"""Parsing stories with the plots that generate them, and scoring the text of a model.

In a strict reading, a text parses if and only if an `Author` can write it; its derivation, and so its probability, is
recovered. In a loose reading, every word that the story's state determines (a name, a pronoun, a thing, a place, a
count) may be any other of its kind, and every branch that the state decides may be taken: the text is "grammatical".
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from mlx_transformer.data.fables.lexicon import ALL_ITEMS
from mlx_transformer.data.fables.plots import tell
from mlx_transformer.data.fables.teller import PRONOUNS, Alternative, Slot, Story, Teller, compiled, weighted
from mlx_transformer.data.fables.words import Item, Option, Pool

_MAX_READINGS = 64  # of a loose reading; a strict reading of a story needs one
GROUPS = ("names", "pronouns", "characters", "things", "places", "counts", "others")
_FORM_GROUPS = dict.fromkeys(PRONOUNS, "pronouns") | dict.fromkeys(("was", "are", "them"), "others")
_KIND_GROUPS = {
    **dict.fromkeys(("person", "petname", "nick"), "names"),
    **dict.fromkeys(("creature", "kin", "job", "pet", "insect"), "characters"),
    **dict.fromkeys(("spot", "place", "landmark", "house"), "places"),
    **dict.fromkeys(("hobby", "trait", "fear", "weekday"), "others"),
    "number": "counts",
}
_SENTENCE_END = re.compile(r"[.!?]\"?(?=\s+[A-Z\"]|$)")  # not: "Oh no!" cried Lily


class UnreadableError(Exception):
    """No alternative of a step continues the text."""


class Match(NamedTuple):
    """One way to match a step with the text."""

    end: int
    state: Mapping[str, Item]
    trace: tuple[int, ...]
    odds: tuple[tuple[int, int], ...]
    slips: int  # words other than the state determines
    bound: tuple["Bound", ...] = ()  # of a strict reading


class Bound(NamedTuple):
    """A word that the story before it determines: text[start:end], in one of its forms."""

    start: int
    end: int
    item: Item
    form: str

    @property
    def group(self) -> str:
        """What a model has to remember for it: one of GROUPS."""
        return _FORM_GROUPS.get(self.form.lower()) or _KIND_GROUPS.get(self.item.kind, "things")

    @property
    def rivals(self) -> tuple[str, ...]:
        """The other words of its kind, in the same form: each makes the story inconsistent."""
        options = _of_kind(self.item.kind, self.form).items
        return tuple(item.forms[self.form] for item in options if item.forms[self.form] != self.item.forms[self.form])


@cache
def _of_kind(kind: str, form: str) -> Pool:
    """Return all words of a kind, one for each distinct text of `form`."""
    unique: dict[str, Item] = {}
    for item in ALL_ITEMS:
        if item.kind == kind and form in item.forms:
            unique.setdefault(item.forms[form], item)
    return Pool(kind, tuple(unique.values()))


class Reader(Teller):
    """Recover a story's decisions from its text; `script` says step by step which of several matches to take."""

    def __init__(self, text: str, strict: bool, script: list[int]):
        super().__init__()
        self.text = text
        self.strict = strict
        self.at = 0
        self.furthest = 0  # end of the longest match so far
        self.slips = 0
        self.bound: list[Bound] = []
        self.taken: list[tuple[int, int]] = []  # (index of the match, number of matches) of each step so far
        self._script = script

    def _say(self, gap: str, alternatives: tuple[Alternative, ...]) -> int:
        matches = self._matches(gap, weighted(alternatives))
        if not matches:
            raise UnreadableError
        step = len(self.taken)
        which = self._script[step] if step < len(self._script) else 0
        self.taken.append((which, len(matches)))
        match = matches[which]
        self.at, self.state, self.slips = match.end, dict(match.state), self.slips + match.slips
        self._trace.extend(match.trace)
        self._odds.extend(match.odds)
        self.bound.extend(match.bound)
        return match.trace[0]

    def _matches(self, gap: str, options: list[tuple[int, str]]) -> list[Match]:
        if not self._literal(gap, self.at):
            return []
        total = sum(weight for weight, _ in options)
        matches: list[Match] = []
        for index, (weight, template) in enumerate(options):
            if weight or not self.strict:
                start = Match(self.at + len(gap), self.state, (index,), ((weight, total),), int(weight == 0))
                matches.extend(self._read(compiled(template), 0, start))
        return matches if len(matches) < 2 else sorted(matches, key=lambda match: match.slips)

    def _read(self, parts: tuple[str | Slot, ...], index: int, match: Match) -> Iterator[Match]:
        """Yield every match of the parts from `index` on with the text where `match` ends."""
        while index < len(parts):
            part = parts[index]
            if not isinstance(part, str):
                for longer in self._drawn(part, match) if part.pool else self._determined(part, match):
                    yield from self._read(parts, index + 1, longer)
                return
            if not self._literal(part, match.end):
                return
            match = match._replace(end=match.end + len(part))
            index += 1
        yield match

    def _literal(self, literal: str, at: int) -> bool:
        """Whether `literal` is at `at`; records how far it matches."""
        if self.text.startswith(literal, at):
            self.furthest = max(self.furthest, at + len(literal))
            return True
        if at + len(literal) > self.furthest:
            here = self.text[at : at + len(literal)]
            same = next((i for i, (a, b) in enumerate(zip(literal, here, strict=False)) if a != b), len(here))
            self.furthest = max(self.furthest, at + same)
        return False

    def _drawn(self, slot: Slot, match: Match) -> Iterator[Match]:
        """Yield a match for every free word that continues the text."""
        pool = self._pool(slot)
        banned = pool.places(match.state[key] for key in slot.unlike if key in match.state)
        odds = (*match.odds, (1, len(pool.items) - len(banned)))
        for text, item, place in self._options(pool if self.strict else pool.wide, slot.form, match.end):
            slipped = place in banned or item not in pool
            if not (slipped and self.strict):
                state = {**match.state, slot.key: item} if slot.key else match.state
                trace, slips = (*match.trace, place), match.slips + slipped
                yield match._replace(end=match.end + len(text), state=state, trace=trace, odds=odds, slips=slips)

    def _determined(self, slot: Slot, match: Match) -> Iterator[Match]:
        """Yield a match for the word that the state determines; in a loose reading, for any of its kind."""
        if slot.key not in match.state:  # only a loose reading enters a branch that never bound it
            return
        item = match.state[slot.key]
        form = slot.agreeing(match.state)
        if self.strict:
            if self._literal(item.forms[form], match.end):
                end = match.end + len(item.forms[form])
                yield match._replace(end=end, bound=(*match.bound, Bound(match.end, end, item, form)))
            return
        for text, other, _ in self._options(_of_kind(item.kind, form), form, match.end):
            # a wrong number replaces the right one from here on, so that its noun agrees with it
            state = {**match.state, slot.key: other} if item.kind == "number" else match.state
            slips = match.slips + (text != item.forms[form])
            yield match._replace(end=match.end + len(text), state=state, slips=slips)

    def _options(self, pool: Pool, form: str, at: int) -> Iterator[Option]:
        """Yield the words of a pool that are in the text at `at`."""
        for option in pool.starting(form, self.text[at : at + 1]):
            if self._literal(option.text, at):
                yield option


def _readings(text: str, strict: bool) -> Iterator[tuple[Reader, bool]]:
    """Yield readings depth-first, at most _MAX_READINGS: each reader, and whether the text is a whole story."""
    script: list[int] = []
    for _ in range(_MAX_READINGS):
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
    """Return all strict readings of a text: one for a story, none for anything else (never more: tested)."""
    return [
        Story(text, reader.log2_prob, reader.derivation, reader.plot)
        for reader, whole in _readings(text, strict=True)
        if whole
    ]


def parse(text: str) -> Story | None:
    """Return the story with this text, its exact log2 probability and its derivation; None if it is no story."""
    return next(iter(derivations(text.strip())), None)


def bound_words(text: str) -> list[Bound]:
    """Return the words of a story that it determines itself, in order; none for a text that is no story."""
    readings = _readings(text.strip(), strict=True)
    return next((reader.bound for reader, whole in readings if whole), [])


@dataclass(frozen=True)
class Score:
    """Scores of a text: whether it follows the grammar and its own story.

    A text cut off by a length limit is neither grammatical nor consistent, and `complete` is False: count such texts
    apart, or use their shares, which are of whole sentences only.
    """

    complete: bool  # False: no mistake up to the end of the text, but the story is unfinished
    grammatical: bool  # a whole story in a loose reading: names, things, places and counts may be wrong
    consistent: bool  # a whole story in a strict reading
    log2_prob: float | None  # of a consistent story
    slips: int | None  # words other than the story determines, in a grammatical text
    sentences: int  # number of whole sentences in the text
    grammatical_share: float  # share of the sentences before the first that fits no story, in a loose reading
    consistent_share: float  # the same in a strict reading


def score(text: str) -> Score:
    """Score a text that should be one story. Never fails, and takes bounded time on any text."""
    text = text.strip()
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
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
    """Return the first reading of the whole text or None, and the end of the longest match of any reading."""
    reach = 0
    for reader, whole in _readings(text, strict):
        reach = max(reach, reader.furthest)
        if whole:
            return reader, reach
    return None, reach
