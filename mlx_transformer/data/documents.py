"""Documents of a text: read as a stream of lines, split at the separators, counted, hashed.

A separator ends a document wherever it stands, alone on its line or within one. White space around a document is
removed, and empty documents are left out.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from mlx_transformer.data.store import SEPARATOR

SEGMENT = 1 << 20  # characters: a longer document or line is handled in several parts

Part = tuple[str, bool]  # text, and whether it ends a document


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a text, each whole."""
    document: list[str] = []
    for text, ends in read_parts(path):
        document.append(text)
        if ends:
            yield "".join(document)
            document.clear()


def read_parts(path: Path, errors: str = "strict") -> Iterator[Part]:
    """Yield the documents of a text in order, a long one in several parts, which joined are the document."""
    return group(read_lines(path, errors))


def read_lines(path: Path, errors: str = "strict") -> Iterator[str]:
    """Yield the lines of a text; CRLF and CR become LF, a byte order mark is removed."""
    with open(path, encoding="utf-8-sig", errors=errors) as file:
        yield from lines_of(file)


def lines_of(file: TextIO) -> Iterator[str]:
    """Yield lines, one longer than SEGMENT in several parts, with every separator whole in one of them."""
    held = ""
    for line in iter(functools.partial(file.readline, SEGMENT), ""):
        line = held + line
        end = len(line) - (0 if line.endswith("\n") else _begun(line))
        held = line[end:]
        if end:
            yield line[:end]
    if held:
        yield held


def _begun(line: str) -> int:
    """Return how many characters at the end of a line may be the beginning of a separator."""
    return next((n for n in range(len(SEPARATOR) - 1, 0, -1) if line.endswith(SEPARATOR[:n])), 0)


def group(lines: Iterable[str]) -> Iterator[Part]:
    """Group lines into documents, each stripped of the white space around it."""
    held: list[str] = []
    size, started, space = 0, False, ""
    for line in lines:
        for number, text in enumerate(line.split(SEPARATOR)):
            if number:  # text follows a separator
                if started:
                    yield "".join(held), True
                held, size, started, space = [], 0, False, ""
            body = text.rstrip() if started else text.strip()
            if not body:
                space += text if started else ""  # belongs to the document only if more text follows
                continue
            if size >= SEGMENT:
                yield "".join(held), False
                held, size = [], 0
            held += (space, body)
            size += len(space) + len(body)
            started, space = True, text[len(text.rstrip()) :]
    if started:
        yield "".join(held), True


def take(parts: Iterator[Part], documents: int) -> Iterator[Part]:
    """Yield the next `documents` documents and leave the rest in `parts`."""
    while documents > 0 and (part := next(parts, None)) is not None:
        documents -= part[1]
        yield part


def digests(parts: Iterable[Part]) -> list[bytes]:
    """Return a 128-bit digest of each document, by which duplicates are recognized."""
    found, digest = [], hashlib.blake2b(digest_size=16)
    for text, ends in parts:
        digest.update(text.encode())
        if ends:
            found.append(digest.digest())
            digest = hashlib.blake2b(digest_size=16)
    return found
