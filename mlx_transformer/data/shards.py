"""Texts larger than a disk: the files (shards) of a folder or of a data set of the hub, read while a model trains.

No file is copied or read to its end before it is needed. A file of the hub is fetched when its turn comes, the next one
while it is read, and deleted as soon as it is open.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Queue
from typing import BinaryIO, Generic, TypeVar

from mlx_transformer.backend import cache_dir
from mlx_transformer.data import hub
from mlx_transformer.data.documents import Part, group
from mlx_transformer.data.sources import DEFAULT_COLUMN, FORMATS, TAKEN, files_in, is_columned, read_open
from mlx_transformer.data.store import unwritable
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.text import plural

T = TypeVar("T")
STREAM_BYTES = 5_000_000_000  # as stored; a folder or data set with more is streamed
_TRIES, RETRY_SECONDS = 5, 2.0  # of a file that the hub does not send; the wait is doubled each time
_ABANDONED = 86_400.0  # seconds after which a file that another process has fetched, and not opened, is deleted


class Ahead(Generic[T]):
    """A value that a thread computes while it is not needed yet; `result` waits for it, or raises what was raised."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._done: Queue[tuple[T | None, BaseException | None]] = Queue(1)
        threading.Thread(target=self._run, args=(function,), daemon=True).start()

    def _run(self, function: Callable[[], T]) -> None:
        try:
            self._done.put((function(), None))
        except BaseException as error:  # raised where the value is wanted
            self._done.put((None, error))

    def result(self) -> T:
        value, error = self._done.get()
        self._done.put((value, error))
        if error is not None:
            raise error
        return value  # type: ignore[return-value]


class Shard:
    """An open file of documents."""

    def __init__(self, raw: BinaryIO, path: Path, column: str | None) -> None:
        self._raw, self._path, self._column = raw, path, column
        self._size = os.fstat(raw.fileno()).st_size
        self.consumed = 0  # bytes read so far, as stored

    def parts(self) -> Iterator[Part]:
        """Yield its documents, a long one in several parts. Raises RunFailed where it cannot be read, or is empty."""
        found = False
        try:
            with self._raw:
                for part in group(read_open(self._raw, self._path, self._column)):
                    found = True
                    self.consumed = self._size if self._raw.closed else self._raw.tell()  # closed behind the last line
                    yield part
        except BadInput as error:
            raise RunFailed(str(error)) from error
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise RunFailed(f"{self._path.name} of the streamed text cannot be read ({error})") from error
        if not found:
            raise RunFailed(f"{self._path.name} of the streamed text is empty, or holds white space only: remove it")


class Shards:
    """Files of one text, by number in the order of their names. sizes: bytes as stored, by name."""

    def __init__(
        self,
        name: str,
        label: str,
        sizes: dict[str, int],
        column: str | None,
        place: Path | hub.Listing,
    ) -> None:
        self.name, self.label, self.sizes, self.place = name, label, sizes, place
        self.files = [*sizes]
        self.column = (column or DEFAULT_COLUMN) if any(is_columned(Path(file)) for file in self.files) else None
        self._coming: dict[int, Ahead[Path]] = {}

    def __len__(self) -> int:
        return len(self.files)

    @property
    def size(self) -> int:
        """Bytes as stored."""
        return sum(self.sizes.values())

    @property
    def identity(self) -> str:
        """What identifies the text without reading it: the names and sizes of its files, and the hub's revision."""
        revision = self.place.revision if isinstance(self.place, hub.Listing) else ""
        return json.dumps([revision, self.column, self.sizes])

    def only(self, files: Sequence[str]) -> "Shards":
        """Return some of the files."""
        return Shards(self.name, self.label, {file: self.sizes[file] for file in files}, self.column, self.place)

    def expect(self, number: int) -> None:
        """Begin to fetch a file that is wanted next."""
        if isinstance(self.place, hub.Listing) and number not in self._coming:
            self._coming[number] = Ahead(lambda: self._fetch(self.files[number]))

    def open(self, number: int) -> Shard:
        """Open a file. Raises RunFailed if it is gone, has changed, or cannot be fetched."""
        file = self.files[number]
        if isinstance(self.place, hub.Listing):
            self.expect(number)
            path = self._coming.pop(number).result()
            raw = path.open("rb")
            shutil.rmtree(self._folder_of(path, file), ignore_errors=True)  # an open file stays readable
            return Shard(raw, path, self.column)
        path = self.place / file
        try:
            raw = path.open("rb")
        except OSError as error:
            raise RunFailed(f"{path} of the streamed text is gone or cannot be read ({error.strerror})") from error
        if (size := os.fstat(raw.fileno()).st_size) != self.sizes[file]:
            raw.close()
            raise RunFailed(f"{path} of the streamed text has changed: {size:,} bytes, {self.sizes[file]:,} before")
        return Shard(raw, path, self.column)

    def _fetch(self, file: str) -> Path:
        """Fetch a file of the hub into a folder of its own. Raises RunFailed after some tries."""
        assert isinstance(self.place, hub.Listing)
        root = cache_dir() / "hub" / "streamed"
        try:
            root.mkdir(parents=True, exist_ok=True)
            _sweep(root)
            folder = Path(tempfile.mkdtemp(dir=root))
        except OSError as error:
            raise unwritable(root, error) from error
        wait = RETRY_SECONDS
        for left in reversed(range(_TRIES)):
            try:
                return hub.download(self.place, file, folder)
            except BadInput as error:
                if not left:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise RunFailed(str(error)) from error
            time.sleep(wait)
            wait *= 2
        raise AssertionError

    @staticmethod
    def _folder_of(path: Path, file: str) -> Path:
        return path.parents[len(Path(file).parts) - 1]


def _sweep(root: Path) -> None:
    """Delete what killed processes have fetched."""
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def find_shards(label: str, column: str | None, stream: bool) -> Shards | None:
    """Return the files of a text that is streamed; None for one that is not.

    stream: whether the user wants it; otherwise a folder or data set of several files is, above STREAM_BYTES.

    Raises BadInput, where the user wants it, for a text that is none of these or holds an empty file.
    """
    path = Path(label).expanduser()
    if not os.path.exists(path) and hub.is_name(label, tuple(itertools.chain(*FORMATS))):
        try:
            listing = hub.find(label, FORMATS)
        except hub.Unanswered as error:
            if stream:
                raise hub.out_of_reach(label, error) from None
            return None
        found = Shards(label, label, listing.sizes, column, listing)
    elif stream or os.path.exists(path):
        files = files_in(path, "--stream takes a folder of texts, OWNER/NAME of the hub or")
        folder = path if path.is_dir() else path.parent
        sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
        found = Shards(path.resolve().name, label, sizes, column, folder)
    else:
        return None
    if not stream and (len(found) < 2 or found.size <= STREAM_BYTES):
        return None
    if empty := [file for file, size in found.sizes.items() if not size]:
        raise BadInput(f"{empty[0]} of {label} is empty: remove it, or give {TAKEN}")
    return found


def check_count(shards: Shards, ranks: int) -> None:
    """Raise BadInput if there are fewer files than ranks."""
    if len(shards) < ranks:
        raise BadInput(
            f"{shards.label} has {plural(len(shards), 'file')} to train on, and {ranks} ranks read files of their own: "
            f"start {len(shards)} at most, or divide the text among more files"
        )
