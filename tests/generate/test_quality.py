"""The quality figures, against their definitions written out and against counts by hand."""

import re
import sys
import types
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_transformer.generate import quality as module
from mlx_transformer.generate.quality import (
    TrainingText,
    distinct,
    fables_shares,
    known_words,
    quality,
    repetition,
    words,
)


class Letters:
    """A tokenizer whose tokens are characters; 0 is EOS."""

    eos_id = 0

    def decode(self, ids):
        assert self.eos_id not in ids
        return "".join(map(chr, ids))


def tokens_of(documents):
    return np.array([0, *(token for text in documents for token in [*map(ord, text), 0])], np.uint16)


def test_words_are_lower_case_without_punctuation():
    assert words("Don’t STOP, Lily!\n'Yes,' she said; 3 apples_pears.") == [
        *("don't", "stop", "lily", "yes", "she", "said", "3", "apples", "pears"),
    ]
    assert words(" ... \ufffd") == []


def test_marks_belong_to_their_word():
    assert words("De\u0301ja\u0300 vu: हिन्दी में; בָּרָא ❤️") == ["de\u0301ja\u0300", "vu", "हिन्दी", "में", "בָּרָא"]


@given(st.text() | st.text("ab_'’ \n,3é"))
def test_words_without_marks_are_letters_digits_and_apostrophes(text):
    former = re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))
    assert words(text) == former or any(unicodedata.category(char)[0] in "MC" for char in text.lower())


def test_distinct_counts_n_grams_within_texts():
    stories = [list("abab"), list("ab")]
    assert distinct(stories, 1) == 2 / 6
    assert distinct(stories, 2) == 2 / 4  # ab, ba, ab | ab: none spans two texts
    assert distinct(stories, 3) == 2 / 2
    assert distinct([[1, 2], []], 3) is None


def test_repetition_is_what_occurs_earlier_in_the_same_text():
    assert repetition([list("abcde")] * 2) == 0
    assert repetition([list("abcdabcd")]) == pytest.approx(1 / 5)
    assert repetition([list("aaaaaa"), list("abcd")]) == pytest.approx(2 / 4)
    assert repetition([[], ["a"]]) is None


def test_known_words_counts_every_occurrence():
    assert known_words("The cat, the dog, the zorp", {"the", "cat", "dog"}) == 5 / 6
    assert known_words("!", {"the"}) is None


word_lists = st.lists(st.sampled_from("abcd"), max_size=12)


@given(text=word_lists, training=st.lists(word_lists, max_size=5))
def test_copied_span_is_the_longest_common_run(text, training):
    def stands(run):
        return any(run == document[i : i + len(run)] for document in training for i in range(len(document)))

    runs = [text[i:j] for i in range(len(text)) for j in range(i, len(text) + 1)]
    longest = max(len(run) for run in [*runs, []] if not run or stands(run))
    found = TrainingText(map(" ".join, training)).longest_copied_span(" ".join(text))
    assert len(found) == longest
    assert not found or stands(found)


def test_a_copied_span_ignores_case_and_does_not_cross_documents():
    training = TrainingText(["Once upon a time, there was a cat.", "It sat down."])
    assert training.longest_copied_span("Then: there was a CAT! It sat.") == ["there", "was", "a", "cat"]
    assert training.longest_copied_span("") == []
    assert TrainingText([]).longest_copied_span("a cat") == []


def test_quality_measures_what_was_written_after_the_prompt():
    stories = [
        {"prompt": "Once upon a time", "text": "Once upon a time a cat sat. A zorp sat."},
        {"prompt": "The", "text": "The"},
    ]
    figures = quality(stories, tokens_of(["Once upon a time a cat sat down."]), Letters())
    assert figures["stories"] == 2
    assert figures["words"] == 6
    assert figures["distinct_1"] == 4 / 6
    assert figures["known_words"] == 5 / 6
    assert (figures["longest_copied_span"], figures["longest_copied_text"]) == (3, "a cat sat")
    assert figures["training_share_read"] == 1
    assert "grammatical" not in figures


def test_quality_of_nothing_is_null_not_an_error():
    figures = quality([], tokens_of([]), Letters())
    assert figures["words"] == figures["longest_copied_span"] == 0
    assert figures["distinct_1"] is figures["repetition"] is figures["known_words"] is None


def test_a_long_training_text_is_read_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(module, "MAX_TRAINING_TOKENS", 10)
    figures = quality([{"prompt": "", "text": "one two three"}], tokens_of(["one two", "three"]), Letters())
    assert figures["longest_copied_span"] == 2
    assert figures["training_tokens_read"] == 10
    assert figures["training_share_read"] == 10 / 15


def test_shares_of_no_sentence_are_not_known():
    assert fables_shares(["", " "])["consistent_sentences"] is None


def test_fables_are_scored_whole_and_those_cut_off_are_counted_apart(monkeypatch):
    def score(text):
        facts = {"sentences": text.count("."), "grammatical_share": 1.0, "consistent_share": 0.5 * ("sat" in text)}
        right = {"grammatical": text.startswith("A cat"), "consistent": "sat" in text, "complete": text.endswith(".")}
        return types.SimpleNamespace(**facts, **right)

    fables = types.ModuleType("fables")
    fables.score = score
    monkeypatch.setitem(sys.modules, "mlx_transformer.data.fables", fables)
    figures = quality([], tokens_of(["A cat sat."]), Letters(), ("A cat sat.", "A cat ran.", "A", "It."))
    assert figures["judged_stories"] == 4
    assert figures["grammatical"] == 2 / 3
    assert figures["consistent"] == 1 / 3
    assert figures["cut_off"] == 1 / 4
    assert figures["grammatical_sentences"] == 1
    assert figures["consistent_sentences"] == pytest.approx(0.5 / 3)
