"""Plots in which something is made, wished for or dreamed."""

from mlx_transformer.data.fables.lexicon import NOUNS
from mlx_transformer.data.fables.plots.frame import meet, plot
from mlx_transformer.data.fables.teller import Teller


@plot(
    "{hero} built {=look.a} {make=build} with {friend=name!hero} {spot=place.at}.",
    "{hero} and {friend=name!hero} were making {=look.a} {make=build} {spot=place.at}.",
)
def building(t: Teller) -> None:
    t.say(
        "They {=how} put {=look.a} {tint=color} {x=wear} on top of the {make}.",
        "On top of the {make} they put {=look.a} {tint=color} {x=prize}.",
    )
    t.say(
        "Then {=bad.a} and {=bad} {=some_animal!who} fell on the {make}, and it broke.",
        "Then the {=sky} wind came, and the {make} {=how} fell down.",
    )
    t.say(
        "But {friend} {=how} pulled the {tint} {x} out of the mess.",
        '"The {tint} {x} is still {=look}," {=said} {friend} {=tone}.',
    )
    t.say(
        "So they built {=look.a} new {make} {spot.at}.", '"Let us build {=look.a} new {make}," {=said} {hero} {=tone}.'
    )
    t.say("Soon the {tint} {x} was on top of the {make} again.", "Then {hero} {=how} put the {tint} {x} back on top.")


@plot(
    "{hero} caught {=look.a} {tint=color} fish {=some_place.at}.",
    "{hero} rubbed {=look.a} {=some_prize}, and {tint=color.a} fish came out.",
)
def wishes(t: Teller) -> None:
    t.let(wish=NOUNS["wish"])
    t.say(
        '"You may have {n=small} wishes, {=good} {who}," {=said} the fish {=tone}.',
        '"I will give you {n=small#wish}," {=said} the {tint} fish {=tone}.',
    )
    t.count(left=t["n"].value - 1)
    t.say(
        "First, {hero} wished for {=look.a} {=some_color} {=some_toy}.",
        '"I wish for {=tasty} {=some_treat.many}," {=said} {hero} {=tone}.',
    )
    t.say(
        '"Now you have {left#wish} left," {=said} the {tint} fish {=tone}.',
        '"That leaves {left#wish}," {=said} the {=good} fish {=tone}.',
    )
    t.say(
        "Then {hero} wished for {=look.a} {x=prize} for {his} {helper=kin}.",
        '"My {=good} {helper=kin} needs {=look.a} {x=prize}," {=said} {hero} {=tone}.',
    )
    t.count(left=t["left"].value - 1)
    t.say(
        "There {left.was} {left#wish} left, but {hero} felt {=glad}.",
        '"That leaves {left#wish}, but are you not {=glad} now?" {=asked} the fish.',
    )


@plot(
    "{hero} found {=look.a} {tint=color} magic brush {spot=outside}.",
    "there was {=look.a} {tint=color} magic brush {spot=outside}, and {hero} took it.",
)
def magic_brush(t: Teller) -> None:
    t.say(
        "{hero} {=how} painted {=tasty.a} {x=fruit}, and it became real.",
        "{hero} {=how} painted {=some_color.a} {x=fruit}, and out it fell.",
    )
    t.say(
        '"{=hooray}!" {=said} {hero} {=tone}, and painted {=some_color.a} {beast=animal!who}.',
        "Then {hero} painted {=look.a} {=some_color} {beast=animal!who}.",
    )
    t.say(
        "The {beast} {=how} ate it and wanted {n=several} more {x.many}.",
        '"Please paint {n=several} more {x.many}," {=said} the {=bad} {beast} {=tone}.',
    )
    t.say(
        "So {hero} painted {n} {x.many}, and the {beast} felt {=glad}.",
        "{hero} {=how} painted {n} {=tasty} {x.many} for the {beast}.",
    )
    t.say(
        "In the end, {hero} {=how} put the {tint} brush back {spot}.",
        '"This {tint} brush belongs {spot}," {=said} {hero} {=tone}.',
    )


@plot(
    "{hero} wanted to paint {mix=mix.a} {x=flower} for {his} {=good} {=kin}.",
    "{hero} needed {mix=mix} paint for {=look.a} {x=flower}.",
)
def mixing(t: Teller) -> None:
    t.say(
        "But there was only {mix.one} and {mix.two} paint {=some_indoors}.",
        "But there was only {mix.one} and {mix.two} paint in the {=look} {=container}.",
    )
    meet(t)
    t.say(
        '"Mix {mix.one} with {mix.two}," {=said} {friend} {=tone}.',
        '"What do {mix.one} and {mix.two} make?" {=asked} the {=good} {pal} {=tone}.',
    )
    t.say('"{mix.Cap}!" {=said} {hero} {=tone}.', "{hero} {=how} made {mix} paint and felt {=glad}.")
    t.say("Soon the {=look} {mix} {x} hung {=some_indoors}.", "{hero} {=how} gave the {mix} {x} to {friend}.")


@plot(
    "{hero} felt {=sad} and could not sleep.",
    "{hero} lay in bed and was not tired.",
    opener="One {=sky} night,",
)
def counting_sheep(t: Teller) -> None:
    t.say(
        '"Try to count {=good} {x=animal!who.many}," {=said} {his} {=good} {helper=kin} {=tone}.',
        '"I count {=some_color} {x=animal!who.many} when I feel {=sad}," {=said} {his} {helper=kin}.',
    )
    t.say(
        "{hero} {=how} thought of {=look.a} {tint=color} gate {=some_place.at}.",
        "{hero} closed both eyes and saw {=look.a} {tint=color} gate near {=look.a} {=some_landmark}.",
    )
    t.say(
        '"{n=small.Aloud}," counted {hero} {=tone}, and fell asleep.',
        "{hero} saw {n=small#x} go by {=how} and fell asleep.",
    )
    t.say(
        "In the dream, the {n#x} had {=look} {=some_color} {=some_wear.many}.",
        "In the dream, the {n#x} {=went} {=how} through the {tint} gate.",
    )
    t.say(
        '"I dreamed of {n#x}," {hero} told {his} {helper} {=tone}.',
        '"Did you see the {tint} gate and the {n#x}?" {=asked} {his} {helper} {=tone}.',
    )


@plot(
    "{hero} and {friend=name!hero} {=went} to {=look.a} costume party {=some_place.at}.",
    "{friend=name!hero} asked {hero} to come to {=look.a} costume party {=some_place.at}.",
)
def costumes(t: Teller) -> None:
    t.say(
        "{hero} came as {=some_color.a} {x=animal!who}, and {friend} as {=look.a} {y=animal!who!x}.",
        "{friend} was dressed as {=look.a} {y=animal!who}, and {hero} as {=some_color.a} {x=animal!who!y}.",
    )
    t.say(
        '"{=ohno}! Is that a real {y}?" {=asked} {=good.a} {=some_job} {=tone}.',
        '"What {=look.a} {y}!" {=said} {=good.a} {=some_job} {=tone}.',
    )
    t.say(
        '"No, the {y} is {friend}," {=said} {hero} {=tone}.',
        '"I am {friend}, and the {x} is {hero}," {=said} {friend} {=tone}.',
    )
    t.say(
        "{hero} won {=look.a} {=some_color} {=some_trinket} for being {=look.a} {x}.",
        "Then they swapped, and now {hero} was the {y} and {friend} the {x}.",
    )
