"""TinyStories (Eldan and Li 2023, arXiv 2305.07759) from the Hugging Face hub, only as much of it as is wanted.

The cache keeps a prefix of each of the hub's two text files, so that the first N of 2.7 million stories cost no more
than their own bytes. A longer prefix is requested from the byte where the present one ends, always of one commit and
only if the file still has the ETag of the bytes that are here; a changed file is fetched anew, never mixed.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_transformer.backend import cache_dir
from mlx_transformer.data import hub
from mlx_transformer.data.hub import endpoint, sentence
from mlx_transformer.data.store import SEPARATOR, progress, sha256_of, unwritable
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import write_json
from mlx_transformer.utils.text import plural

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

REPO = "roneneldan/TinyStories"
TRAIN, VALID = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
DEFAULT_STORIES = 100_000
STORY_BYTES = 820  # mean (2.2 GB, 2.7M stories): for the progress bar only

RETRY_SECONDS = 1.0  # before a failed request is sent again; doubled up to 8, five times at most
CHUNK = 2 << 20  # bytes requested at a time

Say = Callable[[str], None]


class Unreachable(BadInput):
    """TinyStories is neither in the cache nor to be fetched; the sentence says why."""


@dataclass(frozen=True)
class Source:
    """Two texts of stories; `train` may be only a prefix of the hub's file, and end within a character."""

    train: Path
    valid: Path
    identity: str  # ETags of the hub's two files, whatever part of them is here
    how: str  # in words: where the texts come from


def fetch(stories: int, say: Say = print) -> Source:
    """Return the first `stories` training stories and all validation stories, from the cache or from the hub.

    Raises Unreachable if the cache holds fewer and the hub does not answer in time, refuses, or breaks off
    repeatedly; BadInput if the cache cannot be written or the file that arrived is damaged.
    """
    from huggingface_hub.utils import WeakFileLock

    train, valid = _Prefix(TRAIN), _Prefix(VALID)
    if train.holds(stories) and valid.is_complete():
        return Source(train.path, valid.path, f"{train.etag} {valid.etag}", "in the cache")
    if (hub_train := _in_hub_cache(TRAIN)) and (hub_valid := _in_hub_cache(VALID)):
        # A snapshot links to a file that is named by its ETag.
        identity = f"{hub_train.resolve().name} {hub_valid.resolve().name}"
        return Source(hub_train, hub_valid, identity, "in the cache of huggingface_hub")
    described = _describe(f"the cache holds {train.stories:,} of {plural(stories, 'story')}")
    try:
        train.path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(train.path.parent / "lock"):
            train, valid = _Prefix(TRAIN), _Prefix(VALID)  # another process may have extended them
            valid.extend(None, described[VALID], say)
            train.extend(stories, described[TRAIN], say)
    except OSError as error:
        raise unwritable(train.path.parent, error) from error
    return Source(train.path, valid.path, f"{train.etag} {valid.etag}", "fetched from the hub")


def _in_hub_cache(name: str) -> Path | None:
    """Return the path of a file that huggingface_hub itself has downloaded before, or None."""
    from huggingface_hub import constants, try_to_load_from_cache

    path = try_to_load_from_cache(REPO, name, cache_dir=constants.HF_HUB_CACHE, repo_type="dataset")
    return Path(path) if isinstance(path, str) else None


def _url(name: str, commit: str | None = None) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(REPO, name, repo_type="dataset", revision=commit, endpoint=endpoint())


def _describe(held: str) -> "dict[str, HfFileMetadata]":
    """Return commit, ETag and size of the hub's files. Raises Unreachable, with the reason and `held`."""
    from huggingface_hub import get_hf_file_metadata

    def request() -> "dict[str, HfFileMetadata]":
        return {name: get_hf_file_metadata(_url(name), timeout=hub.REACH_SECONDS) for name in (TRAIN, VALID)}

    try:
        described = hub.ask(request)
    except hub.Unanswered as error:
        raise Unreachable(f"TinyStories is out of reach: {error}, and {held}") from None
    if not all(file.commit_hash and file.etag and file.size for file in described.values()):
        raise Unreachable(f"TinyStories is out of reach: what answers at {_url(TRAIN)} is no hub, and {held}")
    return described


def _read(name: str, commit: str | None, first: int) -> bytes:
    """Return bytes first ... first + CHUNK of a file, to its end at most. Raises HTTPError (of the HTTP client)."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    headers = build_hf_headers() | {"Range": f"bytes={first}-{first + CHUNK - 1}", "Accept-Encoding": "identity"}
    url, wait = _url(name, commit), RETRY_SECONDS
    response = http_backoff("GET", url, headers=headers, timeout=10, follow_redirects=True, base_wait_time=wait)
    hf_raise_for_status(response)
    if response.status_code != 206 or not response.content:
        raise Unreachable(f"TinyStories is out of reach: the hub sends no parts of {name}")
    return response.content


class _Prefix:
    """A prefix of one of the hub's files, in the cache."""

    def __init__(self, name: str):
        self.name = name
        self.path = cache_dir() / "hub" / name
        self._facts = self.path.with_name(f"{name}.json")
        self._reset("", -1)
        try:
            facts = json.loads(self._facts.read_text())
            self._reset(str(facts["etag"]), int(facts["size"]))
            with open(self.path, "rb") as file:
                while block := file.read(1 << 16):
                    self._count(block)
            if self.held > self.size:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            self._reset("", -1)

    def _reset(self, etag: str, size: int) -> None:
        self.etag, self.size, self.held, self.stories, self._tail = etag, size, 0, 0, b""

    def is_complete(self) -> bool:
        return self.held == self.size

    def holds(self, stories: int | None) -> bool:
        """Whether the first `stories` stories (None: all) are here."""
        return self.is_complete() or (stories is not None and self.stories >= stories)

    def extend(self, stories: int | None, remote: "HfFileMetadata", say: Say) -> None:
        """Fetch until the first `stories` stories (None: all) are here.

        Raises Unreachable when requests fail repeatedly, BadInput if the whole file is not the hub's.
        """
        from huggingface_hub.errors import HTTPError

        if (self.etag, self.size) != (remote.etag, remote.size):
            self._start_over(remote, say)
        expected = self.size if stories is None else stories * STORY_BYTES
        try:
            with progress(f"fetching {self.name}", expected) as advance, open(self.path, "ab") as file:
                advance(self.held)
                while not self.holds(stories):
                    block = _read(self.name, remote.commit_hash, self.held)
                    file.write(block)
                    self._count(block)
                    advance(len(block))
        except HTTPError as error:
            raise Unreachable(
                f"TinyStories is out of reach: {self.name} broke off at {self.held / 1e6:.1f} MB ({sentence(error)}); "
                "the next run resumes there"
            ) from error
        self._verify()

    def _start_over(self, remote: "HfFileMetadata", say: Say) -> None:
        if self.held:
            say(f"{self.name} is not what it was on the hub, and is fetched anew")
        self.path.unlink(missing_ok=True)
        self._reset(str(remote.etag), int(remote.size or 0))
        write_json(self._facts, {"etag": self.etag, "size": self.size})

    def _count(self, block: bytes) -> None:
        """Count appended bytes and the separators among them, also one across two blocks."""
        mark = SEPARATOR.encode()
        joined = self._tail + block
        self.stories += joined.count(mark)
        self._tail = joined[-(len(mark) - 1) :]
        self.held += len(block)

    def _verify(self) -> None:
        """Compare a whole file with the sha256 by which the hub names a large one; delete it if they differ."""
        named = self.is_complete() and re.fullmatch(r"[0-9a-f]{64}", self.etag)
        if named and sha256_of(self.path) != self.etag:
            self.path.unlink()
            raise BadInput(f"{self.path} was not the hub's file and has been deleted; run the same command again")
