"""Long documents in chunks, each encoded as it would be within the whole document.

A chunk is encoded behind a context, the end of the chunk before, whose tokens are then removed. So a tokenizer that
puts a space in front of a text (Llama 2's) does it once per document, and no token is divided at a cut.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from mlx_transformer.data.documents import Part
from mlx_transformer.data.tokenizers import Tokenizer

CONTEXT = 1000  # characters on both sides of a cut; the tokens there do not depend on text farther away
_WINDOW = 1 << 16  # characters at the end of a part, among which it may be cut
_TRIES = 20  # cuts of each kind
_CUTS = (re.compile(r"\n(?=\S)"), re.compile(r"\w(?= \w)"))  # behind a newline, before a space between words


class Chunk(NamedTuple):
    """A part of a document."""

    text: str
    context: str  # the text before it; empty at the beginning of the document
    ends: bool  # whether it ends the document


def chunks(parts: Iterable[Part], tokenizer: Tokenizer) -> Iterator[Chunk]:
    """Move the cuts within documents to where the tokenizer has an end of a token."""
    held = context = ""
    for text, ends in parts:
        held += text
        if ends:
            yield Chunk(held, context, True)
            held = context = ""
        elif end := _cut(held, tokenizer):
            yield Chunk(held[:end], context, False)
            held, context = held[end:], held[max(0, end - CONTEXT) : end]


def encode_chunks(chunks: Sequence[Chunk], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the tokens of each chunk, without those of its context."""
    contexts = iter(tokenizer.encode_batch([chunk.context for chunk in chunks if chunk.context]))
    encoded = tokenizer.encode_batch([chunk.context + chunk.text for chunk in chunks])
    return [
        tokens[len(next(contexts)) :] if chunk.context else tokens
        for chunk, tokens in zip(chunks, encoded, strict=True)
    ]


def _cut(text: str, tokenizer: Tokenizer) -> int:
    """Return where to cut a text that continues, near its end; 0: it is too short."""
    last = len(text) - CONTEXT
    for end in _candidates(text, max(CONTEXT, last - _WINDOW), last):
        before = tokenizer.encode(text[end - CONTEXT : end])
        if tokenizer.encode(text[end - CONTEXT : end + CONTEXT])[: len(before)] == before:
            return end
    return max(0, last)


def _candidates(text: str, first: int, last: int) -> Iterator[int]:
    for pattern in _CUTS:
        ends = [match.end() for match in pattern.finditer(text, first, last)]
        yield from itertools.islice(reversed(ends), _TRIES)
    yield from range(last, max(first, last - _TRIES), -1)
