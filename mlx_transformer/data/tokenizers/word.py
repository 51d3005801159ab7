"""The word-level tokenizer, and how its vocabulary is learned."""

import json
from collections import Counter
from collections.abc import Sequence

from mlx_transformer.data.tokenizers.base import Tokenizer
from mlx_transformer.data.tokenizers.split import split_words


class WordTokenizer(Tokenizer):
    """Words, case kept; punctuation marks and newlines are tokens. Not lossless: `decode` guesses white space."""

    kind, version, lossless = "word", 3, False
    SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
    unk_id, eos_id = 1, 3
    _NOT_BEFORE = frozenset("\n.,!?;:%)]}'’”…-–—/।॥،؛؟־、。，！？；：")
    _NOT_AFTER = frozenset("\n([{‘“$#-–—/־、。，！？；：")

    def __init__(self, words: Sequence[str]):
        self._words = [*self.SPECIALS, *words]
        self._index = {word: i for i, word in enumerate(self._words) if i >= len(self.SPECIALS)}
        self.vocab_size = len(self._words)

    def encode(self, text: str) -> list[int]:
        return [self._index.get(word, self.unk_id) for word in split_words(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Join words as English is written; in a paragraph, straight double quotes open and close alternately."""
        text, before, quoted = [], "\n", False
        for word in (self._words[i] for i in ids if i == self.unk_id or i >= len(self.SPECIALS)):
            closes = word == '"' and quoted
            if not (closes or word in self._NOT_BEFORE or before in self._NOT_AFTER or (before == '"' and quoted)):
                text.append(" ")
            text.append(word)
            quoted = word != "\n" and quoted != (word == '"')
            before = word
        return "".join(text)

    def token(self, index: int) -> str:
        return self._words[index]

    def files(self) -> dict[str, bytes]:
        words = json.dumps(self._words[len(self.SPECIALS) :], ensure_ascii=False, indent=0)
        return {"tokenizer.words.json": words.encode()}


def train_words(sample: list[str], vocab_size: int) -> tuple[WordTokenizer, int]:
    """Return a tokenizer of the most frequent words, and the largest vocabulary that the sample supports."""
    counts = Counter(word for text in sample for word in split_words(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    specials = len(WordTokenizer.SPECIALS)
    return WordTokenizer(ranked[: vocab_size - specials]), len(ranked) + specials
