"""Token files: a corpus as one long array of pieces on disk, boundary, document, boundary, document, boundary, ...

A document begins with its opening where the tokenizer has one besides the boundary.
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

from mlx_transformer.data.corpus import Corpus, Part, read_parts
from mlx_transformer.data.store import cached_folder, progress
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.utils.files import write_json

MAX_VALID_TOKENS = 1_000_000
_BATCH_CHARACTERS = 4 << 20  # handed to the tokenizer at a time: enough for every core, some 100 MB as Python lists
_VERSION = 2  # of the files: part of the cache key


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus. What is said of `valid` is true of the documents kept in it, MAX_VALID_TOKENS at most."""

    train: np.ndarray  # (T,) uint16 or uint32, memory-mapped, read-only
    valid: np.ndarray  # (V,) likewise
    eos_id: int
    valid_bytes: int  # UTF-8, without separators: what bits per byte are counted over
    valid_documents: int
    floor_bits: float | None  # of exactly these documents
    unknown_rate: float  # unknown pieces among the validation pieces, boundaries not counted
    lossless: bool  # every validation document came back from its pieces: bits per byte mean something
    tokenizer: Tokenizer | None = None  # that made the token ids


def tokenize_corpus(corpus: Corpus, tokenizer: Tokenizer, say: Callable[[str], None] = print) -> Tokens:
    """Tokenise both splits, a few megabytes at a time, or open the files that were made before.

    Cached by the content of the corpus and of the tokenizer. Raises BadInput if the disk is full.
    """
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 65_535 else np.dtype("<u4")

    def build(folder: Path) -> None:
        with progress("tokenising", corpus.train_bytes) as advance, open(folder / "train.bin", "wb") as out:
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
        pieces: list[int] = []
        for encoded, (_, ends) in zip(tokenizer.encode_batch(texts), batch, strict=True):
            pieces += [*(bos_id if begins else ()), *encoded, *([tokenizer.eos_id] if ends else ())]
            begins = ends
        out.write(np.array(pieces, dtype).tobytes())
        advance(sum(map(len, texts)))


def _bos(tokenizer: Tokenizer) -> list[int]:
    """What stands between the boundary and a document."""
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


def encode_text(path: Path, tokenizer: Tokenizer, most: int = sys.maxsize) -> tuple[np.ndarray, dict[str, Any]]:
    """Encode the documents of a text as a validation split: token ids (V,) uint32, and the facts that `Tokens` has.

    Only the first documents that fit `most` tokens.
    """
    pieces, bos_id = array("I", [tokenizer.eos_id]), _bos(tokenizer)
    documents, size, lossless = 0, 0, tokenizer.lossless
    for text, encoded in _valid_documents(path, tokenizer, most):
        if len(pieces) + len(bos_id) + len(encoded) + 1 > most:
            if documents:
                break
            text, encoded = _whole_lines(text, tokenizer, most - 2 - len(bos_id))
        pieces.extend([*bos_id, *encoded, tokenizer.eos_id])
        documents += 1
        size += len(text.encode())
        lossless = lossless and tokenizer.decode(encoded) == text
    within = len(pieces) - 1 - documents * (1 + len(bos_id))
    unknown = sum(piece == tokenizer.unk_id for piece in pieces) / max(1, within)
    facts = {"valid_bytes": size, "valid_documents": documents, "unknown_rate": unknown, "lossless": lossless}
    return np.array(pieces, np.uint32), facts


def _valid_documents(path: Path, tokenizer: Tokenizer, most: int) -> Iterator[tuple[str, list[int]]]:
    """Documents with their pieces; of one that is longer than `most`, only a beginning that is longer too."""
    texts: list[str] = []
    pieces: list[int] = []
    for text, ends in read_parts(path):
        if len(pieces) <= most:
            texts.append(text)
            pieces += tokenizer.encode(text)
        if ends:
            yield "".join(texts), pieces
            texts, pieces = [], []


def _whole_lines(text: str, tokenizer: Tokenizer, most: int) -> tuple[str, list[int]]:
    """As many of a text's first lines as have no more than so many pieces (of a first line that has, what fits)."""
    pieces: list[int] = []
    end = 0
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        encoded = tokenizer.encode(line)
        if len(pieces) + len(encoded) > most:
            break
        pieces += encoded
        end += len(line)
    if end:
        return text[:end], pieces
    cut = tokenizer.decode(tokenizer.encode(text)[:most]).rstrip("\N{REPLACEMENT CHARACTER}")
    return cut, tokenizer.encode(cut)[:most]
