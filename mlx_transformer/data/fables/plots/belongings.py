"""Plots in which things change hands."""

from mlx_transformer.data.fables.plots.frame import meet, plot, scenery, thanks, worry
from mlx_transformer.data.fables.teller import Teller


@plot(
    "{hero} had {=look.a} {x=toy}, and {friend=name!hero} had {=look.a} {y=toy!x}.",
    "{friend=name!hero} came to play with {=look.a} {y=toy}, and {hero} brought {=look.a} {x=toy!y}.",
)
def swap(t: Teller) -> None:
    t.say(
        '"What {=look.a} {y}!" {=said} {hero} {=tone}. "Let us swap."',
        '"I will give you my {x} for your {y}," {=said} {hero} {=tone}.',
    )
    t.say("So {hero} {=how} took the {y}, and {friend} took the {x}.")
    if t.say(
        'But on {=weekday}, {friend} {=said} {=tone}, "I miss my {y}."',
        'Then on {=weekday}, {friend} {=said} {=tone}, "I love my new {x}."',
    ):
        t.say(
            "So {friend} kept the {x}, and {hero} kept the {y}.",
            "Now {hero} had {=look.a} {y}, and {friend} had {=look.a} {x}.",
        )
    else:
        t.say(
            "So {hero} {=how} gave back the {y} and got the {x} again.",
            "Now {friend} had the {y} again, and {hero} had the {x}.",
        )


@plot(
    "{hero} {=went} to the market with {=look.a} {x=tool}.",
    "{hero} had {=look.a} {=some_color} {x=tool} to sell.",
)
def trading(t: Teller) -> None:
    t.say(
        "{=good.A} {=some_job} gave {him} {=look.a} {y=prize} for the {x}.",
        "{=good.A} {=some_animal!who} wanted the {x} and gave {him} {=look.a} {y=prize}.",
    )
    t.say(
        "Then {hero} {=how} swapped the {y} with {=some_job.a} for {=look.a} {z=toy}.",
        '"I need {y.a}," {=said} {=good.a} {=some_job}. "You can have my {z=toy}."',
    )
    t.say(
        "{friend=name!hero} the {=good} {=some_animal!who} took the {z} and gave {him} {=look.a} {w=wear}.",
        '"I will give you this {=look} {w=wear} for the {z}," {=said} {=good.a} {=some_animal!who} {=tone}.',
    )
    t.say(
        '"First {x.a}, then {y.a}, then {z.a}, and now {w.a}!" {=said} {hero}.',
        "So the {x} became {y.a}, the {y} {z.a}, and the {z} {w.a}.",
    )


@plot(
    "{hero} borrowed {=look.a} {tint=color} {x=tool} from {friend=name!hero} the {=good} {pal=animal!who}.",
    "{friend=name!hero}, {=good.a} {pal=animal!who}, lent {hero} {=look.a} {tint=color} {x=tool}.",
)
def borrowed(t: Teller) -> None:
    t.say(
        "But {hero} dropped the {x} {=some_place.at}, and it broke in two.",
        "But {hero} {=went} {=how} into {=look.a} {=some_landmark} and broke the {x}.",
    )
    t.say(
        "{hero} wanted to hide it {=some_indoors}, but then {=how} told {friend} the truth.",
        "{hero} {=went} to {friend} {=some_place.at} and told the truth {=tone}.",
    )
    t.say(
        '"I broke your {tint} {x}, {friend}," {=said} {hero} {=tone}.',
        '"Your {tint} {x} is broken, {friend}, and I am {=sad}," {=said} {hero}.',
    )
    t.say(
        '"You were {=good} to tell me," {=said} the {pal} {=tone}.',
        '"We can mend the {x} together," {=said} {friend} with {=smile.a} smile.',
    )


@plot(
    "it was the birthday of {friend=name!hero}, {=good.a} and {=good} {pal=animal!who}.",
    "{friend=name!hero} the {=good} {pal=animal!who} had {=look.a} party {=some_place.at}.",
)
def present(t: Teller) -> None:
    t.say(
        "{hero} {=how} made {=look.a} {tint=color} {x=wear} for {friend}.",
        "{hero} put {=look.a} {tint=color} {x=wear} in {=look.a} {=container}.",
    )
    t.say(
        "{=good.A} {=some_job} gave {friend} {=look.a} {=some_prize}, and {=some_job.a} brought {=look.a} {=some_toy}.",
        "The others brought {=look.a} {=some_color} {=some_prize} and {=tasty} {=some_treat.many}.",
    )
    worry(t)
    t.say(
        'But {friend} {=asked} {=tone}, "Is that {=look} {tint} {x} for me?"',
        '"My {tint} {x} is not {=look}," {=said} {hero} {=tone}.',
    )
    t.say(
        '"{=hooray}! {tint.A} {x}!" {=said} {friend} {=tone}.',
        "The {=glad} {pal} put on the {tint} {x} and kept it on.",
    )


@plot(
    "{hero} found {=look.a} {tint=color} {x=wear} {=some_outside}.",
    "{hero} saw that {=look.a} {tint=color} {x=wear} lay {=some_outside}.",
)
def finder(t: Teller) -> None:
    t.say(
        'Soon {=bad.a} and {=bad} {rogue=animal!who} {=said} {=tone}, "That {x} is mine."',
        '"I have lost {x.a}," {=said} {=bad.a} and {=bad} {rogue=animal!who}.',
    )
    t.say(
        '"Is it {=some_color!tint}?" {=asked} {hero} {=tone}. "Yes," {=said} the {rogue}, and that was not true.',
        '"It is {=some_color!tint}," {=said} the {rogue} {=tone}, but {hero} knew that it was {tint}.',
    )
    t.say(
        '"I lost my {=look} {tint} {x}," {=said} {friend=name!hero}, {=good.a} {pal=animal!who!rogue}.',
        '"Have you seen {tint.a} {x}?" {=asked} {friend=name!hero}, {=good.a} {pal=animal!who!rogue}.',
    )
    t.say(
        "So {hero} {=how} gave {friend} the {tint} {x}.",
        '"Then this {x} is yours, {friend}, and not the {rogue}\'s," {=said} {hero}.',
    )


@plot(
    "{thief=bird.a} took the {tint=color} {x=prize} of {hero} and flew into {tree=tree.a}.",
    "{=bad.a} {thief=bird} flew into {tree=tree.a} with the {tint=color} {x=prize} of {hero}.",
)
def thief(t: Teller) -> None:
    meet(t)
    t.say(
        "So they {=how} put {=look.a} {=some_color} {y=trinket} under the {tree}.",
        '"Show the {thief} this {=look} {=some_color} {y=trinket}," {=said} {friend} {=tone}.',
    )
    t.say(
        "The {thief} {=how} took the {y} and let the {tint} {x} fall.",
        "The {thief} came down for the {y}, and {hero} took back the {tint} {x}.",
    )
    t.say(
        "Now {hero} had the {x}, and the {thief} had the {=look} {y}.",
        '"You keep the {y}, and I keep my {x}," {hero} told the {thief} {=tone}.',
    )


@plot(
    "{hero} found {=look.a} {tint=color} key {=some_outside}.",
    "{=good.a} {=some_job} gave {hero} {=look.a} {tint=color} key.",
)
def three_doors(t: Teller) -> None:
    t.say(
        "{He} {=went} {=how} to {=look.a} {=house} with three doors.",
        "There was {=look.a} {=house} {=some_place.at} with three doors.",
    )
    t.say(
        "One door was {a=color!tint}, one was {tint}, and one was {b=color!tint!a}.",
        "One was {tint}, one was {a=color!tint}, and one was {b=color!tint!a}.",
        "One was {a=color!tint}, one was {b=color!tint!a}, and one was {tint}.",
    )
    t.say(
        '"The {tint} key is for the {tint} door," {=said} {hero} {=tone}.',
        "{hero} {=how} tried the key, and it opened the {tint} door.",
    )
    t.say(
        "Behind it was {friend=name!hero}, {=good.a} {pal=animal!who}, with {=look.a} {=some_prize}.",
        "Behind it sat {friend=name!hero} the {=good} {pal=animal!who} with {=tasty} {=some_treat.many}.",
    )
    thanks(t)


@plot(
    "{hero}, {a=name!hero} and {b=name!hero!a} brought things to school.",
    "{hero} {=went} to school with {a=name!hero} and {b=name!hero!a}.",
)
def show_and_tell(t: Teller) -> None:
    t.say(
        "{hero} had {=look.a} {x=prize}, {a} had {=look.a} {y=toy}, and {b} had {=look.a} {z=trinket}.",
        "{a} brought {=look.a} {y=toy}, {b} brought {=look.a} {z=trinket}, and {hero} brought {=look.a} {x=prize}.",
    )
    first = t.say(
        '"Whose {y} is this?" {=asked} the {=good} teacher {=tone}.',
        '"Whose {z} is this?" {=asked} the {=good} teacher {=tone}.',
    )
    owners = [("y", "a"), ("z", "b")]
    thing, owner = owners[first]
    t.let(thing=t[thing], owner=t[owner])
    t.say(
        '"The {thing} belongs to {owner}," {=said} {hero} {=tone}.',
        '"It was {owner} who brought the {thing}," {=said} {hero} {=tone}.',
    )
    thing, owner = owners[1 - first]
    t.let(thing=t[thing], owner=t[owner])
    t.say(
        "Then {owner} {=how} took back the {thing}, and {hero} the {x}.",
        '"And the {thing} is mine," {=said} {owner} {=tone}. Then {hero} took the {x}.',
    )


@plot(
    "{hero} and {friend=name!hero} the {=good} {pal=animal!who} both wanted {=look.a} {tint=color} {x=toy}.",
    "{hero} and {friend=name!hero} the {=good} {pal=animal!who} saw {=look.a} {tint=color} {x=toy} {=some_outside}.",
)
def quarrel(t: Teller) -> None:
    t.say(
        '"The {tint} {x} is mine!" {=said} {friend} {=tone}.', '"Give me the {=look} {x}!" {=said} the {pal} {=tone}.'
    )
    t.say(
        "They {=how} pulled at it until the {tint} {x} broke.",
        "They pulled at the {tint} {x} until it fell {=some_outside}.",
    )
    t.say(
        '"You go first, {friend}," {=said} {hero} {=tone}, and gave {friend.him} the {x}.',
        "Then {friend} had the {x} until {=weekday}, and after that {hero} {=how} took it.",
    )
    thanks(t)


@plot(
    "{his} {helper=kin} sent {hero} for {x=fruit.many}, {n=several} {y=vegetable.many} and {z=dish}.",
    '"We need {x=fruit.many}, {n=several} {y=vegetable.many} and {z=dish}," the {helper=kin} of {hero} {=said}.',
)
def errand(t: Teller) -> None:
    scenery(t)
    t.say(
        "At the market, {hero} {=how} bought {=tasty} {x.many} and {z}.",
        "{hero} got {=tasty} {x.many} and some {z} from {=good.a} {=some_job}.",
    )
    t.say("But {he} had forgotten something and felt {=sad}.", '"{=ohno}! I forgot something," {=said} {hero} {=tone}.')
    t.say(
        '"{n.Cap} {y.many}!" {=said} {hero} {=tone}, and {=went} back.',
        "So {hero} {=went} back for {n} {y.many} and {=how} paid.",
    )
    t.say(
        "{His} {=glad} {helper} took the {x.many}, the {n} {y.many} and the {z}.",
        '"{x.Many}, {y.many} and {z}! {=hooray}!" {=said} {his} {helper}.',
    )
