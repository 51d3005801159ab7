"""Parallel text: the built-in pairs are right, somebody's own are read line by line, batches hold each pair once."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from mlx_transformer.data.fables.teller import SplitMix64
from mlx_transformer.data.pairs import (
    PairBatches,
    kind_of,
    load_pairs,
    numbers,
    read_pairs,
    read_parallel,
    tokenize_pairs,
)
from mlx_transformer.data.pairs.generate import LONGER, LONGEST, draw_sentence, generate
from mlx_transformer.data.pairs.language import LEXICON
from mlx_transformer.data.pairs.stream import PAD, WIDTH, Sentences, Side
from mlx_transformer.data.tokenizers import train_tokenizer
from mlx_transformer.utils.errors import BadInput


def test_numbers_dates_times_and_sums_as_they_are_said():
    said = {0: "zero", 13: "thirteen", 40: "forty", 99: "ninety-nine", 100: "one hundred", 105: "one hundred and five"}
    said |= {2005: "two thousand and five", 12_345: "twelve thousand three hundred and forty-five"}
    said |= {700_001: "seven hundred thousand and one"}
    assert {n: numbers.number(n) for n in said} == said
    assert [numbers.ordinal(n) for n in (1, 2, 3, 5, 9, 12, 20, 21, 30)] == [
        *("first", "second", "third", "fifth", "ninth", "twelfth", "twentieth", "twenty-first", "thirtieth")
    ]
    assert numbers.date(1984, 5, 3) == ("the third of May nineteen eighty-four", "1984-05-03")
    assert [numbers.year(n) for n in (1905, 1900, 2000, 2007, 2026)] == [
        *("nineteen oh five", "nineteen hundred", "two thousand", "two thousand and seven", "twenty twenty-six")
    ]
    times = {(0, 0): "twelve o'clock in the morning", (17, 45): "a quarter to six in the afternoon"}
    times |= {(12, 10): "ten past twelve in the afternoon", (23, 59): "one minute to twelve in the evening"}
    times |= {(9, 17): "seventeen minutes past nine in the morning"}
    assert {time: numbers.clock(*time)[0] for time in times} == times
    assert numbers.addition([40, -8, 9]) == ("forty minus eight plus nine is forty-one", "40 - 8 + 9 = 41")


def test_words_and_digits_determine_each_other():
    pairs = [numbers.clock(hour, minute) for hour in range(24) for minute in range(60)]
    pairs += [(numbers.number(n), str(n)) for n in (*range(2000), *range(0, 10**6, 997))]
    pairs += [numbers.date(year, 3, 1) for year in range(1100, 2100)]
    assert len({words for words, _ in pairs}) == len({digits for _, digits in pairs}) == len(set(pairs))


def test_a_pair_says_of_which_kind_it_is():
    drawn = (numbers.draw_number, numbers.draw_date, numbers.draw_clock, lambda random: numbers.draw_sum(random, 4))
    random = SplitMix64(3)
    for draw, kind in zip(drawn, ("numbers", "dates", "times", "sums"), strict=True):
        pairs = [draw(random) for _ in range(200)]
        assert {kind_of(pair) for pair in pairs} == {kind_of(pair[::-1]) for pair in pairs} == {kind}
    assert {kind_of(draw_sentence(random, 1, LONGEST)) for _ in range(200)} == {"sentences"}


def test_every_sentence_has_one_translation_and_its_verb_last():
    random, found, roots = SplitMix64(1), {}, {stem.velan for name in LEXICON for stem in LEXICON[name]}
    verbs = "|".join(stem.velan for name in LEXICON if name.endswith("transitive") for stem in LEXICON[name])
    assert len(roots) == sum(map(len, LEXICON.values()))
    for _ in range(3000):
        english, velan = draw_sentence(random, 1, LONGEST)
        assert found.setdefault(english, velan) == velan
        assert re.fullmatch(rf"({verbs})(te|ne|ve)[ao]i?", velan.split()[-1])
    assert len(set(found.values())) > 0.97 * len(found)  # "a cat" and, at another place, nothing else


def test_velan_of_a_sentence():
    """A fixed sentence of the generator: agreement and cases, checked by hand."""
    random = SplitMix64(2)
    pairs = [draw_sentence(random, 3, 9) for _ in range(400)]
    plain = [(e, v) for e, v in pairs if re.fullmatch(r"the (\w+)s (watched|loved|followed|washed) the (\w+)", e)]
    assert plain
    for english, velan in plain:
        subject, article, thing, other, verb = velan.split()
        assert subject[-2:] in ("ai", "oi"), english  # nominative plural
        assert thing[-2:] in ("an", "on")  # accusative singular
        assert article == f"s{subject[-2:]}"
        assert other == f"s{thing[-2:]}"
        assert verb.endswith(f"te{subject[-2:]}")  # past, agrees with the subject


def test_the_splits_are_disjoint_and_the_longer_ones_longer():
    counts = {"valid": 100, "longer": 100, "train": 2000}
    found = list(generate(counts))
    assert found == list(generate(counts))
    assert Counter(split for split, _ in found) == counts
    assert len({source for _, (source, _) in found}) == len(found)
    sentences = {split: [p for s, p in found if s == split and p[1].split()[-1].isalpha()] for split in counts}
    words = {
        split: [len(english.split()) for english, _ in own if english[0].isalpha()] for split, own in sentences.items()
    }
    assert max(words["train"]) <= LONGEST + 3  # sums and dates in words are no sentences
    assert sum(LONGEST < n <= LONGER for n in words["longer"]) > 80
    text = "\n".join("\t".join(pair) for _, pair in found)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "f42ff2bca72ea811"


def test_own_pairs_and_the_lines_that_are_none(tmp_path):
    path = tmp_path / "own.tsv"
    lines = [
        "one\tun",
        "no tab",
        "\tempty",
        "two \t deux\tsome licence",
        "",
        "three\t",
        *(f"w{i}\tx{i}" for i in range(40)),
    ]
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    said = []
    corpus = load_pairs(str(path), say=said.append)
    assert said == [
        f"data: {path}, its end held out: 40 training and 2 validation pairs; "
        "left out: 1 line without a tab, 2 lines with an empty side"
    ]
    assert read_pairs(corpus, "train")[:2] == [("one", "un"), ("two", "deux")]
    assert read_pairs(corpus, "valid") == [("w38", "x38"), ("w39", "x39")]
    assert read_pairs(corpus, "longer") == []
    assert load_pairs(str(path), stories=5, say=said.append).train_documents == 5
    held_out = tmp_path / "held_out.tsv"
    held_out.write_text("w3\tx\n")
    assert load_pairs(str(path), str(held_out), say=said.append).duplicates_removed == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a b\nc d\n", "has 0 pairs to use \\(2 lines without a tab\\): expected UTF-8 text"),
        (b"a\tb\n", "has 1 pair to use: expected"),
        (b"a\tb\n\xff\tc\n", "is not UTF-8 text: byte 4"),
        (b"a\tb\0\n", "is NUL"),
        (b"", "has 0 pairs to use"),
    ],
)
def test_texts_without_pairs(content, words, tmp_path):
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        load_pairs(str(path), say=lambda message: None)
    with pytest.raises(BadInput, match="no file; a translator takes pairs"):
        load_pairs(str(tmp_path), say=lambda message: None)


def test_bad_settings():
    for settings, words in (
        ({"data": "fables"}, "--data fables has no translations"),
        ({"valid": "x"}, "--valid x goes with --data PATH"),
        ({"stories": 0}, "--stories 0 is not a number of pairs"),
    ):
        with pytest.raises(BadInput, match=words):
            load_pairs(**settings, say=lambda message: None)


def test_sentences_that_are_too_long_are_counted(tmp_path):
    path, said = tmp_path / "own.tsv", []
    path.write_text(
        "".join(f"w{i}\t{''.join(chr(97 + (7 * i + 5 * j) % 26) for j in range(7 * i % 20 + 1))}\n" for i in range(60))
    )
    corpus = load_pairs(str(path), say=said.append)
    tokens = tokenize_pairs(corpus, train_tokenizer("bpe", corpus, 262), 8, said.append)
    assert re.fullmatch(r"\d+ of 57 training pairs have more than 8 tokens on a side and are left out", said[1])
    assert 0 < len(tokens.train.sources) < 57
    assert tokens.epoch_tokens == sum(len(row) - 1 for row in tokens.train.targets)
    assert read_parallel(str(path))[0] == ("w0", "a")
    with pytest.raises(BadInput, match="no training pair has at most 2 tokens on each side"):
        tokenize_pairs(corpus, tokens.tokenizer, 2, said.append)


@pytest.fixture
def side():
    random = np.random.default_rng(0)
    lengths = random.integers(2, 30, (200, 2))
    # the first token of each sentence is its number
    return Side(*(Sentences([[i, *[7] * (n - 1)] for i, n in enumerate(column)]) for column in lengths.T.tolist()))


def test_an_epoch_has_every_pair_once(side):
    batches = PairBatches(side, 4, 32, seed=1)
    drawn, seen = Counter(), []
    while sum(drawn.values()) < 2 * len(side.sources):
        batch = next(batches)
        assert batch.shape[2] % WIDTH == 0
        assert batch.shape[0] == 4 * 32 // batch.shape[2]
        assert (batch[:, 0, 0] == batch[:, 1, 0]).all()  # a source and its own target
        for row in batch:
            lengths = (row != PAD).sum(1)
            assert lengths.max() > batch.shape[2] - WIDTH
            assert all((one[:n] != PAD).all() for one, n in zip(row, lengths, strict=True))
        drawn.update(batch[:, 0, 0].tolist())
        seen.append(batch.shape)
    assert min(drawn.values()) >= 1
    assert max(drawn.values()) <= 4  # the smallest class of lengths fills its batch by further passes
    assert len(set(seen)) == len({shape[2] for shape in seen}) == 4


def test_a_restored_stream_goes_on_exactly(side):
    batches, other = PairBatches(side, 4, 32, seed=1), PairBatches(side, 4, 32, seed=1)
    for _ in range(23):
        next(batches)
    other.restore(batches.state())
    assert all((next(batches) == next(other)).all() for _ in range(30))
    assert (next(PairBatches(side, 4, 32, seed=2)) != next(PairBatches(side, 4, 32, seed=1))).any()
    with pytest.raises(BadInput, match="does not belong to these pairs, --seed 2"):
        PairBatches(side, 4, 32, seed=2).restore(batches.state())


def test_every_target_counts_once_in_evaluation(side):
    batches = side.in_order(64)
    counted = np.concatenate([batch[:, 1, 1:][mask] for batch, mask in batches])
    assert len(counted) == side.predicted == sum(len(row) - 1 for row in side.targets)
    assert len({batch.shape for batch, _ in batches}) == 4
