"""Files and folders that are complete or absent: written under a temporary name, synced, renamed."""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_transformer.utils.errors import BadInput, RunFailed, is_out_of_memory


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write data (text as UTF-8, without newline translation) to path: readers see the old file or the whole new one.

    Raises OSError (disk full, not writable); an old file is then unchanged and the temporary file removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write value as indented JSON, atomically; NaN and infinity become null."""
    atomic_write(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """Encode value as indented JSON; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def lock_file(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold an exclusive lock on a file; yield False without one where the file system has no locks (ENOLCK, ENOSYS).

    Raises BlockingIOError if another process holds it and `wait` is false, OSError if the file cannot be opened.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # EACCES: some network file systems
                raise BlockingIOError(*error.args) from None
            locked = False
        yield locked


def sync(descriptor: int) -> None:
    """Wait until a file or folder, as it is now, would survive a power cut.

    On macOS fsync leaves it in the disk's own cache; F_FULLFSYNC does not, but some file systems refuse it.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_path(path: Path) -> None:
    """Sync a file that another library wrote, or a folder in which something was renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def as_bad_input(folder: Path | None) -> Iterator[None]:
    """Raise BadInput naming the folder for an OSError inside."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"'{folder}' cannot be used ({error.strerror}): give another folder") from error


def check_place(out: Path) -> None:
    """Raise BadInput if out is not a folder and cannot be created; OSError if that cannot be determined."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"'{out}' is a file: expected a folder that is new or empty")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise BadInput(f"'{out}' cannot be made: '{parent}' is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput(f"'{out}' cannot be made: '{parent}' is not writable")


def check_new(folder: Path) -> None:
    """Raise BadInput unless folder is empty or can be created."""
    with as_bad_input(folder):
        check_place(folder)
        if folder.is_dir() and any(folder.iterdir()):
            raise BadInput(f"'{folder}' is not empty: expected a folder that is new or empty")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` when all is written: it is complete or absent.

    An existing empty folder, perhaps somebody's working directory, stays and receives the contents. Raises RunFailed if
    something cannot be written.
    """
    folder = folder.resolve()
    temporary = folder.with_name(f".{os.getpid()}.tmp")  # short: folder's own name may be as long as names can be
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync_path(path)
        if folder.is_dir():
            for part in temporary.iterdir():
                part.rename(folder / part.name)
        else:
            temporary.rename(folder)
    except (OSError, RuntimeError) as error:  # MLX reports a failed write as RuntimeError
        if is_out_of_memory(error):
            raise
        raise RunFailed(f"could not write '{folder}' ({error}): free some space, or give another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
