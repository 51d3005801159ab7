"""Sentences in English and in Velan, a language made for this corpus: every sentence has exactly one translation.

Velan has words of its own, puts the verb last and modifiers of a noun elsewhere than English does, marks cases, and
lets adjectives, articles and verbs agree in class and number:

    order      time, subject, place, recipient, object, verb
    noun       [genitive] [relative clause] numeral noun adjective... article
    endings    vowel of the class (a or o), -i in the plural, consonant of the case
    verb       stem, tense (te, ne, ve), vowel of the subject's class, -i for a plural subject, -k in a relative clause

So the verb, the last word, agrees with a subject that any number of words may separate from it.
"""

from dataclasses import dataclass

from mlx_transformer.data.fables.teller import SplitMix64
from mlx_transformer.data.pairs import numbers

Pair = tuple[str, str]  # English, Velan

_CASES = {"nominative": "", "accusative": "n", "dative": "s", "locative": "r", "genitive": "l"}
_TENSES = {"past": "te", "present": "ne", "future": "ve"}

PEOPLE = [
    "king",
    "queen",
    "farmer",
    "teacher",
    "baker",
    "sailor",
    "doctor",
    "soldier",
    "child/children",
    "woman/women",
    "man/men",
    "girl",
    "boy",
    "friend",
    "uncle",
    "poet",
]
ANIMALS = ["dog", "cat", "horse", "wolf/wolves", "mouse/mice", "fox/foxes", "bird", "bear"]
THINGS = [
    "apple",
    "book",
    "letter",
    "lamp",
    "knife/knives",
    "key",
    "coat",
    "box/boxes",
    "map",
    "ring",
    "drum",
    "clock",
    "flower",
    "stone",
    "rope",
    "cup",
    "gift",
    "basket",
    "candle",
    "shoe",
]
PLACES = ["house", "garden", "forest", "village", "market", "river", "ship", "school", "tower", "kitchen"]
ADJECTIVES = [
    "old",
    "young",
    "red",
    "green",
    "small",
    "tall",
    "clever",
    "quiet",
    "heavy",
    "happy",
    "strange",
    "broken",
    "white",
    "proud",
]
TRANSITIVE = [
    "see/saw",
    "find/found",
    "carry/carried/carries",
    "hide/hid",
    "love/loved",
    "watch/watched/watches",
    "follow/followed",
    "need/needed",
    "hear/heard",
    "take/took",
    "wash/washed/washes",
    "forget/forgot",
]
DITRANSITIVE = ["give/gave", "show/showed", "sell/sold", "send/sent", "bring/brought"]
INTRANSITIVE = ["sleep/slept", "sing/sang", "wait/waited", "dance/danced", "sit/sat", "work/worked"]


@dataclass(frozen=True)
class Stem:
    """A word of both languages."""

    english: tuple[str, ...]  # singular and plural; base, past and third person; or one form
    velan: str
    vowel: str  # of its class


def _lexicon() -> dict[str, tuple[Stem, ...]]:
    """Give each English word a stem of two or three syllables; always the same ones."""
    random, taken = SplitMix64(2017), set()

    def stem() -> str:
        while True:
            drawn = "".join("bdfghklmprstvz"[random.below(14)] + "aeiou"[random.below(5)] for _ in range(2))
            word = drawn + "lmrtx"[random.below(5)]
            if word not in taken:
                taken.add(word)
                return word

    groups = {
        "people": PEOPLE,
        "animals": ANIMALS,
        "things": THINGS,
        "places": PLACES,
        "adjectives": ADJECTIVES,
        "transitive": TRANSITIVE,
        "ditransitive": DITRANSITIVE,
        "intransitive": INTRANSITIVE,
    }
    return {
        name: tuple(Stem(_forms(word, name), stem(), "ao"[random.below(2)]) for word in words)
        for name, words in groups.items()
    }


def _forms(word: str, group: str) -> tuple[str, ...]:
    first, *others = word.split("/")
    if group == "adjectives":
        return (first,)
    if group in ("people", "animals", "things", "places"):
        return first, *(others or [f"{first}s"])
    return first, *others, *([] if len(others) == 2 else [f"{first}s"])


LEXICON = _lexicon()
PREPOSITIONS = ("in", "near")  # Velan: the locative, with a word after the place for the second
AFTER_PLACE = {"in": "", "near": " peku"}


@dataclass(frozen=True)
class Noun:
    """A noun phrase in both languages, in its case, and what agrees with it."""

    english: str
    velan: str
    plural: bool
    vowel: str


class Speaker:
    """Draw sentences in both languages. depth: how deep relative clauses and genitives may be nested."""

    def __init__(self, random: SplitMix64) -> None:
        self.random = random

    def chance(self, percent: int) -> bool:
        return self.random.below(100) < percent

    def pick(self, *groups: str) -> Stem:
        stems = [stem for group in groups for stem in LEXICON[group]]
        return stems[self.random.below(len(stems))]

    def noun(self, case: str, depth: int, *groups: str) -> Noun:
        """Draw a noun phrase: article or numeral, adjectives, noun, a genitive or a relative clause."""
        stem, plural = self.pick(*groups), self.chance(35)
        ending = stem.vowel + ("i" if plural else "") + _CASES[case]
        english, velan = [stem.english[plural]], [stem.velan + ending]
        adjectives = [self.pick("adjectives") for _ in range(self.chance(40) + self.chance(12))]
        if len({adjective.velan for adjective in adjectives}) < len(adjectives):
            adjectives.pop()
        english[:0] = [adjective.english[0] for adjective in adjectives]
        velan += [adjective.velan + ending for adjective in reversed(adjectives)]
        if plural and self.chance(40):
            count = 2 + self.random.below(98)
            english.insert(0, numbers.number(count))
            velan.insert(0, str(count))
        elif plural or self.chance(60):
            english.insert(0, "the")
            velan.append("s" + ending)
        else:
            english.insert(0, "an" if english[0][0] in "aeiou" else "a")
        if depth and self.chance(25):
            clause = self.relative(stem, plural, depth - 1)
            english.append(clause[0])
            velan.insert(0, clause[1])
        elif depth and self.chance(20):
            owner = self.noun("genitive", depth - 1, "people", "animals")
            english.append(f"of {owner.english}")
            velan.insert(0, owner.velan)
        return Noun(" ".join(english), " ".join(velan), plural, stem.vowel)

    def relative(self, head: Stem, plural: bool, depth: int) -> Pair:
        """Draw a relative clause whose object, or for animate heads subject, is the head."""
        verb, tense = self.pick("transitive"), self.tense()
        animate = head in LEXICON["people"] or head in LEXICON["animals"]
        if animate and self.chance(50):
            other = self.noun("accusative", depth, "people", "animals", "things")
            english = f"that {_english_verb(verb, tense, plural)} {other.english}"
            return english, f"{other.velan} {_velan_verb(verb, tense, plural, head.vowel)}k"
        other = self.noun("nominative", depth, "people", "animals")
        english = f"that {other.english} {_english_verb(verb, tense, other.plural)}"
        return english, f"{other.velan} {_velan_verb(verb, tense, other.plural, other.vowel)}k"

    def tense(self) -> str:
        return tuple(_TENSES)[self.random.below(3)]

    def clause(self, depth: int) -> Pair:
        """Draw a main clause."""
        subject, tense = self.noun("nominative", depth, "people", "animals"), self.tense()
        kind = ("transitive", "transitive", "ditransitive", "intransitive")[self.random.below(4)]
        verb = self.pick(kind)
        english, velan = [subject.english, _english_verb(verb, tense, subject.plural)], []
        if kind != "intransitive":
            thing = self.noun("accusative", depth, *(("things",) if kind == "ditransitive" else ("things", "animals")))
            english.append(thing.english)
            velan.append(thing.velan)
        if kind == "ditransitive":
            recipient = self.noun("dative", 0, "people", "animals")
            english.append(f"to {recipient.english}")
            velan.insert(0, recipient.velan)
        if self.chance(50 if kind == "intransitive" else 25):
            place, preposition = self.noun("locative", 0, "places"), PREPOSITIONS[self.random.below(2)]
            english.append(f"{preposition} {place.english}")
            velan.insert(0, place.velan + AFTER_PLACE[preposition])
        velan.insert(0, subject.velan)
        if self.chance(12):
            hour, minute = self.random.below(24), 5 * self.random.below(12)
            said, digits = numbers.clock(hour, minute)
            english.append(f"at {said}")
            velan.insert(0, digits)
        velan.append(_velan_verb(verb, tense, subject.plural, subject.vowel))
        return " ".join(english), " ".join(velan)


def _english_verb(verb: Stem, tense: str, plural: bool) -> str:
    base, past, third = verb.english
    return {"past": past, "present": base if plural else third, "future": f"will {base}"}[tense]


def _velan_verb(verb: Stem, tense: str, plural: bool, vowel: str) -> str:
    return verb.velan + _TENSES[tense] + vowel + ("i" if plural else "")
