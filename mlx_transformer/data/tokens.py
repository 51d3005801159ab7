"""Token files: a corpus as one array of token ids on disk, EOS, document, EOS, document, EOS, ...

Each document begins with BOS if the tokenizer has a BOS token other than EOS.
"""

import bisect
import hashlib
import itertools
import json
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_transformer.data.chunks import Chunk, chunks, encode_chunks
from mlx_transformer.data.corpus import Corpus
from mlx_transformer.data.documents import Part, digests, read_documents, read_parts
from mlx_transformer.data.store import cached_folder, progress
from mlx_transformer.data.stream import Batches, validation_batches
from mlx_transformer.data.streaming import ShardBatches, Text
from mlx_transformer.data.tasks.packing import encode_examples, pack
from mlx_transformer.data.tokenizers import SymbolTokenizer, Tokenizer
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import write_json
from mlx_transformer.utils.text import plural

MAX_VALID_TOKENS = 1_000_000
NOISY_TOKENS = 4096  # fewer: the mean of losses with a deviation of 3 nats is uncertain by more than 0.05 nats
_BATCH_CHARACTERS = 4 << 20  # per call of the tokenizer: enough for every core, about 100 MB as Python lists

Encoded = tuple[Chunk, list[int]]


@dataclass(frozen=True)
class Tokens:
    """A tokenized corpus. The facts about `valid` are those of its first documents, MAX_VALID_TOKENS at max_tokens."""

    train: np.ndarray  # (T,) uint16 or uint32, memory-mapped, read-only; of a task int32, ~t where no loss counts t
    valid: np.ndarray  # (V,) likewise
    eos_id: int
    valid_bytes: int  # UTF-8, without separators: the denominator of bits per byte
    valid_documents: int
    floor_bits: float | None  # -log2 of the probability of these documents, if their generator is known
    unknown_rate: float  # share of unknown tokens in `valid`, EOS and BOS not counted
    lossless: bool  # every validation document is decoded unchanged, so that bits per byte are meaningful
    tokenizer: Tokenizer | None = None  # the tokenizer of the token ids
    task: str | None = None  # name of the task

    @property
    def is_masked(self) -> bool:
        """Whether only some tokens are predicted: the answers of a task."""
        return np.issubdtype(self.valid.dtype, np.signedinteger)

    def packed(self, seq_len: int) -> "Tokens":
        """Return the tokens as sequences of this length take them: a task's examples are packed, none of them cut.

        Raises BadInput for a seq_len shorter than an example.
        """
        if self.task is None:
            return self
        train, valid = (pack(tokens, self.eos_id, seq_len, self.task) for tokens in (self.train, self.valid))
        return replace(self, train=train, valid=valid)

    @property
    def epoch_tokens(self) -> int:
        """Targets of an epoch: the first separator is never predicted."""
        return len(self.train) - 1

    @property
    def valid_tokens(self) -> int:
        """Targets of an evaluation."""
        return len(self.valid) - 1

    def batches(self, batch_size: int | Callable[[int], int], seq_len: int, seed: int) -> Batches:
        """Return the training stream."""
        return Batches(self.train, batch_size, seq_len, seed)

    def validation(self, seq_len: int, tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the validation sequences (B, seq_len + 1) and the masks (B, seq_len) of the targets that count.

        All batches have one shape, of about so many tokens.
        """
        batches = validation_batches(self.valid, seq_len, tokens)
        return [(part, mask & (part[:, 1:] >= 0)) for part, mask in batches] if self.is_masked else batches


@dataclass(frozen=True)
class StreamedTokens(Tokens):
    """The tokens of a text that is read while a model trains; `train` are those of a sample of it."""

    text: Text | None = None
    text_bytes: int = 0  # of the whole text: estimated
    sample_bytes: int = 1
    rank: int = 0
    ranks: int = 1

    @property
    def epoch_tokens(self) -> int:
        """Targets of an epoch, estimated from the sample."""
        return round(super().epoch_tokens * self.text_bytes / self.sample_bytes)

    def of_rank(self, rank: int, ranks: int) -> "StreamedTokens":
        """Return what one of several ranks reads."""
        return replace(self, rank=rank, ranks=ranks)

    def batches(self, batch_size: int | Callable[[int], int], seq_len: int, seed: int) -> ShardBatches:  # type: ignore[override]
        """Return this rank's share of the training stream. Raises BadInput for more ranks than files."""
        assert self.text is not None
        return ShardBatches(self.text, batch_size, seq_len, seed, rank=self.rank, ranks=self.ranks)


def tokenize_corpus(corpus: Corpus, tokenizer: Tokenizer, say: Callable[[str], None] = print) -> Tokens:
    """Tokenize both splits, a few megabytes at a time, or open the token files that are there.

    The cache key is the content of the corpus and of the tokenizer. Raises BadInput if the disk is full.
    """
    if corpus.task is not None:
        return _tokenize_task(corpus, tokenizer)
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 65_535 else np.dtype("<u4")

    def build(folder: Path) -> None:
        with progress("tokenizing", corpus.train_bytes) as advance, open(folder / "train.bin", "wb") as out:
            _write_train(out, corpus, tokenizer, dtype, advance)
        valid, facts = encode_text(read_parts(corpus.valid), tokenizer, MAX_VALID_TOKENS)
        valid.astype(dtype).tofile(folder / "valid.bin")
        write_json(folder / "tokens.json", facts)

    key = hashlib.sha256(
        repr((tokenizer.version, corpus.sha256, tokenizer.sha256, MAX_VALID_TOKENS)).encode()
    ).hexdigest()[:20]
    folder = cached_folder("tokens", f"{tokenizer.kind}-{key}", build)
    facts = json.loads((folder / "tokens.json").read_text())
    whole = facts["valid_bytes"] == corpus.valid_bytes
    if not whole:
        say(f"evaluating on the first {facts['valid_bytes']:,} of {corpus.valid_bytes:,} bytes of validation text")
    train = np.memmap(folder / "train.bin", dtype, mode="r")
    valid = np.fromfile(folder / "valid.bin", dtype)
    if len(valid) - 1 < NOISY_TOKENS:
        count = plural(len(valid) - 1, "token")
        say(f"warning: the validation text has only {count}, so that its loss is noisy; give a longer one as --valid")
    floor_bits = corpus.floor_bits if whole else None
    if corpus.shards is None:
        return Tokens(train, valid, tokenizer.eos_id, floor_bits=floor_bits, tokenizer=tokenizer, **facts)
    return StreamedTokens(
        train,
        valid,
        tokenizer.eos_id,
        floor_bits=None,
        tokenizer=tokenizer,
        text=Text(corpus.shards, tokenizer, frozenset(digests(read_parts(corpus.valid)))),
        text_bytes=round(corpus.shards.size * corpus.expansion),
        sample_bytes=corpus.train_bytes,
        **facts,
    )


def _tokenize_task(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    """Encode the examples of a task. Raises BadInput for another tokenizer than the task's."""
    if not isinstance(tokenizer, SymbolTokenizer) or tokenizer.task != corpus.task:
        raise BadInput(f"task:{corpus.task} has a tokenizer of its own, not one of kind {tokenizer.kind}: leave it out")

    def build(folder: Path) -> None:
        for name in ("train", "valid"):
            encode_examples(read_documents(getattr(corpus, name)), tokenizer).astype("<i4").tofile(
                folder / f"{name}.bin"
            )

    key = hashlib.sha256(repr((tokenizer.version, corpus.sha256, tokenizer.sha256)).encode()).hexdigest()[:20]
    folder = cached_folder("tokens", f"task-{corpus.task}-{key}", build)
    train, valid = (np.fromfile(folder / f"{name}.bin", "<i4") for name in ("train", "valid"))
    return Tokens(
        train,
        valid,
        tokenizer.eos_id,
        valid_bytes=corpus.valid_bytes,
        valid_documents=corpus.valid_documents,
        floor_bits=None,
        unknown_rate=0.0,
        lossless=False,
        tokenizer=tokenizer,
        task=corpus.task,
    )


def _write_train(
    out: BinaryIO, corpus: Corpus, tokenizer: Tokenizer, dtype: np.dtype, advance: Callable[[int], None]
) -> None:
    out.write(np.array([tokenizer.eos_id], dtype).tobytes())
    bos_id, begins = _bos(tokenizer), True
    for batch in _batches(chunks(read_parts(corpus.train), tokenizer)):
        tokens: list[int] = []
        for chunk, encoded in zip(batch, encode_chunks(batch, tokenizer), strict=True):
            tokens += [*(bos_id if begins else ()), *encoded, *([tokenizer.eos_id] if chunk.ends else ())]
            begins = chunk.ends
        out.write(np.array(tokens, dtype).tobytes())
        advance(sum(len(chunk.text) for chunk in batch))


def _bos(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens between EOS and a document."""
    bos_id = tokenizer.bos_id
    return [] if bos_id == tokenizer.eos_id else [bos_id]


def _batches(chunked: Iterator[Chunk]) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    size = 0
    for chunk in chunked:
        batch.append(chunk)
        size += len(chunk.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_text(
    parts: Iterable[Part], tokenizer: Tokenizer, max_tokens: int = sys.maxsize
) -> tuple[np.ndarray, dict[str, Any]]:
    """Encode the first documents of a text that fit `max_tokens`, as a validation split.

    Returns token ids (V,) uint32 and the facts about them: valid_bytes, valid_documents, unknown_rate, lossless.
    """
    tokens, bos_id = array("I", [tokenizer.eos_id]), _bos(tokenizer)
    documents, size, lossless = 0, 0, tokenizer.lossless
    for document in _valid_documents(parts, tokenizer, max_tokens):
        text = "".join(chunk.text for chunk, _ in document)
        encoded = list(itertools.chain.from_iterable(ids for _, ids in document))
        if len(tokens) + len(bos_id) + len(encoded) + 1 > max_tokens:
            if documents:
                break
            text, encoded = _beginning(document, tokenizer, max_tokens - 2 - len(bos_id))
        tokens.extend([*bos_id, *encoded, tokenizer.eos_id])
        documents += 1
        size += len(text.encode())
        lossless = lossless and tokenizer.decode(encoded) == text
    within = len(tokens) - 1 - documents * (1 + len(bos_id))
    unknown = sum(token == tokenizer.unk_id for token in tokens) / max(1, within)
    facts = {"valid_bytes": size, "valid_documents": documents, "unknown_rate": unknown, "lossless": lossless}
    return np.array(tokens, np.uint32), facts


def _valid_documents(parts: Iterable[Part], tokenizer: Tokenizer, max_tokens: int) -> Iterator[list[Encoded]]:
    """Yield documents in chunks; of one longer than `max_tokens`, only a beginning that is longer too."""
    document: list[Encoded] = []
    size = 0
    for chunk in chunks(parts, tokenizer):
        if size <= max_tokens:
            document.append((chunk, encode_chunks([chunk], tokenizer)[0]))
            size += len(document[-1][1])
        if chunk.ends:
            yield document
            document, size = [], 0


def _beginning(document: list[Encoded], tokenizer: Tokenizer, max_tokens: int) -> tuple[str, list[int]]:
    """Return the first lines of a too long document that fit, and their tokens; of a too long first line, what fits."""
    text, tokens = "", array("I")
    for chunk, encoded in document:
        room = max_tokens - len(tokens)
        if len(encoded) <= room:
            text += chunk.text
            tokens.extend(encoded)
            continue
        kept = _shortened(chunk, tokenizer, room, [match.end() for match in re.finditer("\n", chunk.text)])
        if not kept.text and "\n" not in text:
            kept = _shortened(chunk, tokenizer, room, range(len(chunk.text)))
        text += kept.text
        tokens.extend(encode_chunks([kept], tokenizer)[0])
        break
    return text, tokens.tolist()


def _shortened(chunk: Chunk, tokenizer: Tokenizer, max_tokens: int, ends: Sequence[int]) -> Chunk:
    """Return the longest beginning of a chunk that ends at one of `ends` and has at most max_tokens tokens."""

    def beginning(end: int) -> Chunk:
        return chunk._replace(text=chunk.text[:end])

    count = bisect.bisect_right(ends, max_tokens, key=lambda end: len(encode_chunks([beginning(end)], tokenizer)[0]))
    return beginning(ends[count - 1] if count else 0)
