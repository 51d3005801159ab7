"""The cache of prepared data: folders that are complete or absent, and the progress bar for filling them."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_transformer.backend import cache_dir
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import sync_path, write_json

SEPARATOR = "<|endoftext|>"  # the line that ends a document, in every text here

_MANIFEST = "manifest.json"  # file sizes: a folder with a file of another size is built again
_ABANDONED = 3600.0  # seconds without a write, after which another process's unfinished folder is deleted


def cached_folder(kind: str, name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder <cache>/kind/name; unless it is complete, `build` fills a temporary one, which is then renamed.

    Leaves a complete folder or none, also when it is killed or runs twice at once. Raises BadInput if the disk is full
    or the cache cannot be written.
    """
    root = cache_dir() / kind
    final = root / name
    if _intact(final):
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root, name)
        staged = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    except OSError as error:
        raise unwritable(root, error) from error
    try:
        build(staged)
        _seal(staged)
        _put_in_place(staged, final)
    except OSError as error:
        raise unwritable(root, error) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return final


def unwritable(folder: Path, error: OSError) -> BadInput:
    """Make the error for a cache that cannot be written."""
    reason = error.strerror or str(error)
    return BadInput(
        f"cannot write the cache {folder} ({reason}); free some space or set MLX_TRANSFORMER_CACHE to another folder"
    )


def _sweep(root: Path, name: str) -> None:
    """Delete the unfinished folders of processes that ended."""
    for folder in root.glob(f".{name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - max(p.stat().st_mtime for p in (folder, *folder.iterdir())) > _ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def _intact(folder: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((folder / _MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _seal(folder: Path) -> None:
    """Write the manifest and sync every file to the disk, so that the contents are there before the rename."""
    write_json(folder / _MANIFEST, {path.name: path.stat().st_size for path in folder.iterdir()})
    for path in folder.iterdir():
        sync_path(path)


def _put_in_place(staged: Path, final: Path) -> None:
    with contextlib.suppress(OSError):  # fails if another process was faster: its folder has the same content
        os.rename(staged, final)
        return
    if _intact(final):
        return
    shutil.rmtree(final, ignore_errors=True)
    os.rename(staged, final)


def sha256_of(path: Path) -> str:
    """Hash the bytes of a file. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 16):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar over `total` bytes, on a terminal only; yield the function that advances it by a number of bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from mlx_transformer.utils.terminal import Terminal

    console = Terminal(stderr=True)
    if not console.is_terminal:
        yield lambda count: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
