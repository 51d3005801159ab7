"""Numbers, dates, clock times and sums in English words and in digits; either form determines the other."""

from mlx_transformer.data.fables.teller import SplitMix64

_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
_ORDINALS |= {"twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"}

Pair = tuple[str, str]  # words, digits


def number(n: int) -> str:
    """Write a number below a million in words: "two thousand and five"."""
    if n < 100:
        return _SMALL[n] if n < 20 else "-".join(filter(None, (_TENS[n // 10], _SMALL[n % 10] if n % 10 else "")))
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if n >= unit:
            rest = n % unit
            join = " and " if rest < 100 else " "
            return f"{number(n // unit)} {name}" + (join + number(rest) if rest else "")
    raise AssertionError


def ordinal(n: int) -> str:
    """Write a number below a hundred as an ordinal: "twenty-first"."""
    *start, last = number(n).split("-")
    return "-".join([*start, _ORDINALS.get(last, f"{last}th")])


def year(n: int) -> str:
    """Write a year from 1100 to 2099 as it is said: "nineteen oh five"."""
    century, rest = divmod(n, 100)
    if century == 20 and rest < 10:
        return number(n)
    return f"{number(century)} " + ("hundred" if not rest else f"oh {number(rest)}" if rest < 10 else number(rest))


def date(year_number: int, month: int, day: int) -> Pair:
    """Write a day: "the third of May nineteen eighty-four", 1984-05-03."""
    words = f"the {ordinal(day)} of {_MONTHS[month - 1]} {year(year_number)}"
    return words, f"{year_number}-{month:02}-{day:02}"


def clock(hour: int, minute: int) -> Pair:
    """Write a time of the day: "a quarter to six in the afternoon", 17:45."""
    part = "in the " + ("morning", "afternoon", "evening")[(hour >= 12) + (hour >= 18)]
    to = minute > 30
    count, named = (60 - minute, hour + 1) if to else (minute, hour)
    name = number((named - 1) % 12 + 1)
    if minute == 0:
        said = f"{name} o'clock"
    else:
        known = {15: "a quarter", 30: "half"}
        words = known.get(count) or number(count) + ("" if count % 5 == 0 else " minutes" if count > 1 else " minute")
        said = f"{words} {'to' if to else 'past'} {name}"
    return f"{said} {part}", f"{hour}:{minute:02}"


def addition(terms: list[int]) -> Pair:
    """Write a sum or difference with its value; a negative term is subtracted: "nine minus two is seven"."""
    words, digits = number(terms[0]), str(terms[0])
    for term in terms[1:]:
        words += f" {'minus' if term < 0 else 'plus'} {number(abs(term))}"
        digits += f" {'-' if term < 0 else '+'} {abs(term)}"
    return f"{words} is {number(sum(terms))}", f"{digits} = {sum(terms)}"


def draw_number(random: SplitMix64) -> Pair:
    """Draw a number of up to six digits, each count of digits as often."""
    n = random.below(10 ** (1 + random.below(6)))
    return number(n), str(n)


def draw_date(random: SplitMix64) -> Pair:
    """Draw a day of the years 1100 to 2099."""
    return date(1100 + random.below(1000), 1 + random.below(12), 1 + random.below(28))


def draw_clock(random: SplitMix64) -> Pair:
    """Draw a time of the day; every second one is a multiple of five minutes."""
    return clock(random.below(24), random.below(60) if random.below(2) else 5 * random.below(12))


def draw_sum(random: SplitMix64, n_terms: int) -> Pair:
    """Draw a sum of terms below 100 whose value is not negative."""
    terms = [random.below(100)]
    while len(terms) < n_terms:
        term = random.below(100)
        terms.append(-term if random.below(2) and term <= sum(terms) else term)
    return addition(terms)
