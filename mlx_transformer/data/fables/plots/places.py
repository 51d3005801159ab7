"""Plots that depend on where things and people are."""

from mlx_transformer.data.fables.plots.frame import meet, plot, thanks
from mlx_transformer.data.fables.teller import Teller


@plot(
    "{hero} left {his} {=look} {tint=color} {x=toy} {spot=outside} and {=went} home.",
    "{hero} played {=how} with {his} {=look} {tint=color} {x=toy} {spot=outside}.",
)
def lost_toy(t: Teller) -> None:
    t.say(
        "At bedtime, {hero} missed the {x} and {=how} looked {wrong=indoors} and {=some_indoors!wrong}.",
        "At bedtime, {hero} looked for the {x} {=some_indoors} and found only {=look.a} {=some_trinket}.",
    )
    meet(t)
    t.say(
        '"Did you look {spot}?" {=asked} {friend} {=tone}.', '"I saw {tint.a} {x} {spot}," {=said} the {=good} {pal}.'
    )
    t.say("They {=went} there, and the {x} was still {spot}.", "{hero} {=how} looked {spot} and found the {tint} {x}.")


@plot(
    "{hero} played hide-and-seek with {a=name!hero} and {b=name!hero!a}.",
    "{a=name!hero} and {b=name!hero!a} asked {hero} to play hide-and-seek.",
)
def hide_and_seek(t: Teller) -> None:
    t.say("{a} {=how} hid {one=outside}, and {b} {=how} hid {two=outside!one}.")
    if t.say("Then {hero} looked {one} and found {a}.", "Then {hero} looked {two} and found {b}.") == 0:
        t.let(last=t["b"], where=t["two"])
    else:
        t.let(last=t["a"], where=t["one"])
    t.say(
        '"{last} must be {where}," {=said} {hero} {=tone}, and there {last.he} was.',
        "At last {hero} {=how} looked {where}, and there was {last}.",
    )
    t.say(
        '"{=hooray}!" {=said} {last} {=tone}. "Now let us try {=some_hobby.ing}."',
        "{hero}, {a} and {b} were {=glad} and ate {=tasty} {=some_treat.many}.",
    )


@plot(
    "{hero} {=went} past {a=landmark.a}, then {b=landmark!a.a}, then {c=landmark!a!b.a}.",
    "{hero} {=went} {=how} past {a=landmark.a}, then past {b=landmark!a.a} and {c=landmark!a!b.a}.",
)
def way_home(t: Teller) -> None:
    t.say(
        "Then it grew {=sky} and dark, and {hero} was lost.",
        "Then {=look.a} {=some_color} cloud came, and {hero} was lost.",
    )
    meet(t)
    t.say(
        '"What did you see on your way?" {=asked} the {=good} {pal} {=tone}.',
        '"We must go back the way you came," {=said} {friend} {=tone}.',
    )
    t.say(
        '"First the {c}, then the {b}, then the {a}," {=said} {hero} {=tone}.',
        "They {=went} {=how} past the {c}, then the {b}, and at last the {a}.",
    )


@plot(
    "{hero} found {=look.a} {=some_color} map {=some_indoors}.",
    "{=good.a} {=some_job} gave {hero} {=look.a} {=some_color} map.",
)
def treasure_map(t: Teller) -> None:
    t.say(
        "It showed {=some_color.a} cross under {tree=tree.a} near {=look.a} {mark=landmark}.",
        'It said, "Dig under the {tree=tree} near the {=look} {mark=landmark}."',
    )
    meet(t)
    t.say(
        "They {=how} dug under the {tree} and found {=look.a} {x=prize}.",
        "Under the {tree} was {=some_color.a} {=container}, and in it {=look.a} {x=prize}.",
    )
    t.say(
        '"You may have the {x}, {friend}," {=said} {hero} {=tone}.',
        "{hero} {=how} put the {x} {=some_indoors} for all to see.",
    )


@plot(
    "{hero} took {=some_color.a} {ride=vehicle} to see {his} {helper=kin} {goal=place.at}.",
    "{hero} got on {=some_color.a} {ride=vehicle}, for {his} {helper=kin} was {goal=place.at}.",
)
def wrong_stop(t: Teller) -> None:
    t.say(
        "{hero} ate {=tasty.a} {=some_treat} and fell asleep in the {ride}.",
        "When the {=look} {ride} stopped, {hero} was {other=place!goal.at}.",
    )
    if "other" not in t:
        t.say("When the {ride} stopped, {hero} was {other=place!goal.at}.")
    meet(t)
    t.say(
        '"My {helper} is not {other.at} but {goal.at}," {=said} {hero} {=tone}.',
        '"The {ride} can take you back from here," {=said} {friend} {=tone}.',
    )
    t.say(
        "So the {ride} turned around, and {his} {helper} was {=glad}.",
        "At last {hero} was {goal.at} and saw {his} {=good} {helper}.",
    )


@plot(
    "the wind blew the {=look} {tint=color} {x=flyer} of {hero} into {tree=tree.a}.",
    "{hero} lost {his} {=look} {tint=color} {x=flyer}, for it flew into {tree=tree.a}.",
)
def up_a_tree(t: Teller) -> None:
    meet(t)
    t.say(
        '"{=ohno}! Is that your {tint} {x}?" {=asked} {friend} {=tone}.',
        '"I will get your {tint} {x}," {=said} the {=good} {pal} {=tone}.',
    )
    t.say(
        "{friend} {=how} shook the {tree}, and the {x} fell down.",
        "{friend} {=how} climbed the {tree} and came back with the {x}.",
    )
    thanks(t)


@plot(
    "{his} {helper=kin} sent {hero} to see {friend=name!hero} {spot=place.at}.",
    "{hero} had to find {friend=name!hero} {spot=place.at} for {his} {helper=kin}.",
)
def message(t: Teller) -> None:
    t.say(
        '"Ask {friend} to bring {n=several} {x=fruit.many} and {=look.a} {y=tool}," {=said} {his} {helper} {=tone}.',
        '"Tell {friend} that we need {n=several} {x=fruit.many} and {=look.a} {y=tool}," {=said} {his} {helper}.',
    )
    t.say(
        "On the way, {hero} stopped to look at {=look.a} {=some_color} {=some_insect}.",
        "On the way, {hero} met {=good.a} {=some_animal} and tried {=some_hobby.ing}.",
    )
    t.say(
        '{spot.At}, {hero} {=said} {=tone}, "Please bring {n} {x.many} and {y.a}."',
        '"We need {n} {x.many} and {y.a}, {friend}," {=said} {hero} {=tone}.',
    )
    t.say(
        "{friend} {=how} gave {him} the {y} and the {n} {x.many}.",
        '"Here are {n} {x.many}, and here is my {y}," {=said} {friend}.',
    )


@plot(
    "{hero} had {one=color.a} letter for {a=name!hero} and {two=color!one.a} letter for {b=name!hero!a}.",
    "{=some_job.a} gave {hero} {one=color.a} letter for {a=name!hero} and {two=color!one.a} one for {b=name!hero!a}.",
)
def letters(t: Teller) -> None:
    t.say(
        "{a} lived {here=place.at}, and {b} lived {there=place!here.at}.",
        "{b} lived {there=place.at}, and {a} lived {here=place!there.at}.",
    )
    if t.say("First {hero} {=went} to {a} {here.at}", "First {hero} {=went} to {b} {there.at}") == 0:
        t.add(" with the {one} letter.")
        t.let(last=t["b"], where=t["there"], tint=t["two"])
    else:
        t.add(" with the {two} letter.")
        t.let(last=t["a"], where=t["here"], tint=t["one"])
    t.say(
        "Then {he} {=how} gave the {tint} letter to {last} {where.at}.",
        "{last} was {=glad} to get the {tint} letter {where.at}.",
    )
    t.say(
        '"{=hooray}!" {=said} {last} {=tone}. "My {=good} {=kin} will come on {=weekday}."',
        "{last} read it {=how} and gave {hero} {=tasty.a} {=some_treat}.",
    )


@plot(
    "{hero} found {=look.a} baby {bird=bird} {=some_outside}.",
    "{=look.a} baby {bird=bird} fell down in front of {hero}.",
)
def baby_bird(t: Teller) -> None:
    t.say(
        "It came from {=look.a} {=some_color} nest in {tree=tree.a}.",
        "Its {=sad} mother sat high up in {=look.a} {tree=tree}.",
    )
    meet(t)
    t.say(
        '"We must take the {bird} back to the {tree}," {=said} the {pal} {=tone}.',
        '"Poor {bird}! I can carry it," {=said} {friend} {=tone}.',
    )
    t.say(
        "{friend} {=how} climbed up the {tree} with the {bird}.",
        "{hero} and {friend} {=how} put {=look.a} {=some_tool} against the {tree}.",
    )
    t.say(
        "The mother {bird} sang {=tone} in the {tree}.", "Soon the baby {bird} was safe in the {tree} and felt {=glad}."
    )


@plot(
    "{hero} and {his} {=good} {helper=kin} had to tidy up.",
    '"{=ohno}! What {=look.a} mess," {=said} the {helper=kin} of {hero}.',
)
def tidying(t: Teller) -> None:
    t.say(
        '"Put the {x=toy} {a=indoors}, the {y=wear} {b=indoors!a} and the {z=tool} {c=indoors!a!b}," '
        "{=said} {his} {helper}."
    )
    t.say(
        "{hero} sang {=tone} and {=how} put the {z} {c}.",
        "{hero} would rather try {=some_hobby.ing}, but put the {z} {c}.",
    )
    t.say(
        '"The {y} goes {b}, and the {x} {a}," {=said} {hero} {=tone}.', "Then {hero} put the {x} {a} and the {y} {b}."
    )
