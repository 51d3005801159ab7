"""Corpora: a training and a validation text, prepared once, cached by content, never whole in memory.

A prepared text is UTF-8 with LF line ends and a line `<|endoftext|>` after each document.
"""

import collections
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_transformer.data import tasks, tinystories
from mlx_transformer.data.documents import Part, digests, group, read_parts, take
from mlx_transformer.data.shards import STREAM_BYTES, Shards, find_shards
from mlx_transformer.data.sources import Source, check_column, open_source
from mlx_transformer.data.store import SEPARATOR, cached_folder, progress, sha256_of
from mlx_transformer.data.tasks import find_task, is_task
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.files import write_json
from mlx_transformer.utils.text import plural

VALID_SHARE = 20  # without --valid, one in 20 documents (or lines) is held out
SAMPLE_BYTES = 20_000_000  # of a streamed text, for the vocabulary
HELD_OUT_BYTES = 16_000_000  # of its last file: more than the 1M tokens that are evaluated
FABLES_STORIES, FABLES_VALID_STORIES, FABLES_SEED = 30_000, 1_000, 0
_VERSION = 1  # of the prepared text: part of every cache key

Say = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. Bytes are UTF-8 bytes of the documents without separators."""

    name: str  # fables, tinystories, or the name of one's own file, folder or data set
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
    text_column: str | None = None  # key or column of the texts, if the files have columns
    task: str | None = None  # name of the task that generated the texts, with answers in brackets
    shards: Shards | None = None  # the files that are streamed: `train` is then a sample of them
    expansion: float = 1.0  # bytes of text for each stored byte of the sample


def load_corpus(
    data: str = "auto",
    valid: str | None = None,
    stories: int | None = None,
    say: Say = print,
    text_column: str | None = None,
    stream: bool = False,
) -> Corpus:
    """Prepare the corpus of `--data --valid --stories --text-column --stream`.

    data: `auto` (TinyStories if it is in the cache or can be fetched, else the fables), `fables`, `tinystories`,
        `task:NAME`, or what sources.py reads: a path, or `OWNER/NAME` of a data set on the Hugging Face hub.
    stories: number of training documents to keep, from the first.
    text_column: key or column of .jsonl and .csv that holds the text; None: "text".
    stream: read the files while a model trains; a folder or data set above STREAM_BYTES is always streamed.

    Raises BadInput if a text cannot be read, split or fetched, for an unknown task, and for options of a text with one.
    """
    if stories is not None and stories < 1:
        raise BadInput(f"--stories {stories} is not a number of stories; give 1 or more")
    data = "tinystories" if data == tinystories.REPO else data
    if data in ("auto", "fables", "tinystories"):
        if valid is not None:
            raise BadInput(f"--valid {valid} goes with --data PATH; {data} brings its own validation stories")
        if text_column is not None:
            raise BadInput(f"--text-column {text_column} goes with .jsonl and .csv; {data}: no columns")
    if stream and (is_task(data) or data in ("auto", "fables", "tinystories")):
        raise BadInput(f"--stream goes with a folder of texts, a text, or OWNER/NAME of the hub, not with {data}")
    if is_task(data):
        corpus = _task(data, {"valid": valid, "stories": stories, "text-column": text_column})
    elif data == "fables":
        corpus = _fables(stories, "as requested")
    elif data == "tinystories":
        corpus = _tinystories(stories, say)
    elif data == "auto":
        corpus = _tinystories_or_fables(stories, say)
    elif data == "pairs" and not Path(data).exists():
        raise BadInput("pairs, the built-in translations, are for translators: give --branch translator of phase 1")
    elif (shards := find_shards(data, text_column, stream)) is not None:
        held_out = None if valid is None else open_source(valid, text_column, "--valid takes", say)
        corpus = _streamed(shards, held_out, stories, stream)
    else:
        train = open_source(
            data, text_column, "--data takes auto, fables, tinystories, task:NAME, OWNER/NAME of the hub or", say
        )
        held_out = None if valid is None else open_source(valid, text_column, "--valid takes", say)
        check_column(text_column, *filter(None, (train, held_out)))
        corpus = _own(train, held_out, stories)
    say(corpus.note)
    return corpus


# Writing


@dataclass
class Tally:
    """Sizes of a split that is being written."""

    documents: int = 0
    bytes: int = 0
    duplicates: int = 0


def _write(path: Path, parts: Iterable[Part], banned: Set[bytes], advance: Callable[[int], None]) -> Tally:
    """Write documents with their separators, except those with a banned digest, which count as duplicates."""
    tally, start, digest = Tally(), 0, hashlib.blake2b(digest_size=16)
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
    write_facts(folder, name, kept, held_out, floor_bits=None)


def write_facts(folder: Path, name: str, train: Tally, valid: Tally, floor_bits: float | None) -> None:
    """Write corpus.json, which `open_prepared` reads, beside train.txt and valid.txt."""
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


def open_prepared(folder: Path, source: str) -> Corpus:
    """Open the corpus prepared in `folder`; `source` says in words where it comes from."""
    facts = json.loads((folder / "corpus.json").read_text())
    valid_documents = plural(facts["valid_documents"], "validation document")
    note = f"data: {source}: {facts['train_documents']:,} training and {valid_documents}"
    if facts["duplicates_removed"]:
        note += f", {plural(facts['duplicates_removed'], 'duplicate')} of validation documents removed"
    return Corpus(**facts, train=folder / "train.txt", valid=folder / "valid.txt", note=note)


def cache_key(*parts: object) -> str:
    """Return the key of a prepared corpus."""
    return hashlib.sha256(repr((_VERSION, *parts)).encode()).hexdigest()[:20]


# The sources


def _fables(stories: int | None, why: str) -> Corpus:
    from mlx_transformer.data import fables

    stories = stories or FABLES_STORIES
    # The generator's own source is in the key: a changed generator may write other stories.
    sources = [sha256_of(source) for source in sorted(Path(fables.__file__).parent.rglob("*.py"))]

    def build(folder: Path) -> None:
        info = fables.write_corpus(folder, stories=stories, valid_stories=FABLES_VALID_STORIES, seed=FABLES_SEED)
        train, valid = (_count(folder / name) for name in ("train.txt", "valid.txt"))
        write_facts(folder, "fables", train, valid, info.valid_bits)

    key = cache_key(sources, stories, FABLES_VALID_STORIES, FABLES_SEED)
    return open_prepared(cached_folder("corpora", f"fables-{key}", build), f"fables, the built-in stories, {why}")


def _task(data: str, options: dict[str, object]) -> Corpus:
    """Write the texts of a task, those of the validation split first: no training text is one of them."""
    task = find_task(data)
    if given := [name for name, value in options.items() if value is not None]:
        raise BadInput(f"--{given[0]} {options[given[0]]} goes with a text; {data} is generated, with its own split")
    sources = [sha256_of(source) for source in sorted(Path(tasks.__file__).parent.glob("*.py"))]

    def build(folder: Path) -> None:
        valid = [text for level in task.trained_levels for text in task.held_out(level)]
        train = task.train_texts(frozenset(valid))
        kept, held_out = (
            _write(folder / name, ((text, True) for text in texts), frozenset(), lambda size: None)
            for name, texts in (("train.txt", train), ("valid.txt", valid))
        )
        write_facts(folder, data, kept, held_out, floor_bits=None)

    folder = cached_folder("corpora", f"task-{task.name}-{cache_key(sources, data)}", build)
    return replace(open_prepared(folder, f"{data}, generated"), task=task.name)


def _count(path: Path) -> Tally:
    tally = Tally()
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

    folder = cached_folder("corpora", f"tinystories-{cache_key(source.identity, stories)}", build)
    return open_prepared(folder, f"TinyStories, the first {plural(stories, 'story')}, {source.how}")


def _own(train: Source, valid: Source | None, stories: int | None) -> Corpus:
    """Prepare somebody's own texts."""

    def build(folder: Path) -> None:
        if valid is not None:
            banned = frozenset(digests(valid.parts()))
            kept = take(train.parts(), stories or sys.maxsize)
            _prepare(folder, "text", kept, valid.parts(), banned, train.size + valid.size)
        elif train.has_separators():
            _split_documents(folder, train, stories)
        else:
            _split_lines(folder, train, stories)

    key = cache_key(train.identity, "" if valid is None else valid.identity, stories)
    folder = cached_folder("corpora", f"text-{key}", build)
    label = f"{train.label}" + (f" and {valid.label}" if valid is not None else ", its end held out")
    column = train.column or (valid.column if valid is not None else None)
    corpus = open_prepared(folder, label if column is None else f"{label}, texts of the column {column!r}")
    return replace(corpus, name=train.name, text_column=column)


def _split_documents(folder: Path, source: Source, stories: int | None) -> None:
    """Hold out the last documents."""
    seen = digests(source.parts())
    if len(seen) < 2:
        raise BadInput(
            f"{source.label} holds one document, and training and validation need one each; give --valid PATH too"
        )
    held_out = max(1, len(seen) // VALID_SHARE)
    before = len(seen) - held_out
    kept, parts = min(stories or before, before), source.parts()

    def valid() -> Iterator[Part]:
        collections.deque(take(parts, before - kept), maxlen=0)
        yield from parts

    _prepare(folder, "text", take(parts, kept), valid(), frozenset(seen[before:]), source.size)


def _split_lines(folder: Path, source: Source, stories: int | None) -> None:
    """Hold out the last lines; the lines before them are one document."""
    if stories is not None:
        raise BadInput(f"{source.label} has no {SEPARATOR} between documents, so --stories cannot count them")
    count = sum(not line.isspace() for line in source.lines())
    if count < 2:
        raise BadInput(
            f"{source.label} holds one line, and training and validation need one each; "
            "give a longer text or --valid PATH"
        )
    before, lines = count - max(1, count // VALID_SHARE), source.lines()

    def train() -> Iterator[str]:
        left = before
        while left:
            line = next(lines)
            left -= not line.isspace()
            yield line

    _prepare(folder, "text", group(train()), group(lines), frozenset(), source.size)


def _streamed(shards: Shards, valid: Source | None, stories: int | None, asked: bool) -> Corpus:
    """Take from a streamed text what is needed before training: a sample for the vocabulary, and a validation text.

    Without `valid` the last file is held out. No more of any file is read.
    """
    if stories is not None:
        raise BadInput(f"--stories {stories} cannot be counted in a text that is streamed: give --max-tokens")
    if valid is None and len(shards) < 2:
        raise BadInput(f"{shards.label} is one file, and the last one is held out from a streamed text: give --valid")
    *files, last = shards.files
    train = shards if valid is not None else shards.only(files)

    def build(folder: Path) -> None:
        held_out = valid.parts() if valid is not None else _head(shards.only([last]), HELD_OUT_BYTES, [])
        try:
            tally = _write(folder / "valid.txt", held_out, frozenset(), lambda count: None)
            banned, expansions = frozenset(digests(read_parts(folder / "valid.txt"))), list[float]()
            sample = _write(folder / "train.txt", _head(train, SAMPLE_BYTES, expansions), banned, lambda count: None)
        except RunFailed as error:
            raise BadInput(str(error)) from error
        if not sample.documents:
            raise BadInput(f"the first files of {shards.label} hold nothing but documents of the validation text")
        write_facts(folder, "text", sample, tally, floor_bits=None)
        write_json(folder / "expansion.json", expansions[0])

    key = cache_key("stream", shards.identity, SAMPLE_BYTES, HELD_OUT_BYTES, "" if valid is None else valid.identity)
    folder = cached_folder("corpora", f"stream-{key}", build)
    corpus = open_prepared(folder, shards.label)
    why = "as requested" if asked else f"which is more than {STREAM_BYTES / 1e9:g} GB"
    end = f"{last} is held out" if valid is None else f"validation on {valid.label}"
    note = (
        f"data: {shards.label} is streamed, {why}: {plural(len(train), 'file')}, {train.size / 1e9:,.2f} GB as stored; "
        f"{end}, and its documents are left out of the others; a vocabulary is learned from the first "
        f"{corpus.train_bytes / 1e6:,.1f} MB"
    )
    return replace(
        corpus,
        name=shards.name,
        note=note,
        text_column=shards.column,
        sha256=hashlib.sha256((shards.identity + corpus.sha256).encode()).hexdigest(),
        shards=train,
        expansion=json.loads((folder / "expansion.json").read_text()),
    )


def _head(shards: Shards, size: int, expansions: list[float]) -> Iterator[Part]:
    """Yield the first documents of so many bytes, the last one cut; append the bytes of text per stored byte."""
    stored = read = 0
    for number in range(len(shards)):
        shard = shards.open(number)
        for text, ends in shard.parts():
            read += len(text.encode())
            yield text, ends or read >= size
            if read >= size:
                break
        stored += shard.consumed
        if read >= size:
            break
    expansions.append(read / stored)
