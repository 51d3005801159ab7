"""Corpora: a training and a validation text, prepared once, cached by content, never whole in memory.

A prepared text is UTF-8 with LF line ends and a line `<|endoftext|>` after each document.
"""

import codecs
import collections
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from mlx_transformer.data import tinystories
from mlx_transformer.data.documents import Part, digests, group, read_lines, read_parts, take
from mlx_transformer.data.store import SEPARATOR, cached_folder, progress, sha256_of
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import write_json
from mlx_transformer.utils.text import plural

VALID_SHARE = 20  # without --valid, one in 20 documents (or lines) is held out
FABLES_STORIES, FABLES_VALID_STORIES, FABLES_SEED = 30_000, 1_000, 0
_VERSION = 1  # of the prepared text: part of every cache key

Say = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. Bytes are UTF-8 bytes of the documents without separators."""

    name: str  # fables, tinystories or text
    sha256: str  # of both prepared texts
    train_sha256: str
    train: Path
    valid: Path
    train_bytes: int
    valid_bytes: int
    train_documents: int
    valid_documents: int
    duplicates_removed: int  # documents removed from train because valid has them too
    floor_bits: float | None  # -log2 of the probability of all validation documents, if their generator is known
    note: str  # one sentence: which corpus, and why


def load_corpus(data: str = "auto", valid: str | None = None, stories: int | None = None, say: Say = print) -> Corpus:
    """Prepare the corpus of `--data --valid --stories`: `auto`, `fables`, `tinystories` or the path of a text.

    `auto` is TinyStories if it is in the cache or can be fetched, else the fables. `stories` is the number of training
    documents to keep, from the first. Raises BadInput if a text cannot be read, split or fetched.
    """
    if stories is not None and stories < 1:
        raise BadInput(f"--stories {stories} is not a number of stories; give 1 or more")
    if data in ("auto", "fables", "tinystories") and valid is not None:
        raise BadInput(f"--valid {valid} goes with --data PATH; {data} brings its own validation stories")
    if data == "fables":
        corpus = _fables(stories, "as requested")
    elif data == "tinystories":
        corpus = _tinystories(stories, say)
    elif data == "auto":
        corpus = _tinystories_or_fables(stories, say)
    else:
        corpus = _text(Path(data).expanduser(), Path(valid).expanduser() if valid is not None else None, stories)
    say(corpus.note)
    return corpus


# Writing


@dataclass
class _Tally:
    documents: int = 0
    bytes: int = 0
    duplicates: int = 0


def _write(path: Path, parts: Iterable[Part], banned: Set[bytes], advance: Callable[[int], None]) -> _Tally:
    """Write documents with their separators, except those with a banned digest, which count as duplicates."""
    tally, start, digest = _Tally(), 0, hashlib.blake2b(digest_size=16)
    with open(path, "wb") as out:
        for text, ends in parts:
            raw = text.encode()
            digest.update(raw)
            advance(out.write(raw))
            if not ends:
                continue
            if digest.digest() in banned:
                out.seek(start)
                out.truncate()
                tally.duplicates += 1
            else:
                tally.bytes += out.tell() - start
                tally.documents += 1
                out.write(f"\n{SEPARATOR}\n".encode())
            start, digest = out.tell(), hashlib.blake2b(digest_size=16)
    return tally


def _prepare(
    folder: Path, name: str, train: Iterable[Part], valid: Iterable[Part], banned: Set[bytes], size: int
) -> None:
    """Write both texts, train first; `size` is the number of bytes for the progress bar."""
    with progress(f"preparing {name}", size) as advance:
        kept = _write(folder / "train.txt", train, banned, advance)
        held_out = _write(folder / "valid.txt", valid, frozenset(), advance)
    if not kept.documents:
        raise BadInput(
            f"nothing is left to train on: {plural(kept.duplicates, 'training document')}, each of them a validation "
            "document too; give another --valid"
        )
    _write_facts(folder, name, kept, held_out, floor_bits=None)


def _write_facts(folder: Path, name: str, train: _Tally, valid: _Tally, floor_bits: float | None) -> None:
    train_sha = sha256_of(folder / "train.txt")
    facts = {
        "name": name,
        "sha256": hashlib.sha256((train_sha + sha256_of(folder / "valid.txt")).encode()).hexdigest(),
        "train_sha256": train_sha,
        "train_bytes": train.bytes,
        "valid_bytes": valid.bytes,
        "train_documents": train.documents,
        "valid_documents": valid.documents,
        "duplicates_removed": train.duplicates,
        "floor_bits": floor_bits,
    }
    write_json(folder / "corpus.json", facts)


def _open(folder: Path, source: str) -> Corpus:
    """Open the corpus prepared in `folder`; `source` says in words where it comes from."""
    facts = json.loads((folder / "corpus.json").read_text())
    valid_documents = plural(facts["valid_documents"], "validation document")
    note = f"data: {source}: {facts['train_documents']:,} training and {valid_documents}"
    if facts["duplicates_removed"]:
        note += f", {plural(facts['duplicates_removed'], 'duplicate')} of validation documents removed"
    return Corpus(**facts, train=folder / "train.txt", valid=folder / "valid.txt", note=note)


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((_VERSION, *parts)).encode()).hexdigest()[:20]


# The three sources


def _fables(stories: int | None, why: str) -> Corpus:
    from mlx_transformer.data import fables

    stories = stories or FABLES_STORIES
    # The generator's own source is in the key: a changed generator may write other stories.
    sources = [sha256_of(source) for source in sorted(Path(fables.__file__).parent.rglob("*.py"))]

    def build(folder: Path) -> None:
        info = fables.write_corpus(folder, stories=stories, valid_stories=FABLES_VALID_STORIES, seed=FABLES_SEED)
        train, valid = (_count(folder / name) for name in ("train.txt", "valid.txt"))
        _write_facts(folder, "fables", train, valid, info.valid_bits)

    key = _key(sources, stories, FABLES_VALID_STORIES, FABLES_SEED)
    return _open(cached_folder("corpora", f"fables-{key}", build), f"fables, the built-in stories, {why}")


def _count(path: Path) -> _Tally:
    tally = _Tally()
    for text, ends in read_parts(path):
        tally.bytes += len(text.encode())
        tally.documents += ends
    return tally


def _tinystories_or_fables(stories: int | None, say: Say) -> Corpus:
    try:
        return _tinystories(stories, say)
    except tinystories.Unreachable as error:
        why = f"because {error}"
    return _fables(stories, why)


def _tinystories(stories: int | None, say: Say) -> Corpus:
    stories = stories or tinystories.DEFAULT_STORIES
    source = tinystories.fetch(stories, say)

    def build(folder: Path) -> None:
        # "replace": a prefix of a hub file may end within a character, after the stories that are wanted.
        banned = frozenset(digests(read_parts(source.valid, errors="replace")))
        train = take(read_parts(source.train, errors="replace"), stories)
        size = source.train.stat().st_size + source.valid.stat().st_size
        _prepare(folder, "tinystories", train, read_parts(source.valid, errors="replace"), banned, size)

    folder = cached_folder("corpora", f"tinystories-{_key(source.identity, stories)}", build)
    return _open(folder, f"TinyStories, the first {plural(stories, 'story')}, {source.how}")


def _text(path: Path, valid: Path | None, stories: int | None) -> Corpus:
    shas = [check_text(path), check_text(valid, "--valid takes") if valid is not None else ""]

    def build(folder: Path) -> None:
        if valid is not None:
            banned = frozenset(digests(read_parts(valid)))
            size = os.path.getsize(path) + os.path.getsize(valid)
            _prepare(folder, "text", take(read_parts(path), stories or sys.maxsize), read_parts(valid), banned, size)
        elif any(SEPARATOR in line for line in read_lines(path)):
            _split_documents(folder, path, stories)
        else:
            _split_lines(folder, path, stories)

    folder = cached_folder("corpora", f"text-{_key(*shas, stories)}", build)
    return _open(folder, f"{path}" + (f" and {valid}" if valid is not None else ", its end held out"))


def _split_documents(folder: Path, path: Path, stories: int | None) -> None:
    """Hold out the last documents."""
    seen = digests(read_parts(path))
    if len(seen) < 2:
        raise BadInput(f"{path} holds one document, and training and validation need one each; give --valid PATH too")
    held_out = max(1, len(seen) // VALID_SHARE)
    before = len(seen) - held_out
    kept, parts = min(stories or before, before), read_parts(path)

    def valid() -> Iterator[Part]:
        collections.deque(take(parts, before - kept), maxlen=0)
        yield from parts

    _prepare(folder, "text", take(parts, kept), valid(), frozenset(seen[before:]), os.path.getsize(path))


def _split_lines(folder: Path, path: Path, stories: int | None) -> None:
    """Hold out the last lines; the lines before them are one document."""
    if stories is not None:
        raise BadInput(f"{path} has no {SEPARATOR} between documents, so --stories cannot count them")
    count = sum(not line.isspace() for line in read_lines(path))
    if count < 2:
        raise BadInput(
            f"{path} holds one line, and training and validation need one each; give a longer text or --valid PATH"
        )
    before, lines = count - max(1, count // VALID_SHARE), read_lines(path)

    def train() -> Iterator[str]:
        left = before
        while left:
            line = next(lines)
            left -= not line.isspace()
            yield line

    _prepare(folder, "text", group(train()), group(lines), frozenset(), os.path.getsize(path))


def check_text(path: Path, takes: str = "--data takes auto, fables, tinystories or") -> str:
    """Return what identifies the content of a text file. Raises BadInput unless it is readable UTF-8 and holds text."""
    try:
        if not path.exists():
            raise BadInput(f"{path} does not exist; {takes} the path of a text")
        if not path.is_file():
            raise BadInput(
                f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}; give the path of a UTF-8 text file"
            )
        if not path.stat().st_size:
            raise BadInput(f"{path} is empty; give a UTF-8 text file")
        digest = _digest_utf8(path)
        if next(read_parts(path), None) is None:
            raise BadInput(f"{path} holds no text, only white space or separators; give a UTF-8 text file")
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror or error})") from error
    return digest


def _digest_utf8(path: Path) -> str:
    """Hash a file. Raises BadInput with the offset of the first byte that is not UTF-8 text."""
    digest, decoder, offset, within = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0, False
    with open(path, "rb") as file:
        while True:
            block = file.read(1 << 16) + file.readline(1 << 16)
            within = within or _has_separator_within(block)
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the last block
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                bad = offset - pending + error.start
                raise BadInput(
                    f"{path} is not UTF-8 text: byte {bad:,} (counted from 0) cannot be decoded; convert it"
                ) from None
            if (null := block.find(b"\0")) >= 0:
                raise BadInput(
                    f"{path} is not text: byte {offset + null:,} (counted from 0) is NUL; convert UTF-16 to UTF-8"
                )
            if not block:
                # Texts prepared before separators within lines were read keep their place in the cache.
                return digest.hexdigest() + (" separators within lines" if within else "")
            digest.update(block)
            offset += len(block)


def _has_separator_within(block: bytes) -> bool:
    """Whether whole lines may have a separator beside other text."""
    mark = SEPARATOR.encode()
    if mark not in block:
        return False
    return any(mark in line and line.strip() != mark for line in block.splitlines())
