"""How good are the stories? Figures that need no judge: variety, repetition, known words, memorisation, fables' rules.

A word is a run of letters and digits, with apostrophes inside it, in lower case; punctuation and layout do not count.
A share of nothing (an empty story) is None, which JSON writes as null.
"""

import re
from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_transformer.data.tokenizers import Tokenizer

MAX_TRAINING_PIECES = 5_000_000  # read for known words and copied spans: 4 s and 200 MB, whatever the corpus

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of a text, in lower case, typographic apostrophes made plain."""
    return _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def distinct(stories: Iterable[Sequence[Hashable]], n: int) -> float | None:
    """distinct-n (Li et al. 2016): different n-grams / all n-grams of all stories together, in (0, 1].

    stories are sequences of words or of pieces; n-grams do not cross from one into the next. It falls with the
    length of the sample, so that only samples of equal length compare.
    """
    grams = [gram for story in stories for gram in _grams(story, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(stories: Iterable[Sequence[Hashable]], n: int = 4) -> float | None:
    """The share of n-grams that stood earlier in the same story already, in [0, 1); over all stories together."""
    grams = [_grams(story, n) for story in stories]
    total = sum(map(len, grams))
    return 1 - sum(len(set(of_story)) for of_story in grams) / total if total else None


def known_words(text: str, vocabulary: Mapping[str, Any] | set[str]) -> float | None:
    """The share of a text's words (each occurrence counts) that the vocabulary has, in [0, 1]."""
    return _share(word in vocabulary for word in words(text))


class TrainingText:
    """The words of the training documents and where each stands: answers which words are known and what was copied.

    8 to 12 bytes a word; documents are read once, as they come.
    """

    def __init__(self, documents: Iterable[str]):
        self.vocabulary: dict[str, int] = {}
        ids = array("i")
        for document in documents:
            ids.extend([self.vocabulary.setdefault(word, len(self.vocabulary)) for word in words(document)])
            ids.append(-1)  # no run of words goes through here
        sequence = np.frombuffer(ids, np.int32) if ids else np.empty(0, np.int32)
        self._places = np.argsort(sequence, kind="stable").astype(np.int32)
        self._starts = np.searchsorted(sequence[self._places], np.arange(len(self.vocabulary) + 1))

    def longest_copied_span(self, text: str) -> list[str]:
        """The longest run of the text's words that stands in one training document (the first of equals).

        For each word in turn, how long the run ending at each of its places in training is: one more than the run that
        ended one place before. Time goes with the places of the text's words, some 0.1 ms a word per million.
        """
        spoken = words(text)
        runs = np.zeros(len(self._places) + 1, np.int32)  # [place + 1]: the length of the run that ends at place
        before = np.empty(0, np.int32)
        longest, end = 0, 0
        for position, word in enumerate(spoken):
            here = self._places_of(word)
            lengths = runs[here] + 1
            runs[before + 1] = 0
            runs[here + 1] = lengths
            before = here
            if len(here) and lengths.max() > longest:
                longest, end = int(lengths.max()), position + 1
        return spoken[end - longest : end]

    def _places_of(self, word: str) -> np.ndarray:
        number = self.vocabulary.get(word)
        if number is None:
            return np.empty(0, np.int32)
        return self._places[self._starts[number] : self._starts[number + 1]]


def longest_copied_span(text: str, training: Iterable[str]) -> list[str]:
    """The longest run of the text's words that stands in one of the training documents; see `TrainingText`."""
    return TrainingText(training).longest_copied_span(text)


def fables_shares(stories: Sequence[str]) -> dict[str, float | None]:
    """How far whole stories keep to the fables' rules, each a share in [0, 1].

    grammatical: the grammar can have written the story; consistent: and names, possessions, places and counts are right
    from first to last. Both are of the stories that came to an end or made a mistake; cut_off is the share of what
    a length limit ended before either. The *_sentences are shares of sentences: those before a first mistake.
    """
    from mlx_transformer.data.fables import score

    scores = [score(story) for story in stories]
    judged = [each for each in scores if each.complete]
    sentences = [each.sentences for each in scores]
    return {
        "grammatical": _share(each.grammatical for each in judged),
        "consistent": _share(each.consistent for each in judged),
        "cut_off": _share(not each.complete for each in scores),
        "grammatical_sentences": _average([each.grammatical_share for each in scores], sentences),
        "consistent_sentences": _average([each.consistent_share for each in scores], sentences),
    }


def quality(
    stories: Sequence[Mapping[str, Any]], train_tokens: np.ndarray, tokenizer: Tokenizer, judged: Sequence[str] = ()
) -> dict[str, Any]:
    """Every figure over stories of {"prompt", "text"}, where text is the whole story and begins with the prompt.

    What the model wrote after the prompt is measured. train_tokens: documents between boundaries; the first
    MAX_TRAINING_PIECES of them are the training text here, and the result says how many that is. judged: fables that
    the model wrote from nothing, to be scored whole.
    """
    written = [story["text"].removeprefix(story["prompt"]) for story in stories]
    sequences = [words(text) for text in written]
    training = TrainingText(_documents(train_tokens[:MAX_TRAINING_PIECES], tokenizer))
    copied = max((training.longest_copied_span(text) for text in written), key=len, default=[])
    figures = {
        "stories": len(written),
        "words": sum(map(len, sequences)),
        **{f"distinct_{n}": distinct(sequences, n) for n in (1, 2, 3)},
        "repetition": repetition(sequences),
        "known_words": known_words("\n".join(written), training.vocabulary),
        "longest_copied_span": len(copied),
        "longest_copied_text": " ".join(copied),
        "training_pieces_read": min(len(train_tokens), MAX_TRAINING_PIECES),
        "training_share_read": min(1.0, MAX_TRAINING_PIECES / max(1, len(train_tokens))),
    }
    if judged:
        figures |= {"judged_stories": len(judged), **fables_shares(judged)}
    return figures


def _share(hits: Iterable[bool]) -> float | None:
    found = [bool(hit) for hit in hits]
    return sum(found) / len(found) if found else None


def _average(values: Sequence[float], weights: Sequence[int]) -> float | None:
    return float(np.average(values, weights=weights)) if any(weights) else None


def _grams(sequence: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(sequence[start : start + n]) for start in range(len(sequence) - n + 1)]


def _documents(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    tokens = np.asarray(tokens)
    for document in np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id)):
        pieces = document[document != tokenizer.eos_id]
        if len(pieces):
            yield tokenizer.decode(pieces.tolist())
