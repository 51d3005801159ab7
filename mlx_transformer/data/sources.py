"""Sources that `--data` and `--valid` name: a text, .jsonl or .csv, each also as .gz, a folder of them, or a data set.

Every kind is read as one stream of lines with separators between documents, never whole in memory.
"""

import codecs
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from mlx_transformer.data import hub
from mlx_transformer.data.documents import Part, group, lines_of
from mlx_transformer.data.store import SEPARATOR
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.text import plural

DEFAULT_COLUMN = "text"
TAKEN = "UTF-8 text, .jsonl or .csv, each also as .gz, or a folder of them"
_JSON, _CSV, _BINARY = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".parquet", ".arrow", ".feather")
FORMATS = (_JSON, _CSV, (".txt",))  # of a data set that has several, the first


@dataclass(frozen=True)
class Source:
    """Files of text that have been checked."""

    name: str  # file, folder or data set, for titles
    label: str  # the same as it was given, for messages
    files: tuple[Path, ...]
    column: str | None  # of the files that have columns; None: no file has
    identity: str  # of the content and how it is read: part of cache keys
    size: int  # bytes, uncompressed

    def lines(self) -> Iterator[str]:
        """Yield lines; each record, and each of several files, ends with a separator."""
        for path in self.files:
            yield from _read(path, self.column)
            if len(self.files) > 1:
                yield f"\n{SEPARATOR}\n"

    def parts(self) -> Iterator[Part]:
        """Yield documents, a long one in several parts."""
        return group(self.lines())

    def has_separators(self) -> bool:
        """Whether the source says where documents end."""
        return any(SEPARATOR in line for line in self.lines())


def open_source(
    label: str, column: str | None = None, takes: str = "expected", say: Callable[[str], None] = print
) -> Source:
    """Check a file, a folder, or a data set of the hub, which is fetched.

    Raises BadInput unless all of it is readable UTF-8 and some of it is text.
    """
    path = Path(label).expanduser()
    if not os.path.exists(path) and hub.is_name(label, tuple(itertools.chain(*FORMATS))):
        return _open_files(hub.fetch(label, FORMATS, say), label, label, column)
    return _open_files(files_in(path, takes), str(path), path.resolve().name, column)


def files_in(path: Path, takes: str = "expected") -> list[Path]:
    """Return the files of a folder in order, hidden ones left out, or the file itself. Raises BadInput."""
    try:
        if not path.exists():
            raise BadInput(f"{path} does not exist; {takes} the path of a text")
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            files = [file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts)]
            if not files:
                raise BadInput(f"{path} is a folder without files; give {TAKEN}")
            return files
        if path.is_file():
            return [path]
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror or error})") from error
    raise BadInput(f"{path} is not a regular file; give {TAKEN}")


def _open_files(files: Sequence[Path], label: str, name: str, column: str | None) -> Source:
    columned = [path for path in files if is_columned(path)]
    column = (column or DEFAULT_COLUMN) if columned else None
    identities, size = [], 0
    for path in files:
        digest, length = check_file(path)
        identities.append(digest if _kind(path) == "text" else f"{_kind(path)} {column} {digest}")
        size += length
    if not size:
        raise BadInput(f"{label} is empty; give {TAKEN}")
    source = Source(name, label, tuple(files), column, "\n".join(identities), size)
    if next(source.parts(), None) is None:
        raise BadInput(f"{label} holds no text, only white space or separators; give {TAKEN}")
    return source


def check_column(column: str | None, *sources: Source) -> None:
    """Raise BadInput if --text-column is given and none of the sources has columns."""
    if column is not None and all(source.column is None for source in sources):
        labels = " and ".join(source.label for source in sources)
        raise BadInput(f"--text-column {column} goes with .jsonl and .csv; {labels}: no columns")


# Reading


def _suffix(path: Path) -> str:
    """Return the suffix of a file's name, without .gz and in lower case."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _kind(path: Path) -> str:
    suffix = _suffix(path)
    return "json" if suffix in _JSON else "csv" if suffix in _CSV else "text"


def open_file(path: Path, mode: str, **options: Any) -> Any:
    """Open a file, also a .gz."""
    return (gzip.open if path.name.lower().endswith(".gz") else open)(path, mode, **options)


def is_columned(path: Path) -> bool:
    """Whether a file has records with named columns."""
    return _kind(path) != "text"


def _read(path: Path, column: str | None) -> Iterator[str]:
    with open(path, "rb") as raw:
        yield from read_open(raw, path, column)


def read_open(raw: BinaryIO, path: Path, column: str | None) -> Iterator[str]:
    """Yield the lines of an open file; CRLF and CR become LF, a byte order mark is removed. path: for its name."""
    kind = _kind(path)
    content: Any = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
    file = io.TextIOWrapper(content, encoding="utf-8-sig", newline="" if kind == "csv" else None)
    if kind == "text":
        yield from lines_of(file)
        return
    assert column is not None
    for text in (_json_texts if kind == "json" else _csv_texts)(file, path, column):
        yield from lines_of(io.StringIO(text, newline=None))
        yield f"\n{SEPARATOR}\n"


def _json_texts(file: TextIO, path: Path, column: str) -> Iterator[str]:
    """Yield the text of each line's object; null is no text."""
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        where = f"{path}, line {number:,}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise BadInput(f"{where}, is not a JSON object; expected one per line, with the text in one of its keys")
        if column not in record:
            raise _no_column(where, column, list(record))
        text = record[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise BadInput(f"{where}: {column!r} is {json.dumps(text)[:40]}, no string; give another --text-column")
        if text.encode("utf-8", "replace").decode() != text:
            raise BadInput(f"{where}: {column!r} holds half of a surrogate pair, which is no character; remove it")
        yield text


def _csv_texts(file: TextIO, path: Path, column: str) -> Iterator[str]:
    """Yield the text of each row after the header; the delimiter is a comma, a semicolon or a tab."""
    csv.field_size_limit(sys.maxsize)
    first = file.readline()
    rows = csv.reader(itertools.chain([first], file), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        header = next(rows, [])
        if column not in header:
            raise _no_column(f"{path}", column, header)
        index = header.index(column)
        for row in rows:
            if len(row) != len(header) and row:
                raise BadInput(
                    f"{path}, line {rows.line_num:,}: {plural(len(row), 'column')} where the header has {len(header)}; "
                    "quote texts that hold a comma or a line break"
                )
            if row:
                yield row[index]
    except csv.Error as error:
        raise BadInput(f"{path}, line {rows.line_num:,}, is not CSV ({error})") from error


def _no_column(where: str, column: str, columns: list[str]) -> BadInput:
    names = ", ".join(name if len(name) <= 30 else f"{name[:30]}…" for name in columns[:20]) or "none"
    return BadInput(f"{where}: no column {column!r}; give one of these as --text-column: {names}")


# Checking


def check_file(path: Path) -> tuple[str, int]:
    """Return what identifies the content of a file, and its bytes. Raises BadInput unless it is readable UTF-8."""
    if _suffix(path) in _BINARY:
        raise BadInput(f"{path} cannot be read here, which would need pyarrow; write it as .jsonl or give {TAKEN}")
    try:
        return _digest_utf8(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{path} is not a whole gzip file ({error})") from error
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror or error})") from error


def _digest_utf8(path: Path) -> tuple[str, int]:
    """Hash a file. Raises BadInput with the offset of the first byte that is not UTF-8 text."""
    digest, decoder, offset, within = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0, False
    with open_file(path, "rb") as file:
        while True:
            block = file.read(1 << 16) + file.readline(1 << 16)
            within = within or _has_separator_within(block)
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the last block
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                bad = offset - pending + error.start
                raise BadInput(
                    f"{path} is not UTF-8 text: byte {bad:,} (counted from 0) cannot be decoded; give {TAKEN}"
                ) from None
            if (null := block.find(b"\0")) >= 0:
                raise BadInput(
                    f"{path} is not UTF-8 text: byte {offset + null:,} (counted from 0) is NUL; give {TAKEN}"
                )
            if not block:
                # Texts prepared before separators within lines were read keep their place in the cache.
                return digest.hexdigest() + (" separators within lines" if within else ""), offset
            digest.update(block)
            offset += len(block)


def _has_separator_within(block: bytes) -> bool:
    """Whether whole lines may have a separator beside other text."""
    mark = SEPARATOR.encode()
    if mark not in block:
        return False
    return any(mark in line and line.strip() != mark for line in block.splitlines())
