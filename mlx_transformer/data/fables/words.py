"""Words: items with their forms, and the pools of them that slots draw from."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Item:
    """A word of one kind and its forms; form "" is the plain one, a capitalized form name gives a capital letter."""

    __slots__ = ("forms", "kind", "value")

    def __init__(self, kind: str, forms: Mapping[str, str], value: int = 0):
        self.kind = kind
        self.value = value
        self.forms = dict(forms)
        self.forms.update({(name or "cap").capitalize(): text[:1].upper() + text[1:] for name, text in forms.items()})

    def __repr__(self) -> str:
        return f"<{self.kind} {self.forms['']}>"


class Option(NamedTuple):
    """One filling of a slot: its text, the word, and the word's index in its pool."""

    text: str
    item: Item
    place: int


class Pool:
    """Words drawn with equal weight; `wide` is the pool that a loose reading accepts instead."""

    def __init__(self, name: str, items: tuple[Item, ...], wide: "Pool | None" = None):
        self.name = name
        self.items = items
        self.wide = wide or self
        self._place = {item: index for index, item in enumerate(items)}
        self._by_initial: dict[str, dict[str, list[Option]]] = {}

    def __contains__(self, item: Item) -> bool:
        return item in self._place

    def places(self, items: Iterable[Item]) -> list[int]:
        """Return the sorted indices of those of `items` that are in the pool."""
        return sorted({self._place[item] for item in items if item in self._place})

    def starting(self, form: str, initial: str) -> list[Option]:
        """Return the words whose `form` begins with the character `initial`."""
        if form not in self._by_initial:
            index: dict[str, list[Option]] = {}
            for place, item in enumerate(self.items):
                text = item.forms[form]
                index.setdefault(text[0], []).append(Option(text, item, place))
            self._by_initial[form] = index
        return self._by_initial[form].get(initial, [])


def split(words: str) -> list[str]:
    """Return the words of a comma-separated list."""
    return [" ".join(word.split()) for word in words.split(",")]


_IRREGULAR_PLURALS = dict(
    pair.split("/")
    for pair in split(
        """mouse/mice, goose/geese, sheep/sheep, deer/deer, goldfish/goldfish, bison/bison, wolf/wolves, calf/calves,
        scarf/scarves, potato/potatoes, tomato/tomatoes, mango/mangoes, ox/oxen"""
    )
)


def article(word: str) -> str:
    """Return the word with its "a" or "an"."""
    vowel = word[0] in "aeiou" and not word.startswith(("uni", "use", "uku"))
    return ("an " if vowel or word.startswith(("honest", "honor")) else "a ") + word


def plural(word: str) -> str:
    """Return the plural of a noun (of its last word, if it has several)."""
    head, space, last = word.rpartition(" ")
    if last in _IRREGULAR_PLURALS:
        many = _IRREGULAR_PLURALS[last]
    elif last.endswith("y") and last[-2] not in "aeiou":
        many = last[:-1] + "ies"
    else:
        many = last + ("es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s")
    return head + space + many


def plain(kind: str, words: str) -> list[Item]:
    """Make words with one form only."""
    return [Item(kind, {"": word}) for word in split(words)]


def adjectives(kind: str, words: str) -> list[Item]:
    """Make words with the forms "" and "a" (with its article)."""
    return [Item(kind, {"": word, "a": article(word)}) for word in split(words)]


def nouns(kind: str, words: str) -> list[Item]:
    """Make words with the forms "" (hen), "a" (a hen), "many" (hens)."""
    return [Item(kind, {"": word, "a": article(word), "many": plural(word)}) for word in split(words)]


def places(words: str) -> list[Item]:
    """Make places from "in the garden": forms "" (garden), "at" (in the garden)."""
    return [Item("place", {"": phrase.split(" the ")[1], "at": phrase}) for phrase in split(words)]


def verbs(kind: str, words: str) -> list[Item]:
    """Make verb phrases from "climb/climbed/climbing trees": forms "" (climb trees), "ed", "ing"."""
    items = []
    for phrase in split(words):
        verb, space, rest = phrase.partition(" ")
        forms = zip(("", "ed", "ing"), verb.split("/"), strict=True)
        items.append(Item(kind, {name: form + space + rest for name, form in forms}))
    return items


def mixes(words: str) -> list[Item]:
    """Make colors of paint from "red yellow orange": forms "" (orange), "a", "one" (red), "two" (yellow)."""
    colors = [line.split() for line in split(words)]
    return [Item("mix", {"": made, "a": article(made), "one": one, "two": two}) for one, two, made in colors]


def people(kind: str, pronouns: str, words: str) -> list[Item]:
    """Make names or kin with their pronouns, given as "she her her"."""
    forms = dict(zip(("he", "him", "his"), pronouns.split(), strict=True))
    return [Item(kind, {"": word, **forms}) for word in split(words)]
