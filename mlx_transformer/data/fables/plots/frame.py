"""The parts that plots share: the opening, the ending, and scenes within."""

from collections.abc import Callable
from typing import NamedTuple

from mlx_transformer.data.fables.lexicon import CREATURES
from mlx_transformer.data.fables.teller import Teller

DAY = "One {=sky} {=daypart},"


class Plot(NamedTuple):
    """A plot: the beginning of its first sentence, its continuations (unlike any other plot's), and the rest."""

    name: str
    opener: str
    leads: tuple[str, ...]
    body: Callable[[Teller], None]


PLOTS: dict[str, Plot] = {}


def plot(*leads: str, opener: str = DAY) -> Callable[[Callable[[Teller], None]], Callable[[Teller], None]]:
    """Register a function that generates the rest of a story as the plot of its name."""

    def register(body: Callable[[Teller], None]) -> Callable[[Teller], None]:
        PLOTS[body.__name__] = Plot(body.__name__, opener, leads, body)
        return body

    return register


def opening(t: Teller) -> None:
    """Introduce the hero: bind hero, who, trait, and one word that the ending repeats."""
    which = t.say(
        (3, "Once upon a time, there was {trait=good.a} and {=good!trait} girl named {hero=girl}."),
        (3, "Once upon a time, there was {trait=good.a} and {=good!trait} boy named {hero=boy}."),
        (4, "Once upon a time, there was {trait=good.a} and {=good!trait} {who=animal} named {hero=name}."),
        (2, "{hero=name} was {trait=good.a} and {=good!trait} {who=animal}."),
    )
    if which < 2:
        t.let(who=CREATURES[("girl", "boy")[which]])
    t.say(
        "{He} lived in {=look.a} {hue=color} {house=house} {=some_outdoors.at}.",
        "{His} best friend was {=look.a} {hue=color} {pet=pet} called {petname=petname}.",
        "{He} loved {hobby=hobby.ing} and {=some_hobby!hobby.ing} with {his} {=good} {=kin}.",
        "{He} always wore {=look.a} {hue=color} {wear=wear} from {his} {=kin}.",
        "{His} {=good} {kin=kin} called {him} {nick=nick}.",
        "{His} favorite food was {dish=dish} with {=tasty} {=some_fruit.many}.",
    )


def scenery(t: Teller) -> None:
    """Describe the surroundings."""
    t.say(
        "{=look.A} {=some_color} {=bird} sang {=tone} in {=tree.a}.",
        "{=look.A} {=some_color} {=some_insect} sat on {=some_color.a} {=some_flower}.",
        "The air smelled of {=some_flower.many} and {=tasty} {=some_treat.many}.",
        "{=good.A} {=some_job} {=went} by with {=look.a} {=some_color} {=some_instrument}.",
        "{=some_color.A} {=some_vehicle} with {=good.a} {=some_animal} in it went by {=how}.",
    )


def meet(t: Teller) -> None:
    """Introduce a second character: bind friend and pal."""
    t.say(
        "{hero} met {=good.a} {pal=animal!who} named {friend=name!hero} {=some_place.at}.",
        "{friend=name!hero}, {=good.a} {pal=animal!who}, {=went} by with {=look.a} {=some_color} {=some_trinket}.",
        "{friend=name!hero}, {=good.a} and {=good} {pal=animal!who}, came {=how} to see {hero}.",
    )


def worry(t: Teller) -> None:
    """Describe the hero's worry."""
    t.say(
        '"{=ohno}!" {=said} {hero} {=tone}, feeling {=sad}.',
        "{hero} felt {=sad} and {=went} to {his} {=good} {=kin}.",
        "{hero} felt {woe=sad} and {=sad!woe} and sat down {=some_outside}.",
    )


def search(t: Teller) -> None:
    """Let the hero search in the wrong places."""
    t.say(
        "{hero} {=how} looked {=some_outside} and found {=look.a} {=some_color} {=some_trinket}.",
        "{hero} looked {=some_outside}, but there was only {=look.a} {=some_color} {=some_insect}.",
        "{hero} {=how} asked {=good.a} {=some_job} and {=bad.a} {=some_animal}.",
    )


def thanks(t: Teller) -> None:
    """Let the friend thank the hero."""
    t.say(
        '"Thank you, {hero}," {=said} {friend} {=tone}. "You are {=good.a} {who}."',
        "The {=glad} {pal} gave {hero} {=look.a} {=some_color} {=some_trinket}.",
        '"{=hooray}!" {=said} {friend} {=tone}. "Now let us try {=some_hobby.ing}."',
        "{hero} and {friend} were {=glad} and ate {=tasty} {=some_treat.many} {=some_outside}.",
    )


def moral(t: Teller) -> None:
    """Praise the hero's trait."""
    t.say(
        "{His} {=good} {=kin} was {=glad} to have such {trait.a} {who}.",
        "No {who} {=some_place.at} was as {trait} as {hero}.",
        '{=good.A} {=some_job} {=said} {=tone}, "What {trait.a} {who}!"',
    )


def ending(t: Teller) -> None:
    """End the story with a reference to what the opening says about the hero."""
    home, pet, hobby, nick, dish = "house" in t, "petname" in t, "hobby" in t, "nick" in t, "dish" in t
    wear = not (home or pet or hobby or nick or dish)
    t.say(
        (home, "Then {hero} {=went} {=how} home to the {hue} {house} and felt {=glad}."),
        (home, "Back at the {hue} {house}, {hero} ate {=tasty} {=some_treat.many} {=some_indoors}."),
        (pet, "At bedtime, {hero} told {petname} the {hue} {pet} all about the {=sky} day."),
        (pet, "{hero} {=went} home {=how}, and {petname} the {hue} {pet} felt {=glad}."),
        (hobby, "The next {=daypart}, {hero} went back to {hobby.ing} with {=good.a} {=some_job}."),
        (hobby, "Then {hero} and {his} {=good} {=kin} {hobby.ed} {=how}."),
        (wear, "{hero} put the {hue} {wear} {=some_indoors} and slept {=how}."),
        (wear, "Then {hero} put on the {hue} {wear} and {=went} home, feeling {=glad}."),
        (nick, '"Well done, {nick}," {=said} {his} {kin} with {=smile.a} smile.'),
        (nick, '"You are so {=good}, {nick}," {=said} {his} {kin} {=tone}.'),
        (dish, "For supper, {hero} had {=look.a} {=some_color} bowl of {dish}."),
        (dish, "They all ate {dish} {=some_place.at} and felt {mood=glad} and {=glad!mood}."),
    )
