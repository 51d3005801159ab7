"""Token files: a corpus as one array of token ids on disk, EOS, document, EOS, document, EOS, ...

Each document begins with BOS if the tokenizer has a BOS token other than EOS.
"""

import hashlib
import json
import re
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_transformer.data.corpus import Corpus
from mlx_transformer.data.documents import Part, read_parts
from mlx_transformer.data.store import cached_folder, progress
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.utils.files import write_json

MAX_VALID_TOKENS = 1_000_000
_BATCH_CHARACTERS = 4 << 20  # per call of the tokenizer: enough for every core, about 100 MB as Python lists
_VERSION = 2  # of the files: part of the cache key


@dataclass(frozen=True)
class Tokens:
    """A tokenized corpus. The facts about `valid` are those of its first documents, MAX_VALID_TOKENS at max_tokens."""

    train: np.ndarray  # (T,) uint16 or uint32, memory-mapped, read-only
    valid: np.ndarray  # (V,) likewise
    eos_id: int
    valid_bytes: int  # UTF-8, without separators: the denominator of bits per byte
    valid_documents: int
    floor_bits: float | None  # -log2 of the probability of these documents, if their generator is known
    unknown_rate: float  # share of unknown tokens in `valid`, EOS and BOS not counted
    lossless: bool  # every validation document is decoded unchanged, so that bits per byte are meaningful
    tokenizer: Tokenizer | None = None  # the tokenizer of the token ids


def tokenize_corpus(corpus: Corpus, tokenizer: Tokenizer, say: Callable[[str], None] = print) -> Tokens:
    """Tokenize both splits, a few megabytes at a time, or open the token files that are there.

    The cache key is the content of the corpus and of the tokenizer. Raises BadInput if the disk is full.
    """
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 65_535 else np.dtype("<u4")

    def build(folder: Path) -> None:
        with progress("tokenizing", corpus.train_bytes) as advance, open(folder / "train.bin", "wb") as out:
            _write_train(out, corpus, tokenizer, dtype, advance)
        valid, facts = encode_text(corpus.valid, tokenizer, MAX_VALID_TOKENS)
        valid.astype(dtype).tofile(folder / "valid.bin")
        write_json(folder / "tokens.json", facts)

    key = hashlib.sha256(repr((_VERSION, corpus.sha256, tokenizer.sha256, MAX_VALID_TOKENS)).encode()).hexdigest()[:20]
    folder = cached_folder("tokens", f"{tokenizer.kind}-{key}", build)
    facts = json.loads((folder / "tokens.json").read_text())
    whole = facts["valid_bytes"] == corpus.valid_bytes
    if not whole:
        say(f"evaluating on the first {facts['valid_bytes']:,} of {corpus.valid_bytes:,} bytes of validation text")
    train = np.memmap(folder / "train.bin", dtype, mode="r")
    valid = np.fromfile(folder / "valid.bin", dtype)
    floor_bits = corpus.floor_bits if whole else None
    return Tokens(train, valid, tokenizer.eos_id, floor_bits=floor_bits, tokenizer=tokenizer, **facts)


def _write_train(
    out: BinaryIO, corpus: Corpus, tokenizer: Tokenizer, dtype: np.dtype, advance: Callable[[int], None]
) -> None:
    out.write(np.array([tokenizer.eos_id], dtype).tobytes())
    bos_id, begins = _bos(tokenizer), True
    for batch in _batches(read_parts(corpus.train)):
        texts = [text for text, _ in batch]
        tokens: list[int] = []
        for encoded, (_, ends) in zip(tokenizer.encode_batch(texts), batch, strict=True):
            tokens += [*(bos_id if begins else ()), *encoded, *([tokenizer.eos_id] if ends else ())]
            begins = ends
        out.write(np.array(tokens, dtype).tobytes())
        advance(sum(map(len, texts)))


def _bos(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens between EOS and a document."""
    bos_id = tokenizer.bos_id
    return [] if bos_id == tokenizer.eos_id else [bos_id]


def _batches(parts: Iterator[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part[0])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_text(path: Path, tokenizer: Tokenizer, max_tokens: int = sys.maxsize) -> tuple[np.ndarray, dict[str, Any]]:
    """Encode the first documents of a text that fit `max_tokens`, as a validation split.

    Returns token ids (V,) uint32 and the facts about them: valid_bytes, valid_documents, unknown_rate, lossless.
    """
    tokens, bos_id = array("I", [tokenizer.eos_id]), _bos(tokenizer)
    documents, size, lossless = 0, 0, tokenizer.lossless
    for text, encoded in _valid_documents(path, tokenizer, max_tokens):
        if len(tokens) + len(bos_id) + len(encoded) + 1 > max_tokens:
            if documents:
                break
            text, encoded = _whole_lines(text, tokenizer, max_tokens - 2 - len(bos_id))
        tokens.extend([*bos_id, *encoded, tokenizer.eos_id])
        documents += 1
        size += len(text.encode())
        lossless = lossless and tokenizer.decode(encoded) == text
    within = len(tokens) - 1 - documents * (1 + len(bos_id))
    unknown = sum(token == tokenizer.unk_id for token in tokens) / max(1, within)
    facts = {"valid_bytes": size, "valid_documents": documents, "unknown_rate": unknown, "lossless": lossless}
    return np.array(tokens, np.uint32), facts


def _valid_documents(path: Path, tokenizer: Tokenizer, max_tokens: int) -> Iterator[tuple[str, list[int]]]:
    """Yield documents with their tokens; of one longer than `max_tokens`, only a beginning that is longer too."""
    texts: list[str] = []
    tokens: list[int] = []
    for text, ends in read_parts(path):
        if len(tokens) <= max_tokens:
            texts.append(text)
            tokens += tokenizer.encode(text)
        if ends:
            yield "".join(texts), tokens
            texts, tokens = [], []


def _whole_lines(text: str, tokenizer: Tokenizer, max_tokens: int) -> tuple[str, list[int]]:
    """Return the first lines of a text that fit `max_tokens`, and their tokens; of a too long first line, what fits."""
    tokens: list[int] = []
    end = 0
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        encoded = tokenizer.encode(line)
        if len(tokens) + len(encoded) > max_tokens:
            break
        tokens += encoded
        end += len(line)
    if end:
        return text[:end], tokens
    cut = tokenizer.decode(tokenizer.encode(text)[:max_tokens]).rstrip("\N{REPLACEMENT CHARACTER}")
    return cut, tokenizer.encode(cut)[:max_tokens]
