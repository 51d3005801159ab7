"""The words of the fables, by their role in a sentence. The order of the lists is part of the corpus."""

from functools import cache

from mlx_transformer.data.fables.words import Item, Pool, adjectives, mixes, nouns, people, places, plain, split, verbs

_HE, _SHE = "he him his", "she her her"
_GIRLS = people(
    "person",
    _SHE,
    """Lily, Mia, Sue, Anna, Sara, Lucy, Emma, Amy, Molly, Daisy, Rosie, Ella, Ruby, Nora, Ivy, Zoe, Maya, Eva, Clara,
    Alice, Jane, Kate, Polly, Hazel""",
)
_BOYS = people(
    "person",
    _HE,
    """Tim, Tom, Ben, Max, Sam, Jack, Leo, Finn, Bob, Billy, Dan, Fred, George, Harry, Joe, Luke, Mark, Ned, Oscar,
    Peter, Simon, Toby, Adam, Hugo""",
)

_NUMBER_WORDS = split(
    """no, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen,
    sixteen, seventeen, eighteen, nineteen, twenty"""
)


def _number(n: int, word: str) -> Item:
    aloud = ", ".join(_NUMBER_WORDS[1 : n + 1]) or word  # counted out: "one, two, three"
    was, are, them = ("was", "is", "it") if n == 1 else ("were", "are", "them")
    return Item("number", {"": word, "was": was, "are": are, "them": them, "aloud": aloud}, n)


NUMBERS = tuple(_number(n, word) for n, word in enumerate(_NUMBER_WORDS))
_ANY_NUMBER = Pool("number", NUMBERS)


@cache
def numbers(low: int, high: int) -> Pool:
    """Return the numbers low..high as a pool, clamped to those that have a word."""
    low = min(max(low, 0), len(NUMBERS) - 1)
    return Pool("number", NUMBERS[low : max(low, min(high, len(NUMBERS) - 1)) + 1], wide=_ANY_NUMBER)


CREATURES = {word: nouns("creature", word)[0] for word in ("girl", "boy")}
NOUNS = {word: nouns("thing", word)[0] for word in ("egg", "balloon", "coin", "duckling", "wish", "seed", "bird")}

_PEOPLE = {
    "girl": _GIRLS,
    "boy": _BOYS,
    "name": _GIRLS + _BOYS,
    "kin": people("kin", _SHE, "mom, grandma, aunt, big sister, cousin")
    + people("kin", _HE, "dad, grandpa, uncle, big brother, godfather"),
    "animal": nouns(
        "creature",
        """rabbit, fox, squirrel, mouse, bear, hedgehog, badger, deer, otter, beaver, frog, turtle, duck, goose, hen,
        pig, lamb, goat, cow, pony, donkey, cat, puppy, kitten, mole, raccoon, skunk, owl, wolf, lion, monkey,
        elephant, koala, panda, tiger, zebra, giraffe, camel, penguin, hamster, toad, lizard, snail, sheep, crab, seal,
        swan, turkey, walrus, kangaroo, llama, leopard, moose, rooster, ox, calf, bull, raven, weasel, ferret, parrot,
        eagle, bat, hippo, rhino, buffalo, bison, dolphin, whale, dragon, unicorn, chicken, gorilla, cheetah, jaguar,
        antelope, falcon, stork, pelican, ostrich, peacock""",
    ),
    "job": nouns(
        "job",
        """baker, farmer, teacher, doctor, miller, painter, fisherman, gardener, tailor, carpenter, sailor, shepherd,
        cook, librarian, shoemaker, blacksmith, weaver, potter, mayor, postman, clown, barber, plumber, jeweler, nurse,
        builder, actor, banker, butcher, carver, dancer, dentist, driver, fiddler, guard, hunter, juggler, king,
        knight, magician, pilot, pirate, poet, queen, ranger, singer, soldier, waiter, wizard, writer""",
    ),
    "petname": plain(
        "petname",
        """Biscuit, Pepper, Mittens, Shadow, Buttons, Patches, Ginger, Snowy, Fluffy, Muffin, Spot, Rusty, Whiskers,
        Peanut, Coco, Bubbles, Cookie, Dusty, Freckles, Honey, Jelly, Lucky, Nibbles, Pickles, Sparky, Twinkle,
        Waffles, Ziggy""",
    ),
    "nick": plain(
        "nick",
        """little star, sunshine, pumpkin, sweet pea, honey bee, my dear, buttercup, little bean, champ, sugar plum,
        peanut, angel, little bird, treasure, captain, cupcake""",
    ),
}

_DESCRIPTIONS = {
    "good": adjectives(
        "trait",
        """kind, brave, clever, gentle, honest, cheerful, careful, curious, friendly, patient, polite, quiet,
        thoughtful, helpful, playful, funny, happy, lively, loyal, calm, bold, generous, hopeful, humble, jolly,
        loving, sensible, sweet, tidy, wise, merry, eager, caring, daring, faithful, graceful, modest, noble, peaceful,
        witty, cozy, fair, fearless, frank, grateful, hardworking, honorable, lovable, mild, nimble, obedient,
        optimistic, pleasant, quick, reliable, respectful, sincere, smart, sunny, tender, trusty, warm, watchful,
        zany""",
    ),
    "bad": adjectives(
        "trait",
        """greedy, lazy, grumpy, selfish, bossy, rude, stubborn, careless, boastful, jealous, messy, noisy, impatient,
        naughty, fussy, vain, cranky, sneaky, proud, foolish""",
    ),
    "color": adjectives(
        "color",
        """red, blue, green, yellow, orange, purple, pink, brown, black, white, gray, golden, silver, striped, spotted,
        checkered, scarlet, violet, turquoise, crimson, lavender, navy, amber, ivory, maroon, olive, peach, ruby""",
    ),
    "look": adjectives(
        "look",
        """big, little, tiny, old, new, shiny, pretty, smooth, round, lovely, strange, special, bright, fancy, plain,
        dusty, heavy, beautiful, wonderful, simple, huge, neat, wooden, muddy, rusty, painted, sparkling, perfect,
        curious, odd, rare, giant, small, large, handsome, splendid, cute, dainty, sturdy, clean, dirty, fine, grand,
        magic, precious, crooked, polished, colorful, gleaming, marvelous, charming, funny, antique, wobbly, shabby,
        silky, slim, spare, stylish, tall, thick, thin, tidy, velvet, worn, broken, chipped, decorated, delicate,
        elegant, enormous, famous, flat, glittery, handmade, square, tattered, twisted, waterproof, wonky, soft""",
    ),
    "tasty": adjectives(
        "taste",
        """sweet, juicy, tasty, fresh, ripe, yummy, delicious, crunchy, lovely, big, fat, plump, soft, crisp,
        wonderful, perfect, tiny, fine, splendid, enormous, buttery, creamy, crumbly, fragrant, frozen, homemade,
        honeyed, salty, spicy, sticky, sugary, tender""",
    ),
    "sky": adjectives(
        "sky",
        """sunny, cloudy, windy, warm, cold, foggy, bright, rainy, cool, quiet, frosty, clear, misty, lazy, busy, gray,
        chilly, stormy, golden, lovely, breezy, snowy, hot, peaceful, bitter, blustery, brilliant, crisp, damp, dark,
        drizzly, dry, fine, hazy, icy, mild""",
    ),
    "sad": adjectives(
        "feeling",
        """sad, upset, worried, lonely, unhappy, gloomy, miserable, sorry, hurt, ashamed, afraid, frightened, nervous,
        troubled, scared, tearful, disappointed, puzzled, tired, anxious, bitter, bored, confused, discouraged,
        embarrassed, guilty, heartbroken, helpless, homesick, hopeless, shaken, uneasy""",
    ),
    "glad": adjectives(
        "feeling",
        """happy, glad, proud, thankful, pleased, delighted, cheerful, joyful, excited, thrilled, merry, content,
        grateful, relieved, hopeful, lucky, warm, peaceful, amazed, overjoyed, cheery, comforted, encouraged,
        fortunate, jolly, refreshed, rested, satisfied, special, surprised, wonderful, better""",
    ),
    "smile": adjectives(
        "smile", "big, warm, bright, shy, proud, gentle, broad, sleepy, happy, tender, kind, wide, little, sweet"
    ),
    "how": plain(
        "adverb",
        """quickly, slowly, quietly, happily, softly, carefully, gently, bravely, proudly, calmly, gladly, eagerly,
        nervously, silently, patiently, swiftly, neatly, boldly, busily, cleverly, merrily,
        secretly, steadily, kindly, wisely, politely, playfully, lazily, hopefully, awkwardly, briskly, cautiously,
        daintily, elegantly, faithfully, gracefully, hastily, helpfully, lightly, nimbly, noisily, promptly,
        skillfully, sleepily, stubbornly""",
    ),
    "tone": plain(
        "adverb",
        """softly, loudly, kindly, politely, sadly, brightly, sweetly, quietly, gently, firmly, shyly, cheerfully,
        warmly, happily, proudly, slowly, quickly, calmly, nervously, hopefully, seriously, wisely, honestly,
        excitedly, bravely, crossly, dreamily, eagerly, faintly, grandly, hoarsely, joyfully, merrily, patiently,
        solemnly, thoughtfully""",
    ),
    "said": plain(
        "speech",
        """said, cried, whispered, called, shouted, laughed, answered, replied, sighed, announced, exclaimed, murmured,
        joked, mumbled, remarked, sang""",
    ),
    "asked": plain("speech", "asked, wondered, begged, whispered, cried, called"),
    "went": plain(
        "motion",
        """walked, ran, hurried, skipped, hopped, went, marched, strolled, raced, wandered, rushed, trotted, danced,
        crept, jogged, tiptoed""",
    ),
    "ohno": plain(
        "cry",
        "Oh no, Oh dear, Goodness, Dear me, Help, Alas, Uh oh, Good heavens, How terrible, What a pity, Oh my, Bother",
    ),
    "hooray": plain(
        "cry",
        """Hooray, Wow, Yay, Wonderful, Hurrah, Yippee, Fantastic, Amazing, Bravo, How nice, Oh joy, Splendid, Perfect,
        Great, Lovely, Super""",
    ),
    "fear": plain(
        "fear",
        """the dark, thunder, deep water, spiders, tall ladders, loud noises, the wind, shadows, big dogs, strangers,
        ghosts, lightning, the cellar, bats, heights, snakes""",
    ),
    "mix": mixes(
        "red yellow orange, blue yellow green, red blue purple, red white pink, black white gray, red green brown"
    ),
}

_THINGS = {
    "fruit": nouns(
        "food",
        """apple, pear, plum, peach, cherry, banana, orange, lemon, fig, apricot, strawberry, mango, berry, melon,
        grape, raspberry, acorn, walnut, chestnut, hazelnut, blueberry, pineapple, coconut, date, lime, almond, kiwi,
        cranberry""",
    ),
    "vegetable": nouns(
        "food",
        """carrot, turnip, potato, tomato, onion, pumpkin, radish, bean, cucumber, beet, mushroom, cabbage, pepper,
        leek, parsnip, sprout, pea, eggplant""",
    ),
    "treat": nouns(
        "food",
        """cookie, cupcake, muffin, pancake, biscuit, bun, tart, waffle, pie, doughnut, pretzel, candy, lollipop,
        scone, dumpling, sandwich, brownie, cracker, roll, caramel, cake, truffle, flapjack, fritter, macaroon,
        marshmallow, meatball, omelet, popsicle, sausage, toffee""",
    ),
    "dish": plain(
        "dish",
        """soup, porridge, honey, cheese, jam, rice, stew, bread, pudding, noodles, pasta, toast, salad, oatmeal,
        custard, popcorn, yogurt, corn, butter, chowder, cereal, jelly, gravy, cream""",
    ),
    "toy": nouns(
        "thing",
        """ball, doll, kite, drum, puzzle, teddy bear, robot, top, toy boat, toy car, toy train, wagon, scooter,
        puppet, whistle, rocket, hoop, jump rope, dinosaur, swing, sled, mask, bubble wand, rocking horse, yo-yo,
        dollhouse, tricycle, drumstick""",
    ),
    "trinket": nouns(
        "thing",
        """shell, coin, button, ring, feather, pebble, key, bell, bead, gem, marble, pearl, medal, stone, badge,
        ticket, crayon, stamp, pinecone, crystal, sticker, card, arrow, nail, acorn cap, bean bag, bolt, bottle cap,
        cork, domino, hairpin, magnet, needle case, peg, tooth""",
    ),
    "prize": nouns(
        "thing",
        """necklace, crown, bracelet, locket, lantern, mirror, music box, spoon, watch, cup, vase, candle, clock,
        compass, telescope, storybook, snow globe, teapot, magnet, pencil case, trumpet, blanket, statue, goblet,
        brooch, flag, lamp, bottle""",
    ),
    "tool": nouns(
        "thing",
        """hammer, shovel, rake, broom, saw, bucket, ladder, ax, hoe, needle, paintbrush, wheelbarrow, mop, pan, pot,
        kettle, umbrella, fishing net, rope, hose, drill, brush, sewing machine, wrench""",
    ),
    "wear": nouns(
        "thing",
        """hat, scarf, coat, sweater, cap, jacket, apron, cape, bow tie, vest, raincoat, backpack, bonnet, shirt, belt,
        robe, tie, hood, shawl, poncho""",
    ),
    "flyer": nouns(
        "thing", "kite, hat, balloon, scarf, paper plane, handkerchief, ball, frisbee, cap, letter, drawing, pillow"
    ),
    "container": nouns(
        "container", "basket, box, bag, jar, bowl, bucket, sack, tin, crate, cart, tray, pail, barrel, chest"
    ),
    "flower": nouns(
        "flower",
        """rose, daisy, tulip, lily, sunflower, poppy, violet, daffodil, pansy, bluebell, iris, buttercup, marigold,
        orchid, snowdrop, dandelion""",
    ),
    "tree": nouns(
        "tree",
        """oak tree, pine tree, apple tree, willow tree, maple tree, birch tree, elm tree, cherry tree, fir tree, palm
        tree, plum tree, fig tree""",
    ),
    "instrument": nouns(
        "instrument",
        """flute, violin, guitar, piano, trumpet, harp, banjo, ukulele, tuba, fiddle, cello, horn, tambourine,
        clarinet, accordion, saxophone""",
    ),
    "vehicle": nouns(
        "vehicle", "bus, train, boat, truck, cart, sled, ferry, tractor, van, raft, tram, carriage, taxi, coach"
    ),
    "build": nouns(
        "build",
        "snowman, sandcastle, tower, fort, raft, scarecrow, birdhouse, mud castle, block bridge, tent, den, statue",
    ),
    "house": nouns(
        "house",
        """house, cottage, cabin, hut, tent, treehouse, castle, tower, houseboat, cave, lodge, caravan, palace,
        farmhouse""",
    ),
    "bird": nouns(
        "creature",
        "robin, sparrow, crow, magpie, parrot, dove, swallow, finch, wren, blackbird, jay, pigeon, seagull, cuckoo",
    ),
    "insect": nouns(
        "insect",
        """butterfly, beetle, ladybug, cricket, grasshopper, bee, ant, dragonfly, firefly, caterpillar, moth, spider,
        wasp, worm, bumblebee, fly""",
    ),
    "pet": nouns(
        "pet",
        """kitten, puppy, parrot, hamster, turtle, goldfish, mouse, lizard, guinea pig, bunny, duckling, canary, gecko,
        poodle, chick, ferret""",
    ),
}

_WHERE_AND_WHEN = {
    "place": places(
        """in the garden, in the park, in the forest, in the meadow, in the village, in the town, in the valley, in the
        orchard, in the barn, in the field, in the yard, in the jungle, in the desert, in the library, in the kitchen,
        in the shop, at the market, at the beach, at the farm, at the school, at the zoo, at the fair, at the harbor,
        at the mill, at the station, at the museum, at the bakery, by the river, by the lake, by the pond, by the
        stream, by the sea, by the well, by the waterfall, on the hill, on the mountain, on the island, on the bridge,
        on the playground, on the road, in the church, in the circus tent, in the courtyard, in the hall, in the
        hospital, in the stable, in the theater, at the airport, at the camp, at the corner, at the fountain, at the
        gate, at the hotel, at the inn, at the pool, at the post office, at the stadium, at the tower, by the canal, by
        the cliff, by the fireplace, on the balcony, on the roof, on the terrace""",
    ),
    "outdoors": places(
        """in the garden, in the park, in the forest, in the meadow, in the valley, in the orchard, in the field, in
        the yard, at the farm, by the river, by the lake, by the pond, by the stream, on the hill, on the island, by
        the waterfall""",
    ),
    "indoors": plain(
        "spot",
        """under the bed, behind the door, on the shelf, in the closet, under the rug, behind the curtain, in the
        drawer, under the table, behind the sofa, in the bathtub, on the windowsill, under the pillow, in the laundry
        basket, behind the clock, under the stairs, in the cupboard, on the porch, in the attic, behind the stove, in
        the cellar""",
    ),
    "outside": plain(
        "spot",
        """under the bench, behind the oak tree, in the bushes, under the bridge, behind the fence, in the tall grass,
        beside the well, under the wagon, behind the shed, in the hollow log, under a pile of leaves, behind the big
        rock, in the sandbox, near the gate, in the ditch, behind the haystack, beside the pond, under the hedge, in
        the flower bed, behind the mailbox, near the fountain, under the slide, in the mud, among the ferns""",
    ),
    "landmark": nouns(
        "landmark",
        """windmill, bridge, church, fountain, fence, gate, tower, haystack, statue, well, shed, stone wall, signpost,
        scarecrow, lighthouse, pond, cliff, swamp, hedge, tunnel, barn, ruin, bakery, beehive""",
    ),
    "daypart": plain("daypart", "morning, afternoon, evening, day"),
    "weekday": plain("weekday", "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    "hobby": verbs(
        "hobby",
        """climb/climbed/climbing trees, pick/picked/picking flowers, paint/painted/painting pictures,
        sing/sang/singing songs, read/read/reading books, bake/baked/baking bread, fly/flew/flying kites,
        ride/rode/riding bikes, catch/caught/catching fish, build/built/building towers, collect/collected/collecting
        stamps, chase/chased/chasing bubbles, play/played/playing chess, tell/told/telling jokes,
        count/counted/counting stars, draw/drew/drawing maps, dance/danced/dancing, swim/swam/swimming,
        skate/skated/skating, whistle/whistled/whistling tunes, juggle/juggled/juggling, write/wrote/writing poems,
        knit/knitted/knitting socks, jump/jumped/jumping in puddles, plant/planted/planting seeds, roll/rolled/rolling
        down hills, feed/fed/feeding the ducks, solve/solved/solving riddles, dig/dug/digging holes,
        watch/watched/watching clouds, make/made/making masks, fold/folded/folding paper birds""",
    ),
    "small": list(NUMBERS[2:7]),
    "several": list(NUMBERS[3:11]),
    "even": list(NUMBERS[4:17:2]),
}

_ITEMS = {**_PEOPLE, **_DESCRIPTIONS, **_THINGS, **_WHERE_AND_WHEN}
# A word that occurs again later in its story is drawn from the first items of a list, so that a small model sees each
# of them copied often; a word that occurs once is drawn from the whole list, the pool some_<name>.
_FIRST = {
    12: "color dish flower indoors insect instrument outdoors vegetable vehicle wear",
    16: "fruit hobby job landmark outside prize tool toy treat trinket",
    24: "place",
    32: "animal",
}
_REPEATED = {name: number for number, names in _FIRST.items() for name in names.split()}
POOLS = {name: Pool(name, tuple(items[: _REPEATED.get(name)])) for name, items in _ITEMS.items()}
POOLS.update({f"some_{name}": Pool(f"some_{name}", tuple(_ITEMS[name])) for name in _REPEATED})
ALL_ITEMS = (*NUMBERS, *CREATURES.values(), *NOUNS.values(), *(item for items in _ITEMS.values() for item in items))
