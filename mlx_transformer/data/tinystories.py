"""TinyStories (Eldan and Li 2023, arXiv 2305.07759) from the Hugging Face hub, as much of it as is wanted.

The hub's files are read by HTTP ranges into growing prefixes in the cache, so that the first N of 2.7 million stories
cost no more than their own bytes, and a download that was cut off goes on where it was. The ETag of every answer is
compared with that of the bytes already there: a file that changed on the hub is fetched anew, never mixed.
"""

import contextlib
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_transformer.backend import runtime
from mlx_transformer.data.store import SEPARATOR, progress, sha256_of, unwritable
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import write_json

REPO = "roneneldan/TinyStories"
TRAIN, VALID = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
DEFAULT_STORIES = 100_000
STORY_BYTES = 820  # on average (2.2 GB, 2.7M stories): for the progress bar only

REACH_SECONDS = 5.0  # until the hub counts as out of reach, name resolution included
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0)  # pauses after attempts that bring nothing; then the download is given up
CHANGES = 3  # that a file may make on the hub while it is fetched
LONGEST_PAUSE = 30.0  # seconds that a server may ask for (Retry-After)
STALL_SECONDS = 10.0  # without a byte
_PROBE_PAUSE = 0.5  # seconds between two questions whether a busy hub is there
CHUNK = 8 << 20  # bytes asked for at a time

Say = Callable[[str], None]


class Unreachable(BadInput):
    """TinyStories is neither in the cache nor to be fetched; the sentence says why."""


@dataclass(frozen=True)
class Source:
    """Two texts of stories; `train` may be only a prefix of the hub's file, and end within a character."""

    train: Path
    valid: Path
    identity: str  # of the hub's two files, whatever part of them is here
    how: str  # in words: where they come from


def fetch(stories: int, say: Say = print) -> Source:
    """The first so many training stories and all validation stories, from the cache or from the hub.

    Raises Unreachable if the cache holds fewer and the hub does not answer within REACH_SECONDS, refuses, or breaks off
    again and again; BadInput if the cache cannot be written.
    """
    train, valid = _Download(TRAIN), _Download(VALID)
    if train.holds(stories) and valid.complete():
        return Source(train.path, valid.path, f"{train.etag} {valid.etag}", "in the cache")
    if (theirs := _in_hub_cache(TRAIN)) and (their_valid := _in_hub_cache(VALID)):
        # A snapshot links to a file that is named by its ETag.
        identity = f"{theirs.resolve().name} {their_valid.resolve().name}"
        return Source(theirs, their_valid, identity, "in the cache of huggingface_hub")
    _require_hub(train, stories)
    try:
        with _lock(train.path.parent, say):
            train, valid = _Download(TRAIN), _Download(VALID)  # another process may have made them longer
            valid.run(None, say)
            train.run(stories, say)
    except OSError as error:
        raise unwritable(train.path.parent, error) from error
    return Source(train.path, valid.path, f"{train.etag} {valid.etag}", "fetched from the hub")


def _in_hub_cache(name: str) -> Path | None:
    """The path of a file that huggingface_hub itself has downloaded before, or None."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(REPO, name, cache_dir=constants.HF_HUB_CACHE, repo_type="dataset")
    return Path(found) if isinstance(found, str) else None


def _require_hub(train: "_Download", stories: int) -> None:
    from huggingface_hub import constants

    held = f"the cache holds {train.stories:,} of {stories:,} stories"
    if constants.HF_HUB_OFFLINE:
        raise Unreachable(f"TinyStories is out of reach: HF_HUB_OFFLINE is set, and {held}")
    outcome = [f"no answer from the hub within {REACH_SECONDS:g} s"]
    # In a thread, because looking up a host name can hang longer than any timeout of the HTTP client.
    thread = threading.Thread(target=lambda: outcome.__setitem__(0, _probe()), daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    if outcome[0]:
        raise Unreachable(f"TinyStories is out of reach: {outcome[0]}, and {held}")


def _probe() -> str:
    """Ask for one byte until the hub gives it; the reason why it did not, or an empty string."""
    deadline = time.monotonic() + REACH_SECONDS - _PROBE_PAUSE
    while True:
        try:
            with _get(TRAIN, 0, 0, timeout=REACH_SECONDS) as response:
                if response.status_code in (200, 206):
                    return ""
                if not _is_passing(response.status_code) or time.monotonic() > deadline:
                    return f"the hub answered {response.status_code} to {response.url.copy_with(query=None)}"
        except Exception as error:  # whatever it is (a bad URL, a proxy, TLS), it means that there is no hub here
            return " ".join(f"{type(error).__name__}: {error}".split())
        time.sleep(_PROBE_PAUSE)


def _is_passing(status: int) -> bool:
    """Whether the same request may succeed a little later."""
    return status in (408, 425, 429) or status >= 500


def _get(name: str, first: int, last: int, timeout: float) -> Any:
    """Context manager of the streamed answer to a request for bytes first..last of one of the hub's files."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    url = hf_hub_url(REPO, name, repo_type="dataset", endpoint=endpoint)
    headers = build_hf_headers() | {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
    return get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)


@contextlib.contextmanager
def _lock(folder: Path, say: Say) -> Iterator[None]:
    """One download at a time into a cache, over processes."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that is fetching TinyStories")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Retry(Exception):
    """This attempt failed, the next may not; `pause` in seconds is what the server asked for."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class _Download:
    """A prefix of one of the hub's files, in the cache, and how to make it longer."""

    def __init__(self, name: str):
        self.name = name
        self.path = runtime.cache_dir() / "hub" / name
        self._facts = self.path.with_name(f"{name}.json")
        self.held, self.stories, self._tail, self._changes = 0, 0, b"", 0
        try:
            facts = json.loads(self._facts.read_text())
            self.etag, self.size = str(facts["etag"]), int(facts["size"])
            with open(self.path, "rb") as file:
                while block := file.read(1 << 16):
                    self._count(block)
        except (OSError, ValueError, KeyError, TypeError):
            self.etag, self.size, self.held, self.stories, self._tail = "", -1, 0, 0, b""

    def complete(self) -> bool:
        return self.held == self.size

    def holds(self, stories: int | None) -> bool:
        """Whether the first so many stories (None: all) are here."""
        return self.complete() or (stories is not None and self.stories >= stories)

    def run(self, stories: int | None, say: Say) -> None:
        """Fetch until the first so many stories are here. Raises Unreachable when attempts in a row bring nothing."""
        failures = 0
        expected = self.size if stories is None else stories * STORY_BYTES
        with progress(f"fetching {self.name}", expected) as advance:
            advance(self.held)
            while not self.holds(stories):
                before = self.held
                try:
                    self._attempt(stories, say, advance)
                except _Retry as error:
                    failures = 0 if self.held > before else failures + 1
                    if failures > len(RETRY_SECONDS):
                        raise self._given_up(error) from error
                    time.sleep(max(RETRY_SECONDS[max(0, failures - 1)], error.pause))

    def _given_up(self, reason: Exception) -> Unreachable:
        return Unreachable(
            f"TinyStories is out of reach: {self.name} broke off at {self.held / 1e6:.1f} MB again and again "
            f"({reason}); the next run goes on from there"
        )

    def _attempt(self, stories: int | None, say: Say, advance: Callable[[int], None]) -> None:
        from huggingface_hub.errors import HTTPError

        before = self.held
        try:
            with _get(self.name, self.held, self.held + CHUNK - 1, timeout=STALL_SECONDS) as response:
                skip = self._accept(response, say)
                with open(self.path, "ab") as file:
                    file.truncate(self.held)
                    for block in response.iter_bytes():
                        fresh, skip = block[skip:], max(0, skip - len(block))
                        file.write(fresh)
                        self._count(fresh)
                        advance(len(fresh))
                        if self.holds(stories):
                            break
        except HTTPError as error:
            raise _Retry(f"{type(error).__name__}: {error}") from error
        if self.held == before and not self.complete():
            raise _Retry("the hub sent nothing")
        if self.complete():
            self._verify(say)

    def _accept(self, response: Any, say: Say) -> int:
        """Check an answer before a byte of it is kept; how many of its first bytes are here already."""
        status, headers = response.status_code, response.headers
        if _is_passing(status):
            pause = headers.get("retry-after", "0")
            raise _Retry(f"the hub answered {status}", min(float(pause) if pause.isdigit() else 0.0, LONGEST_PAUSE))
        if status == 416:  # the file has become shorter than what is here
            self._start_over("", -1, say)
            raise _Retry("the file changed on the hub")
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("content-range", "")) if status == 206 else None
        size = int(span[2]) if span else int(headers.get("content-length", -1)) if status == 200 else -1
        if status not in (200, 206) or size < 1 or headers.get("content-encoding", "identity") != "identity":
            raise Unreachable(
                f"TinyStories is out of reach: the hub answered {status} to {self.name}, and no plain bytes"
            )
        etag = _etag(response)
        if (etag, size) != (self.etag, self.size):
            self._start_over(etag, size, say)
        first = int(span[1]) if span else 0
        if first > self.held:
            raise _Retry("the file changed on the hub")
        return self.held - first

    def _start_over(self, etag: str, size: int, say: Say) -> None:
        if self.held:
            self._changes += 1
            say(f"{self.name} is not what it was on the hub, and is fetched anew")
        if self._changes > CHANGES:
            raise Unreachable(f"TinyStories is out of reach: {self.name} is another one at every request")
        self.path.unlink(missing_ok=True)
        self.etag, self.size, self.held, self.stories, self._tail = etag, size, 0, 0, b""
        write_json(self._facts, {"etag": etag, "size": size})

    def _count(self, block: bytes) -> None:
        """Take note of bytes appended: their number and the separators among them, also one across two blocks."""
        mark = SEPARATOR.encode()
        joined = self._tail + block
        self.stories += joined.count(mark)
        self._tail = joined[-(len(mark) - 1) :]
        self.held += len(block)

    def _verify(self, say: Say) -> None:
        """The hub names a large file by its sha256; a whole one that is something else is fetched anew."""
        if re.fullmatch(r"[0-9a-f]{64}", self.etag) and sha256_of(self.path) != self.etag:
            self._start_over("", -1, say)
            raise _Retry("the bytes that came are not the file's")


def _etag(response: Any) -> str:
    """What names a version of the file: the hub's own ETag, given with its redirect, else that of the last server."""
    for answer in (*response.history, response):
        if linked := answer.headers.get("x-linked-etag"):
            return linked.strip('W/"')
    return (response.headers.get("etag") or response.headers.get("last-modified", "")).strip('W/"')
