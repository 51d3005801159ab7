"""Files that survive a power cut: each is synced before it is renamed, on macOS by F_FULLFSYNC."""

import errno
import fcntl
import os
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_transformer.data.store import cached_folder
from mlx_transformer.train.checkpoint import save_checkpoint
from mlx_transformer.utils import files

F_FULLFSYNC = 51  # as macOS defines it


class Disk:
    """What is synced by which call, by inode, and whether all of it was before it is renamed."""

    def __init__(self, monkeypatch, refuse):
        self.full, self.plain, self.renamed, self.refuse = [], [], [], refuse
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self.checked(getattr(os, name)))
        plain, control = os.fsync, fcntl.fcntl
        monkeypatch.setattr(os, "fsync", lambda fd: (self.plain.append(os.fstat(fd).st_ino), plain(fd)))
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
        monkeypatch.setattr(fcntl, "fcntl", lambda fd, *a: self.sync(fd) if a == (F_FULLFSYNC,) else control(fd, *a))

    def sync(self, descriptor):
        self.full.append(os.fstat(descriptor).st_ino)
        if self.refuse:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    def checked(self, rename):
        def wrapped(source, target, **options):
            written = {path for path in (Path(source), *Path(source).rglob("*")) if path.is_file()}
            assert {path.stat().st_ino for path in written} <= set(self.full), "renamed before it was synced"
            rename(source, target, **options)
            self.renamed.append(Path(target))

        return wrapped


@pytest.fixture(params=[False, True], ids=["taken", "refused"])
def disk(request, monkeypatch):
    return Disk(monkeypatch, request.param)


def write_folder(folder):
    with files.new_folder(folder) as temporary:
        (temporary / "part").mkdir()
        mx.save_safetensors(str(temporary / "part" / "a.safetensors"), {"a": mx.ones(2)})
        (temporary / "b.txt").write_text("b")


WRITERS = {
    "a file": lambda place: files.atomic_write(place / "a.json", "{}"),
    "a checkpoint": lambda place: save_checkpoint(place, 1, {"a": mx.ones(3)}, {"step": 1}),
    "a folder": lambda place: write_folder(place / "new"),
    "prepared data": lambda place: cached_folder("kind", "name", lambda folder: (folder / "a.bin").write_bytes(b"a")),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_everything_is_on_the_disk_before_it_is_renamed(disk, write, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_TRANSFORMER_CACHE", str(tmp_path / "cache"))
    write(tmp_path)
    assert disk.renamed
    assert disk.plain == (disk.full if disk.refuse else []), "fsync where F_FULLFSYNC is refused, and only there"


def test_linux_has_fsync_alone(monkeypatch, tmp_path):
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    files.atomic_write(tmp_path / "a", b"a")
    assert len(synced) == 2, "the file, then its folder"
