"""Quality figures of generated text: variety, repetition, known words, memorization, the fables' grammar.

A word is a run of letters, their marks and digits, with apostrophes inside it, in lower case; punctuation and layout do
not count. A share of nothing (an empty text) is None, which JSON writes as null.
"""

from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_transformer.data.tokenizers import Tokenizer, split_words

MAX_TRAINING_TOKENS = 5_000_000  # searched for known words and copied spans: 4 s and 200 MB, whatever the corpus


def words(text: str) -> list[str]:
    """Split a text into words, in lower case and with plain apostrophes."""
    text = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").replace("_", " ")
    return [word for word in split_words(text) if word[0].isalnum()]


def distinct(texts: Iterable[Sequence[Hashable]], n: int) -> float | None:
    """Compute distinct-n (Li et al. 2016): different n-grams / n-grams, over all texts together, in (0, 1].

    texts: sequences of words or of tokens, of which no n-gram spans two. The figure falls with the number of words, so
    compare samples of equal length only.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts: Iterable[Sequence[Hashable]], n: int = 4) -> float | None:
    """Compute the share of n-grams that occur earlier in the same text, over all texts together, in [0, 1)."""
    grams = [_grams(text, n) for text in texts]
    total = sum(map(len, grams))
    return 1 - sum(len(set(own)) for own in grams) / total if total else None


def known_words(text: str, vocabulary: Mapping[str, Any] | set[str]) -> float | None:
    """Compute the share of a text's words, each occurrence counted, that the vocabulary has, in [0, 1]."""
    return _share(word in vocabulary for word in words(text))


class TrainingText:
    """Index of the words of the training documents: a vocabulary, and a search for copied spans.

    Takes 8 to 12 bytes per word; documents are read once.
    """

    def __init__(self, documents: Iterable[str]):
        self.vocabulary: dict[str, int] = {}
        ids = array("i")
        for document in documents:
            ids.extend([self.vocabulary.setdefault(word, len(self.vocabulary)) for word in words(document)])
            ids.append(-1)  # no span crosses documents
        sequence = np.frombuffer(ids, np.int32) if ids else np.empty(0, np.int32)
        self._places = np.argsort(sequence, kind="stable").astype(np.int32)
        self._starts = np.searchsorted(sequence[self._places], np.arange(len(self.vocabulary) + 1))

    def longest_copied_span(self, text: str) -> list[str]:
        """Find the longest run of the text's words that occurs in one training document; the first of equal ones.

        For each word, the length of the run that ends at each of its places in training is one more than that of the
        run that ended one place before. Takes about 0.1 ms per word and million of training words.
        """
        sequence = words(text)
        runs = np.zeros(len(self._places) + 1, np.int32)  # [place + 1]: the length of the run that ends at place
        before = np.empty(0, np.int32)
        longest, end = 0, 0
        for position, word in enumerate(sequence):
            here = self._places_of(word)
            lengths = runs[here] + 1
            runs[before + 1] = 0
            runs[here + 1] = lengths
            before = here
            if len(here) and lengths.max() > longest:
                longest, end = int(lengths.max()), position + 1
        return sequence[end - longest : end]

    def _places_of(self, word: str) -> np.ndarray:
        number = self.vocabulary.get(word)
        if number is None:
            return np.empty(0, np.int32)
        return self._places[self._starts[number] : self._starts[number + 1]]


def fables_shares(stories: Sequence[str]) -> dict[str, float | None]:
    """Score whole stories by the fables' grammar; each value is a share in [0, 1].

    grammatical: the grammar derives the story. consistent: names, possessions, places and counts also agree throughout.
    Both over the stories that ended or made a mistake; cut_off is the share that a length limit ended before either.
    *_sentences: sentences before the first such mistake / sentences.
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
    """Compute every figure over records {"prompt", "text"}, of whose text the part after the prompt counts.

    train_tokens: training documents with EOS between them, of which the first MAX_TRAINING_TOKENS are searched.
    judged: unconditional samples of the fables, to be scored whole.
    """
    written = [story["text"].removeprefix(story["prompt"]) for story in stories]
    sequences = [words(text) for text in written]
    training = TrainingText(documents(train_tokens[:MAX_TRAINING_TOKENS], tokenizer))
    copied = max((training.longest_copied_span(text) for text in written), key=len, default=[])
    figures = {
        "stories": len(written),
        "words": sum(map(len, sequences)),
        **{f"distinct_{n}": distinct(sequences, n) for n in (1, 2, 3)},
        "repetition": repetition(sequences),
        "known_words": known_words("\n".join(written), training.vocabulary),
        "longest_copied_span": len(copied),
        "longest_copied_text": " ".join(copied),
        "training_tokens_read": min(len(train_tokens), MAX_TRAINING_TOKENS),
        "training_share_read": min(1.0, MAX_TRAINING_TOKENS / max(1, len(train_tokens))),
    }
    if judged:
        figures |= {"judged_stories": len(judged), **fables_shares(judged)}
    return figures


def _share(hits: Iterable[bool]) -> float | None:
    values = [bool(hit) for hit in hits]
    return sum(values) / len(values) if values else None


def _average(values: Sequence[float], weights: Sequence[int]) -> float | None:
    return float(np.average(values, weights=weights)) if any(weights) else None


def _grams(sequence: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(sequence[start : start + n]) for start in range(len(sequence) - n + 1)]


def documents(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of each document of a training or validation split."""
    tokens = np.asarray(tokens)
    for document in np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id)):
        if len(ids := document[document != tokenizer.eos_id]):
            yield tokenizer.decode(ids.tolist())
