"""Words that a fable's own state determines: does a model find them likelier than the other words of their kind?"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_transformer.data.fables import GROUPS, Bound, bound_words
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.nn.model import Model
from mlx_transformer.train.evaluate import batch_tokens, without_dropout

STORIES = 200


class Place(NamedTuple):
    """A determined word: what binds it, its first token and those of its rivals; `at` is that token in the story."""

    group: str
    at: int
    right: int
    rivals: tuple[int, ...]


class Bindings:
    """The determined words of fables, encoded once.

    A word is right if its first token has a higher logit than the first token of every other word of its kind, after
    the true text (teacher forcing). Stories longer than seq_len are read in windows that overlap by half, so that at
    least half of the context precedes each word but the first ones. Text that is no fable is left out.
    """

    def __init__(self, stories: Sequence[str], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.first = cache(lambda text: tokenizer.encode(text)[0])
        self.stories = [self._read(story) for story in stories]

    def __call__(self, model: Model) -> dict[str, dict[str, float]]:
        """Return {"words": count, "right": share, "chance": mean of 1 / words of the kind} by group, of those met."""
        found: dict[str, list[tuple[bool, float]]] = {}
        with without_dropout(model):
            for places, logits in self._logits(model):
                for place, row in zip(places, logits, strict=True):
                    right = bool(row[place.right] > row[list(place.rivals)].max())
                    found.setdefault(place.group, []).append((right, 1 / (1 + len(place.rivals))))
        return {
            group: {"words": len(found[group]), "right": right, "chance": chance}
            for group in GROUPS
            if group in found
            for right, chance in [np.mean(found[group], axis=0).tolist()]
        }

    def _read(self, story: str) -> tuple[list[int], list[Place]]:
        """Return the tokens of a story after EOS, and its determined words, each with a rival of another token."""
        ids = self.tokenizer.encode(story)
        parts = [self.tokenizer.decode([token]) for token in ids]
        if "".join(parts) != story:  # a tokenizer that loses something: no places
            return [], []
        ends = np.cumsum([len(part) for part in parts])
        places = [self._place(story, ids, ends, word) for word in bound_words(story)]
        return [self.tokenizer.eos_id, *ids], [place for place in places if place.rivals]

    def _place(self, story: str, ids: Sequence[int], ends: np.ndarray, word: Bound) -> Place:
        at = int(np.searchsorted(ends, word.start, side="right"))
        lead = story[int(ends[at - 1]) if at else 0 : word.start]  # a token may begin with the space before a word
        rivals = {self.first(lead + rival) for rival in word.rivals} - {ids[at]}
        return Place(word.group, at + 1, ids[at], tuple(rivals))

    def _logits(self, model: Model) -> Iterator[tuple[list[Place], np.ndarray]]:
        """Yield the words of each window, and the logits of their first tokens (words, V)."""
        length = model.config.seq_len
        windows = [window for tokens, places in self.stories for window in _windows(tokens, places, length)]
        size = max(1, batch_tokens() // length)
        for i in range(0, len(windows), size):
            part = windows[i : i + size]
            batch = np.full((len(part), length), self.tokenizer.eos_id)
            for row, (tokens, _, _) in zip(batch, part, strict=True):
                row[: len(tokens)] = tokens
            rows = [row for row, (_, places, _) in enumerate(part) for _ in places]
            columns = [place.at - 1 - start for _, places, start in part for place in places]
            logits = model(mx.array(batch))[mx.array(rows), mx.array(columns)].astype(mx.float32)
            yield [place for _, places, _ in part for place in places], np.array(logits)


def _windows(tokens: list[int], places: list[Place], length: int) -> Iterator[tuple[list[int], list[Place], int]]:
    """Yield the inputs of each window that predicts a word, these words, and where it starts."""
    step = max(1, length // 2)
    starts = [-(-max(0, place.at - length) // step) * step for place in places]
    for start in sorted(set(starts)):
        own = [place for place, first in zip(places, starts, strict=True) if first == start]
        yield tokens[start : start + length], own, start
