"""A full or read-only disk: one sentence, nothing damaged, and the run can be resumed once there is space."""

import errno
import os
import re
import shutil
import subprocess
import sys

import pytest

from mlx_transformer.train.checkpoint import load_newest
from tests.faults.runs import ON_CPU, assert_same_run, train


@pytest.fixture(scope="module")
def tiny(text):
    return [*ON_CPU, "--data", text, "--quiet", "--max-steps", 20, "--eval-every", 6, "--save-every", 4]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(*tiny, "--out", folder).code == 0
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 500 kB, and a function that remounts it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True)

    if sys.platform != "linux" or not shutil.which("mount") or mount("size=500k").returncode:
        pytest.skip("mounting a small file system needs root on Linux")
    yield folder, lambda *options: mount("remount", *options)
    subprocess.run(["umount", "--lazy", folder], check=True)


class Refusal:
    """An audit hook cannot be removed, only switched off."""

    pattern: str | None = None
    installed = False

    @classmethod
    def hook(cls, event, values):
        writes = event in ("os.rename", "os.mkdir") or (
            event == "open" and (values[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        )
        if cls.pattern and writes and re.search(cls.pattern, f"{event} {values[0]}"):
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def refuse():
    """A function that makes every write to a matching name fail; None: no write."""
    if not Refusal.installed:
        sys.addaudithook(Refusal.hook)
        Refusal.installed = True

    def set_pattern(pattern):
        Refusal.pattern = pattern

    yield set_pattern
    Refusal.pattern = None


def assert_failed(outcome, folder):
    assert outcome.code == 1, outcome
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("error: could not "), outcome.err
    assert "free some space, then" in outcome.err, outcome.err
    assert str(folder) in outcome.err


WRITTEN = (r"log\.txt", r"curve\.jsonl", r"step_00000008.*state\.json", r"os.rename .*step_00000012", r"result\.json")
WRITTEN_TOO = (r"stories\.md", r"model/.*tokenizer", r"os.rename .*config\.json", r"report\.md")


@pytest.mark.parametrize("pattern", [*WRITTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in WRITTEN_TOO)])
def test_each_file_that_cannot_be_written(pattern, tiny, whole, refuse, tmp_path):
    folder = tmp_path / "run"
    refuse(pattern)
    assert_failed(train(*tiny, "--out", folder), folder)
    refuse(None)
    assert not (folder / "result.json").exists()
    assert train("--resume", folder, "--quiet").code == 0
    assert_same_run(folder, whole)


def test_after_settings_that_cannot_be_written_the_folder_can_be_used(tiny, whole, refuse, tmp_path):
    folder = tmp_path / "run"
    refuse(r"\.settings\.json")
    assert_failed(train(*tiny, "--out", folder), folder)
    refuse(None)
    assert train(*tiny, "--out", folder).code == 0
    assert_same_run(folder, whole)


def test_a_full_disk(tiny, whole, small_disk):
    disk, remount = small_disk
    folder = disk / "run"
    assert_failed(train(*tiny, "--out", folder), folder)
    assert load_newest(folder / "checkpoints")[2] == []
    assert_failed(train("--resume", folder, "--quiet"), folder)  # still full
    assert load_newest(folder / "checkpoints")[2] == []
    remount("size=20m")
    assert train("--resume", folder, "--quiet").code == 0
    assert_same_run(folder, whole)


def test_a_disk_that_is_full_from_the_start(tiny, small_disk):
    disk, _ = small_disk
    (disk / "filler").write_bytes(bytes(500 * 1024))
    outcome = train(*tiny, "--out", disk / "run")
    assert outcome.code in (1, 2)
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1


def test_a_read_only_disk(tiny, small_disk):
    disk, remount = small_disk
    remount("size=20m")
    assert train(*tiny, "--max-steps", 4, "--out", disk / "run").code == 0
    remount("ro")
    for flags in (["--resume", disk / "run", "--max-steps", 8], [*tiny, "--out", disk / "other"]):
        outcome = train(*flags)
        assert outcome.code == 2
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        assert re.search("not writable|cannot be written", outcome.err)


def test_a_cache_that_is_full(tiny, small_disk, tmp_path, monkeypatch):
    disk, _ = small_disk
    (disk / "filler").write_bytes(bytes(490 * 1024))
    monkeypatch.setenv("MLX_TRANSFORMER_CACHE", str(disk))
    outcome = train(*tiny, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert re.fullmatch(r"error: cannot write the cache .*No space left on device.*\n", outcome.err)
    assert not (tmp_path / "run").exists()
