"""Plots with arithmetic: things are given, lost, found, and counted."""

from mlx_transformer.data.fables.lexicon import NOUNS
from mlx_transformer.data.fables.plots.frame import meet, moral, plot, search, thanks, worry
from mlx_transformer.data.fables.teller import Teller


def _take_some(t: Teller, *alternatives: str) -> None:
    """Remove `k` (from the pool `few`) of the `n` things, and bind the number that is `left`."""
    t.between("few", 1, t["n"].value - 1)
    t.say(*alternatives)
    t.count(left=t["n"].value - t["k"].value)


@plot(
    "{hero} picked {n=several} {=tasty} {x=fruit.many} {=some_outdoors.at}.",
    "{hero} {=went} {=how} home with {n=several} {=tasty} {x=fruit.many}.",
)
def sharing(t: Teller) -> None:
    meet(t)
    t.say(
        '"May I have some {x.many}?" {=asked} the {=sad} {pal} {=tone}.',
        '"I have had only {=some_dish} and {=tasty} {=some_vegetable.many}," {=said} {friend} {=tone}.',
    )
    _take_some(
        t,
        "{hero} {=how} gave {friend} {k=few} of the {x.many}.",
        "So {hero} put {k=few#x} into {=look.a} {=some_color} {=container} for the {pal}.",
    )
    t.say("Now {hero} had {left#x} left.", '"And I have {left#x} left," {=said} {hero} {=tone}.')
    thanks(t)


@plot(
    "{hero} put {n=several} {=look} {=some_color} {x=trinket.many} in {his} pocket.",
    "{hero} carried {n=several} {=look} {=some_color} {x=trinket.many} {=some_place.at}.",
)
def hole_in_the_pocket(t: Teller) -> None:
    _take_some(
        t,
        "But {k=few} of the {x.many} fell through {=look.a} hole {=some_outside}.",
        "As {hero} {=went} {=how} past {=tree.a}, {k=few#x} fell out.",
    )
    t.say(
        "Now there {left.was} only {left#x} left.",
        '"Now I have only {left#x}," {=said} {hero} {=tone}.',
    )
    t.say(
        "But {friend=name!hero}, {=good.a} {pal=animal!who}, found {k#x} {=some_outside}, so {hero} had {n} again.",
        "Then {friend=name!hero} the {=good} {pal=animal!who} {=how} picked up {k#x}, and {hero} had {n} again.",
    )
    thanks(t)


@plot(
    "{hero} found {n=several} {=look} {tint=color} eggs {=some_outside}.",
    "{hero} saw {n=several} {tint=color} eggs in {=look.a} nest {=some_place.at}.",
)
def nest(t: Teller) -> None:
    t.let(egg=NOUNS["egg"], bird=NOUNS["bird"])
    t.say(
        '"I will keep the {tint} eggs warm," {=said} {hero} {=tone}.',
        "{hero} {=how} put {=look.a} {=some_color} {=some_wear} around the {tint} eggs.",
    )
    _take_some(t, "On {=weekday}, {k=few} of the {tint} eggs opened {=how}.")
    t.say("There {left.was} still {left#egg} to wait for.", '"Now only {left#egg} to go," {=said} {hero} {=tone}.')
    t.say(
        "By {=weekday}, {n#bird} sat there and wanted {=tasty} {=some_fruit.many}.",
        "By {=weekday}, {n#bird} were hopping {=how} {=some_place.at}.",
    )
    moral(t)


@plot(
    "{hero} and {his} {=good} {=kin} baked {n=several} {=tasty} {x=treat.many}.",
    "{hero} made {n=several} {x=treat.many} with {=tasty} {=some_fruit.many} and {=some_dish}.",
)
def baking(t: Teller) -> None:
    t.say("They were for {friend=name!hero}, {=good.a} and {=good} {pal=animal!who} {=some_place.at}.")
    _take_some(
        t,
        "But {hero} was so hungry that {he} {=how} ate {k=few} of the {x.many}.",
        "But {=bad.a} {=some_color} {=bird} took {k=few} of the {x.many} {=how}.",
    )
    worry(t)
    t.say(
        "Now there {left.was} only {left#x} left for {friend}.", "Only {left#x} {left.was} left for the {=good} {pal}."
    )
    t.say(
        '"{left.Cap} {left.are} plenty for me," {=said} {friend} {=tone}.',
        '"Then let us share {left#x}," {=said} the {pal} with {=smile.a} smile.',
    )


@plot(
    "{hero} got {n=several} {tint=color} balloons from {=good.a} {=some_job}.",
    "{hero} bought {n=several} {tint=color} balloons {=some_place.at}.",
)
def balloons(t: Teller) -> None:
    t.let(balloon=NOUNS["balloon"])
    _take_some(
        t,
        "But the wind {=how} took {k=few} of the {tint} balloons over {=look.a} {=some_landmark}.",
        "But {hero} {=went} too near {=look.a} {=tree}, and {k=few#balloon} went pop.",
    )
    meet(t)
    t.say(
        "The {pal} had never had {tint.a} balloon, so {hero} gave {friend.him} {left#balloon}.",
        '"You may have {left#balloon} from me, {friend}," {=said} {hero} {=tone}.',
    )
    thanks(t)


@plot(
    "{hero} found {a=small} {=look} {=some_color} {x=trinket.many} {=some_place.at}.",
    "{hero} got {a=small} {=look} {x=trinket.many} from {=good.a} {=some_job}.",
    opener="On {d1=weekday},",
)
def collecting(t: Teller) -> None:
    t.say(
        "On {d2=weekday!d1}, {hero} found {b=small} more {=some_outside}.",
        "On {d2=weekday!d1}, {his} {=good} {=kin} gave {him} {b=small} more.",
    )
    t.count(total=t["a"].value + t["b"].value)
    meet(t)
    t.say(
        '"How many {=look} {x.many} do you have?" {=asked} {friend} {=tone}.',
        '"What {=look} {x.many}! How many are there?" {=asked} the {pal}.',
    )
    t.say('"{a.Cap} from {d1} and {b} from {d2}," {=said} {hero}, "so I have {total#x}."')


@plot(
    "{hero} took {n=several} coins and {=went} out to buy {=look.a} {x=toy}.",
    "{hero} had {n=several} coins and wanted {=look.a} {=some_color} {x=toy}.",
)
def shopping(t: Teller) -> None:
    t.let(coin=NOUNS["coin"])
    t.say(
        "{=good.A} {seller=job} {=some_place.at} had {=look.a} {x}.",
        "{hero} saw {x.a} in the {=look} {=some_vehicle} of {=good.a} {seller=job}.",
    )
    _take_some(
        t,
        '"The {x} costs {k=few#coin}," {=said} the {seller} {=tone}.',
        '"You can have the {x} for {k=few#coin}," {=said} the {seller} with {=smile.a} smile.',
    )
    t.say("{hero} {=how} paid and had {left#coin} left.", "Now {hero} had {left#coin} left in {=look.a} {=container}.")
    meet(t)
    t.say(
        '"May I play with your {x} too?" {=asked} {friend} {=tone}.',
        "{hero} let the {=sad} {pal} play with the {x} {=some_place.at}.",
    )


@plot(
    "{hero} met {=sad.a} and {=sad} mother duck {=some_place.at}.",
    "{=sad.a} and {=sad} mother duck {=went} up to {hero}.",
)
def ducklings(t: Teller) -> None:
    t.let(duckling=NOUNS["duckling"])
    t.say(
        '"I had {n=several#duckling}," she {=said} {=tone},',
        '"I left {n=several#duckling} {=some_outside}," she {=said},',
    )
    t.between("few", 1, t["n"].value - 1)
    t.say('"but now I can count only {left=few}."', '"and now there {left=few.are} only {left}."')
    t.count(k=t["n"].value - t["left"].value)
    t.say(
        '"Then {k#duckling} {k.are} lost," {=said} {hero} {=tone}.',
        '"I will find {k#duckling} for you," {=said} {hero} {=tone}.',
    )
    search(t)
    t.say(
        "At last {hero} found {k#duckling} {=some_outside}.",
        "There {k.was} {k#duckling} behind {=look.a} {=some_color} {=some_landmark}!",
    )
    t.say("Now the {=glad} mother had all {n} again.", "Then the {=glad} mother counted {n} again.")


@plot(
    "{hero} was {n=several} years old and had {=look.a} party {=some_place.at}.",
    "{hero} turned {n=several} and got {=look.a} {=some_prize} from {his} {=good} {=kin}.",
)
def birthday(t: Teller) -> None:
    t.count(next=t["n"].value + 1)
    t.say(
        "There was {=tasty.a} cake with {n} {=look} {=some_color} candles.",
        "{=good.A} {=some_job} made {=tasty.a} {=some_color} cake with {n} candles.",
    )
    t.say(
        "{hero} {=how} blew them out and wished for {=look.a} {x=toy}.",
        '"I wish for {=look.a} {x=toy}," {=said} {hero} {=tone}.',
    )
    t.say(
        "{friend=name!hero} had {=look.a} {=some_color} box, and in it was {=some_color.a} {x}.",
        '"This is for you, {hero}," {=said} {friend=name!hero} {=tone}. It was {=some_color.a} {x}.',
    )
    t.say(
        '"When I am {next}, I will wish for {=look.a} {=some_prize}," {=said} {hero}.',
        '"Next year you will be {next}," {=said} {friend} {=tone}.',
    )


@plot(
    "{hero} and {friend=name!hero} the {=good} {pal=animal!who} found {n=even} {=look} {x=trinket.many}.",
    "{hero} dug up {n=even} {=look} {x=trinket.many} with {friend=name!hero} the {=good} {pal=animal!who}.",
)
def equal_parts(t: Teller) -> None:
    t.count(half=t["n"].value // 2)
    t.say(
        '"The {=look} {x.many} are all mine!" {=said} {friend} {=tone}.',
        '"I saw the {x.many} first," {=said} the {pal}, who could be {=bad}.',
    )
    t.say(
        '"There are {n} {x.many}," {=said} {=good.a} {=some_job} {=tone}. "How many is half?"',
        '"You can both have half of the {n} {x.many}," {=said} {=good.a} {=some_job} {=tone}.',
    )
    t.say(
        '"{half.Cap} for {friend} and {half} for me," {=said} {hero} {=tone}.',
        "So {friend} {=how} took {half#x}, and {hero} had {half} as well.",
    )
    moral(t)


@plot(
    "{hero} planted {n=several} {x=flower} seeds in {=look.a} {=some_color} {=container}.",
    "{hero} got {n=several} {x=flower} seeds from {=good.a} {=some_job}.",
)
def seeds(t: Teller) -> None:
    t.let(seed=NOUNS["seed"])
    t.say(
        "Every {=daypart}, {hero} gave the {x} seeds water from {=look.a} {=some_color} {=container}.",
        "{hero} sang {=tone} to the {x} seeds {=some_outdoors.at}, and it rained on {=weekday}.",
    )
    _take_some(t, "But {=bad.a} {=some_color} {=bird} {=how} ate {k=few} of the {x} seeds.")
    worry(t)
    t.say(
        '"Now there {left.are} only {left#seed} left," {=said} {hero} {=tone}.',
        "Now there {left.was} only {left#seed} in the {=look} {=some_color} pot.",
    )
    t.say(
        "But by {=weekday}, {left#x} grew there for all to see.",
        "But one {=sky} {=daypart}, {hero} counted {left#x}.",
    )
