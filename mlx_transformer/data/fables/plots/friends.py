"""Plots about behavior: boasting, helping, fear, lying, shyness."""

from mlx_transformer.data.fables.plots.frame import meet, plot
from mlx_transformer.data.fables.teller import Teller


@plot(
    "{friend=name!hero}, {fault=bad.a} {pal=animal!who}, {=how} laughed at {hero} for being slow.",
    '"I am faster than you, {hero}," {=said} {friend=name!hero}, {fault=bad.a} {pal=animal!who}.',
)
def race(t: Teller) -> None:
    t.say(
        '"Then let us race to the {=look} {goal=landmark}," {=said} {hero} {=tone}.',
        "So on {=weekday} they had a race to {=look.a} {goal=landmark}.",
    )
    t.say(
        "{friend} {=went} {=how} ahead and then lay down {spot=outside} to sleep.",
        "{friend} was soon far ahead and sat down {spot=outside} to eat {=some_dish}.",
    )
    t.say(
        "When {hero} came to the {goal}, {friend} was still {spot}.",
        "So {hero} was first at the {goal}, and {friend} was still {spot}.",
    )
    t.say(
        '"I was {fault}, and you were {trait}," {=said} the {pal} {=tone}.',
        '"I will not be {fault} again," {=said} {friend} with {=smile.a} smile.',
    )


@plot(
    "{hero} saw that {=good.a} {tiny=insect} had fallen into {=look.a} {=container}.",
    "{hero} found {=good.a} {tiny=insect} under {=look.a} {=some_tool}.",
)
def small_friend(t: Teller) -> None:
    t.say("{hero} {=how} let the {tiny} go.", "{hero} {=how} put the {tiny} on {=look.a} {=some_flower}.")
    t.say(
        '"One day I will help you, {hero}," {=said} the {tiny} {=tone}.',
        '"Thank you, {trait} {who}," {=said} the {tiny} {=tone}.',
    )
    t.say(
        "On {=weekday}, {hero} got lost {spot=place.at}.",
        "On {=weekday}, {hero} fell into {=look.a} hole {spot=place.at}.",
    )
    t.say(
        "But the {tiny} {=how} came {spot.at} with {=good.a} {=some_job}.",
        "Then the {tiny} came {spot.at} with {=good.a} {=bird} to help {hero}.",
    )
    t.say(
        '"Even {tiny.a} can be {=good.a} friend," {=said} {hero} {=tone}.',
        '"You helped me, and I helped you," {=said} the {tiny} {=tone}.',
    )


@plot(
    '{hero} {=how} cried, "Help! {beast=animal!who.A} is coming!"',
    '{hero} was {=bad} and cried, "{beast=animal!who.A}! {beast.A}!"',
)
def false_alarm(t: Teller) -> None:
    t.say(
        "{a=name!hero} and {b=name!hero!a} {=went} {=some_place.at}, but there was no {beast}.",
        "{a=name!hero} came {=how} with {b=name!hero!a}, but there was no {beast}.",
    )
    t.say('"It was a joke," {=said} {hero} {=tone}, and {a} felt {=sad}.', '"That was {=bad}," {=said} {b} {=tone}.')
    t.say(
        "But on {=weekday}, {hero} met a real {beast} {=some_place.at}.",
        "But one {=sky} {=daypart}, {beast.a} really came.",
    )
    t.say(
        '"{=ohno}! The {beast} is here!" {=said} {hero}, but nobody came.',
        "{hero} {=how} called {a} and {b}, but nobody came.",
    )
    t.say(
        "The {beast} took {=look.a} {=some_prize} and {=tasty} {=some_treat.many}.",
        '"I will not lie to {a} and {b} again," {=said} {hero} {=tone}.',
    )


@plot(
    "{friend=name!hero} the {pal=animal!who} played {tune=instrument.a} while {hero} picked {=tasty} {x=fruit.many}.",
    "{hero} stored {=tasty} {x=fruit.many} while {friend=name!hero} the {pal=animal!who} played {tune=instrument.a}.",
    opener="All summer,",
)
def summer_and_winter(t: Teller) -> None:
    t.say(
        "Then winter came, and it was {=sky} {=some_place.at}.",
        "Then snow fell {=some_place.at}, and the {=some_flower.many} were gone.",
    )
    t.say(
        "{friend} had only {=look.a} {=some_color} {=some_trinket} and nothing to eat.",
        "The {pal} felt {woe=sad} and {=sad!woe} and {=went} to {hero}.",
    )
    t.say(
        '"Come in and eat {x.many} with me," {=said} {hero} {=tone}.',
        "{hero} {=how} gave {friend} {=look.a} {=container} of {x.many}.",
    )
    t.say(
        "So {friend} ate the {x.many} and {=how} played the {tune}.",
        '"Next summer I will pick {x.many} too," {=said} {friend}, and played the {tune} {=tone}.',
    )


@plot(
    "the {=good} {=kin} of {hero} cooked {x=vegetable.many} with {y=dish}.",
    "there were {=look} {x=vegetable.many} with {y=dish} for {hero}.",
)
def picky(t: Teller) -> None:
    t.say(
        '"I do not like {x.many}," {=said} {hero} {=tone}, feeling {=sad}.',
        "{hero} {=how} hid the {x.many} {=some_indoors} and ate only the {y}.",
    )
    meet(t)
    t.say(
        '"{x.Many} with {y} make me {=good}," {=said} {friend} {=tone}.',
        '"I could eat {n=several} {x.many}," {=said} the {=good} {pal} {=tone}.',
    )
    t.say(
        "So {hero} {=how} tried one {x}, and it was {=tasty}.",
        "{hero} {=how} ate one {x}, and it tasted like {=some_dish!y}.",
    )
    t.say(
        '"{=hooray}! May I have {=several} more {x.many}?" {=asked} {hero}.',
        "From then on, {hero} wanted {=tasty} {x.many} every {=weekday}.",
    )


@plot(
    "{hero} felt {=sad} because {he} was afraid of {fear=fear}.",
    "{hero} sat {=some_indoors}, being afraid of {fear=fear}.",
)
def afraid(t: Teller) -> None:
    meet(t)
    t.say(
        '"I was once afraid of {fear} too," {=said} {friend} {=tone}.',
        '"Is it {fear} again?" {=asked} the {=good} {pal} {=tone}.',
    )
    t.say(
        '"Hold my {=look} {x=prize} and count to {n=small}," {=said} the {pal}.',
        '"Take this {=some_color} {x=prize} and count to {n=small}," {=said} {friend} {=tone}.',
    )
    t.say('"{n.Aloud}," {=said} {hero} {=tone}, holding the {x}.', "{hero} {=how} took the {x} and counted to {n}.")
    t.say('"Now I am not afraid of {fear}," {=said} {hero} {=tone}.', "And {hero} {=how} forgot about {fear}.")


@plot(
    "{friend=name!hero}, {=good.a} friend of {hero}, had to stay in bed.",
    "{hero} heard from {=good.a} {=some_job} that {friend=name!hero} was ill.",
)
def sick_friend(t: Teller) -> None:
    t.say(
        "{hero} {=how} made {x=dish} and picked {=look.a} {y=flower}.",
        "{hero} put {x=dish} and {=some_color.a} {y=flower} in {=look.a} {=container}.",
    )
    t.say(
        "On the way, {=bad.a} {=some_animal!who} wanted the {x} and {=asked} {=tone} for it.",
        "On the way, {=look.a} {=some_color} {=some_insect} sat on the {y}.",
    )
    t.say(
        '"The {x} and the {y} are for {friend}," {=said} {hero} {=tone}.',
        "But {hero} {=how} {=went} on to {friend} with the {x}.",
    )
    t.say(
        "{friend} ate the {x} and put the {y} {=some_indoors}.",
        "The {y} smelled {=tasty}, and {friend} {=how} ate all the {x}.",
    )
    t.say(
        "By {=weekday}, {friend} was well again and felt {=glad}.",
        '"{x.Cap} is the best medicine," {=said} {friend} {=tone}.',
    )


@plot(
    "a storm took the roof off the {home=house} of {friend=name!hero} the {=good} {pal=animal!who}.",
    "the {home=house} of {friend=name!hero} the {=good} {pal=animal!who} was full of water.",
)
def storm(t: Teller) -> None:
    t.say(
        '"{=ohno}! My {=look} {home}!" {=said} {friend} {=tone}.',
        "{friend} saved only {=look.a} {=some_color} {=some_prize} from the {home}.",
    )
    t.say(
        '"You can stay with me, {friend}," {=said} {hero} {=tone}.',
        "{hero} {=how} gave {friend} {=look.a} {=some_color} {=some_wear} and some {=some_dish}.",
    )
    t.say(
        "On {=weekday}, they {=how} mended the {home} with {=look.a} {=some_tool}.",
        "They {=went} to {=good.a} {=some_job} for {=look.a} {=some_tool} and mended the {home}.",
    )
    t.say("Then {hero} painted the {home} {tint=color}.", "{hero} and {friend} {=how} painted the {home} {tint=color}.")
    t.say(
        '"I love my {tint} {home}," {=said} {friend} {=tone}.',
        '"Now my {home} is {tint} and {=look}," {=said} the {pal}.',
    )


@plot(
    "{hero} wanted to play the {=look} {tune=instrument} {spot=place.at}.",
    "{hero} had to play the {=look} {tune=instrument} for everyone {spot=place.at}.",
)
def contest(t: Teller) -> None:
    meet(t)
    t.say(
        '"Think of {joy=hobby.ing}, and play," {=said} {friend} {=tone}.',
        '"When I am {=sad}, I think of {joy=hobby.ing}," {=said} the {=good} {pal}.',
    )
    t.say(
        "So {hero} thought of {joy.ing} and played the {tune} {=tone}.",
        "{hero} {=how} thought of {joy.ing}, and then played the {tune}.",
    )
    t.say(
        "Everyone {spot.at} was {=glad}, and {hero} won {=look.a} {=some_prize}.",
        "{hero} won {=look.a} {=some_color} {=some_prize} for playing the {tune} {spot.at}.",
    )


@plot(
    "{friend=name!hero}, {=good.a} new {pal=animal!who}, sat alone at school.",
    "there was {=good.a} new {pal=animal!who} at school, {friend=name!hero}.",
)
def new_at_school(t: Teller) -> None:
    t.say(
        "{friend} held {=look.a} {=some_color} {x=toy} and looked {=sad}.",
        "{friend} came from {=look.a} {=house} {=some_place.at} and had only {=look.a} {x=toy}.",
    )
    t.say(
        "{hero} {=how} {=went} over with {=tasty.a} {=some_treat}.",
        '"What {=look.a} {x}, {friend}!" {=said} {hero} {=tone}.',
    )
    t.say(
        '"Do you like {joy=hobby.ing}?" {=asked} {hero} {=tone}.',
        '"Come on, we are {joy=hobby.ing} {=some_place.at}," {=said} {hero}.',
    )
    t.say(
        "{friend} loved {joy.ing} and felt {mood=glad} and {=glad!mood}.",
        '"I love {joy.ing}!" {=said} {friend} {=tone}.',
    )
    t.say(
        "So they {joy.ed} {=how} and then played with the {x}.",
        "{hero} and {friend} {joy.ed} and shared the {x} until the {=sky} evening.",
    )
