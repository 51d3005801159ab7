"""The built-in corpus: byte-identical stories, one derivation each, exact probabilities, scores that catch mistakes."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from math import log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transformer.data import fables
from mlx_transformer.data.fables import GROUPS, PLOTS, bound_words, derivations, generate, parse, score
from mlx_transformer.data.fables.lexicon import ALL_ITEMS, POOLS
from mlx_transformer.data.fables.plots import tell
from mlx_transformer.data.fables.teller import Author, Slot, SplitMix64
from mlx_transformer.data.fables.words import article, plural
from mlx_transformer.utils.errors import BadInput

SEEDS = st.integers(0, 2**64 - 1)
GOLDEN = "2912d2563295c081161db341574a15990bac73b4ea9f9b4baa59494ce20484e0"
SENTENCE = re.compile(r"(?<=[.!?\"]) (?=[A-Z\"])")


@pytest.fixture(scope="module")
def stories():
    return [generate(seed) for seed in range(2000)]


def golden_hash():
    return hashlib.sha256("\n".join(generate(seed).text for seed in range(50)).encode()).hexdigest()


def test_same_bytes_everywhere():
    # a change here changes the corpus: raise corpus.VERSION with it
    assert golden_hash() == GOLDEN


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_no_dependence_on_the_hash_seed(hash_seed):
    code = "from tests.data.test_fables import golden_hash; print(golden_hash())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True
    )
    assert done.stdout.strip() == GOLDEN, done.stderr


def test_splitmix64_is_the_published_one():
    # the first outputs for seed 1234567, from the reference implementation (prng.di.unimi.it/splitmix64.c)
    random = SplitMix64(1234567)
    assert [random.next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_splitmix64_below_is_uniform():
    random = SplitMix64(0)
    counts = [0] * 7
    for _ in range(7000):
        counts[random.below(7)] += 1
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 22.5  # chi-squared, 6 degrees, p = 0.001


def test_every_story_has_one_derivation_and_it_is_recovered(stories):
    for story in stories:
        assert derivations(story.text) == [story]


@given(SEEDS)
@settings(max_examples=200)
def test_parse_inverts_generate(seed):
    story = generate(seed)
    assert parse(story.text) == story
    assert score(story.text).consistent


def test_probability_is_the_product_of_the_decisions():
    author = Author(SplitMix64(5))
    tell(author)
    exact = Fraction(1)
    for weight, total in author._odds:
        exact *= Fraction(weight, total)
    assert 0 < exact < 1
    assert author.log2_prob == pytest.approx(log2(exact.numerator) - log2(exact.denominator), abs=1e-9)


def test_draws_follow_the_probabilities(stories):
    """Mean of -log2 P against the entropy from counts, for the one decision that every story makes first."""
    first = [story.derivation[0] for story in stories]
    expected = {0: 3 / 12, 1: 3 / 12, 2: 4 / 12, 3: 2 / 12}
    for choice, share in expected.items():
        assert abs(first.count(choice) / len(first) - share) < 0.04  # 4 standard deviations


def test_size_of_the_language(stories):
    words = {word.lower() for story in stories for word in re.findall(r"[A-Za-z][A-Za-z'-]*", story.text)}
    assert len(words) >= 1500
    assert len(PLOTS) >= 30
    assert {story.plot for story in stories} == set(PLOTS)


def test_repeats_are_out_of_question(stories):
    # the chance that two stories are equal is the mean of P: for n drawn, repeats expected are at most n^2 / 2 of it
    mean = sum(2**story.log2_prob for story in stories) / len(stories)
    assert 100_000**2 / 2 * mean < 1e-12
    assert len({story.text for story in stories}) == len(stories)


def test_pools_have_no_word_twice():
    for name, pool in POOLS.items():
        for form in ("", "a", "many", "at", "ed", "ing"):
            texts = [item.forms[form] for item in pool.items if form in item.forms]
            assert len(texts) == len(set(texts)), (name, form)


def test_english():
    assert [article(word) for word in ("apple", "unicorn", "honest", "ukulele", "hen")] == [
        "an apple",
        "a unicorn",
        "an honest",
        "a ukulele",
        "a hen",
    ]
    assert [plural(word) for word in ("berry", "toy car", "goose", "brush", "toy", "peach", "jump rope")] == [
        "berries",
        "toy cars",
        "geese",
        "brushes",
        "toys",
        "peaches",
        "jump ropes",
    ]


def test_grammar_of_the_texts(stories):
    vowel_sound = r"(?!uni|uku|use)[aeiou]|honest|honor"
    for story in stories:
        assert not re.search(rf"\b[Aa] ({vowel_sound})", story.text), story.text
        assert not re.search(rf"\b[Aa]n (?!{vowel_sound})", story.text), story.text
        assert not re.search(r"[.!?] [a-z]| {2}|\bone \w+s (was|is|were) left|\{|\}", story.text), story.text
        assert all(line and line == line.strip() for line in story.text.split("\n"))


class Liar(Author):
    """Replace some words that the story's state determines by others of their kind."""

    lies = 0

    def _fill(self, slot: Slot) -> str:
        said = super()._fill(slot)
        if slot.pool or slot.number or self._random.below(6):
            return said
        item = self.state[slot.key]
        others = [each for each in ALL_ITEMS if each.kind == item.kind and each.forms.get(slot.form, said) != said]
        other = others[self._random.below(len(others))]
        if item.kind == "number":  # so that the noun agrees
            self.state[slot.key] = other
        self.lies += 1
        return other.forms[slot.form]


def test_lies_are_grammatical_but_not_consistent():
    for seed in range(300):
        liar = Liar(SplitMix64(seed))
        tell(liar)
        scored = score(liar.text)
        assert scored.grammatical, liar.text
        assert scored.consistent == (liar.lies == 0), liar.text
        assert scored.complete
        assert (scored.slips == 0) == scored.consistent
        assert (scored.log2_prob is None) != scored.consistent


KNOWN = (
    "Once upon a time, there was a tidy and kind boy named Max. His lively big brother called him captain.\n"
    "One foggy day, Max picked nine tiny oranges at the farm. Dan, a quick mole, tiptoed by with a huge violet marble. "
    '"May I have some oranges?" whispered the heartbroken mole slowly. So Max put six oranges into a marvelous maroon '
    "sack for the mole. Now Max had three oranges left. The content mole gave Max a huge white bell.\n"
    '"You are so daring, captain," announced his big brother faintly.'
)


@pytest.mark.parametrize(
    ("right", "wrong", "grammatical", "consistent", "shares"),
    [
        ("nine tiny", "nine fat", True, True, (9, 9)),  # another free word: another story
        ("had three oranges", "had four oranges", True, False, (9, 6)),
        ("had three oranges", "had one oranges", False, False, (6, 6)),
        ("Now Max", "Now Dan", True, False, (9, 6)),
        ("gave Max", "gave Dan", True, False, (9, 7)),
        ("some oranges", "some apples", True, False, (9, 4)),
        ("The content mole", "The content duck", True, False, (9, 7)),
        ("so daring, captain", "so daring, champ", True, False, (9, 8)),
        ("captain.\n", "champ.\n", True, False, (9, 8)),
        ("His lively", "Her lively", True, False, (9, 1)),
        ("brother faintly", "sister faintly", True, False, (9, 8)),
        ("a quick mole", "an quick mole", False, False, (3, 3)),
        ("tiptoed by", "tiptoe by", False, False, (3, 3)),
        (" Now Max had three oranges left.", "", False, False, (6, 6)),
        ("farm.", "farm. Once upon a time.", False, False, (3, 3)),
        ("faintly.", "faintly. The end.", False, False, (9, 9)),
    ],
)
def test_score_of_a_known_story(right, wrong, grammatical, consistent, shares):
    assert KNOWN.count(right) == 1
    scored = score(KNOWN.replace(right, wrong))
    assert (scored.grammatical, scored.consistent, scored.complete) == (grammatical, consistent, True)
    sentences = scored.sentences
    assert (scored.grammatical_share, scored.consistent_share) == pytest.approx([n / sentences for n in shares])


def test_a_cut_story_is_not_complete():
    for cut in range(1, len(KNOWN) - 1):
        scored = score(KNOWN[:cut])
        assert not any((scored.complete, scored.grammatical, scored.consistent))
        assert scored.consistent_share == (1.0 if scored.sentences else 0.0)


def test_mutations_are_caught(stories):
    """Sentences dropped, doubled or swapped, words dropped or swapped: not this story, and hardly ever any story."""
    random = SplitMix64(0)
    still_stories = tried = 0
    for story in stories[:400]:
        sentences = SENTENCE.split(story.text)
        words = story.text.split(" ")
        i, j = random.below(len(sentences) - 1), random.below(len(words) - 1)
        for mutant in (
            " ".join(sentences[:i] + sentences[i + 1 :]),
            " ".join(sentences[: i + 1] + sentences[i:]),
            " ".join([*sentences[:i], sentences[i + 1], sentences[i], *sentences[i + 2 :]]),
            " ".join(words[:j] + words[j + 1 :]),
            " ".join([*words[:j], words[j + 1], words[j], *words[j + 2 :]]),
        ):
            read = parse(mutant)
            assert mutant == story.text or read != story
            tried += 1
            still_stories += read is not None and mutant != story.text
    assert still_stories < 0.02 * tried


@given(SEEDS, st.data())
@settings(max_examples=100)
def test_a_rival_of_a_determined_word_makes_the_story_inconsistent(seed, data):
    text = generate(seed).text
    found = bound_words(text)
    assert all(text[word.start : word.end] == word.item.forms[word.form] for word in found)
    assert [word.start for word in found] == sorted({word.start for word in found})
    assert {word.group for word in found} <= set(GROUPS)
    word = data.draw(st.sampled_from(found))
    rival = data.draw(st.sampled_from(word.rivals))
    assert parse(text[: word.start] + rival + text[word.end :]) is None


def test_stories_determine_words_of_every_group(stories):
    groups = Counter(word.group for story in stories[:100] for word in bound_words(story.text))
    assert set(groups) == set(GROUPS)
    assert min(groups.values()) > 20
    assert bound_words("Once upon a time, there was a mistake.") == []


@given(st.text(max_size=300))
@settings(max_examples=100)
def test_any_text_can_be_scored(text):
    assert not score(text).grammatical
    assert parse(text) is None


@given(SEEDS, st.data())
@settings(max_examples=50)
def test_parts_of_stories_can_be_scored(seed, data):
    """Parts of several stories, as a bad model writes: bounded work, shares within [0, 1]."""
    parts = [generate(seed + k).text for k in range(2)]
    cuts = [data.draw(st.integers(0, len(part))) for part in parts]
    scored = score(parts[0][: cuts[0]] + parts[1][cuts[1] :])
    assert 0 <= scored.consistent_share <= scored.grammatical_share <= 1


def test_write_corpus(tmp_path):
    info = fables.write_corpus(tmp_path, stories=60, valid_stories=30, seed=3)
    texts = {name: (tmp_path / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "valid")}
    documents = {name: text.split("\n<|endoftext|>\n") for name, text in texts.items()}
    assert [documents[name].pop() for name in ("train", "valid")] == ["", ""]
    assert (len(documents["train"]), len(documents["valid"])) == (60, 30) == (info.train_stories, info.valid_stories)
    assert not set(documents["train"]) & set(documents["valid"])
    assert info.train_bytes == sum(len(document.encode()) for document in documents["train"])
    assert info.valid_document_bytes == tuple(len(document.encode()) for document in documents["valid"])
    assert info.valid_document_bits == tuple(-parse(document).log2_prob for document in documents["valid"])
    assert info.valid_bits == pytest.approx(sum(info.valid_document_bits))
    assert info.floor_bpb == pytest.approx(info.valid_bits / info.valid_bytes)
    assert fables.FablesInfo.load(tmp_path) == info


def test_corpora_of_other_sizes_begin_alike(tmp_path):
    """More stories are the same stories and some more; another seed gives others."""
    texts = []
    for name, stories, seed in (("a", 5, 0), ("b", 9, 0), ("c", 5, 1)):
        (tmp_path / name).mkdir()
        fables.write_corpus(tmp_path / name, stories=stories, valid_stories=2, seed=seed)
        texts.append((tmp_path / name / "train.txt").read_text(encoding="utf-8"))
    assert texts[1].startswith(texts[0])
    assert texts[2] != texts[0]


def test_write_corpus_refuses_no_stories(tmp_path):
    with pytest.raises(BadInput, match="valid_stories is 0"):
        fables.write_corpus(tmp_path, stories=5, valid_stories=0)
    assert not list(tmp_path.iterdir())
