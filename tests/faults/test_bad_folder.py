"""Run folders that cannot be written or resumed: one sentence, exit code 2, nothing changed."""

import errno
import fcntl
import json
import os
import re
import shutil
from unittest import mock

import pytest

from mlx_transformer.run import training as run_module
from tests.faults.runs import TINY, assert_bad, result, train, weights, write_text

# --out


def test_out_names_a_folder_in_use(tiny, finished, copied, text):
    assert_bad(train(*tiny, "--out", finished), "holds a finished run")
    (copied / "result.json").unlink()
    before = weights(copied)
    assert_bad(train(*tiny, "--out", copied), "holds an unfinished run", f"--resume {copied}")
    assert_bad(train(*tiny, "--out", text), "is a file")
    assert_bad(train(*tiny, "--out", text / "below" / "it"), "is a file")
    assert_bad(train(*tiny, "--out", ""), "--out")
    assert_bad(train(*tiny, "--out", copied / ("x" * 300)))
    assert weights(copied) == before


def test_an_interrupted_run_is_not_overwritten(tiny, copied):
    path = copied / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stopped": "interrupted"}))
    assert_bad(train(*tiny, "--out", copied), "holds an unfinished run")


@pytest.mark.parametrize("name", ["thesis.txt", "settings.json", ".hidden"])
def test_a_folder_with_other_files_is_refused(name, tiny, tmp_path):
    folder = tmp_path / "foreign"
    (folder / "model").mkdir(parents=True)
    (folder / name).write_text('{"editor.fontSize": 12}')
    assert_bad(train(*tiny, "--out", folder), "is not empty and holds no run")
    assert (folder / name).read_text() == '{"editor.fontSize": 12}'
    assert sorted(path.name for path in folder.iterdir()) == sorted(["model", name])


def test_a_run_without_a_checkpoint_is_replaced_and_nothing_else(tiny, copied):
    shutil.rmtree(copied / "checkpoints")
    (copied / "result.json").unlink()
    (copied / "notes.txt").write_text("mine")
    ended = train(*tiny, "--max-steps", 2, "--quiet", "--out", copied)
    assert ended.code == 0
    assert result(copied)["steps"] == 2
    assert (copied / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_used(tiny, tmp_path):
    assert train(*tiny, "--quiet", "--out", tmp_path).code == 0


def test_a_tilde_is_expanded(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert train(*tiny, "--quiet", "--out=~/run").code == 0
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks(code, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(code, os.strerror(code))))
    ended = train(*tiny, "--out", tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("cannot be locked on its file system: train there in one process only") == 1
    assert result(tmp_path / "run")["stopped"] == "max_steps"


def test_two_processes_on_one_folder(tiny, copied):
    with (copied / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert_bad(train("--resume", copied), "is being trained by another process")
        shutil.rmtree(copied / "checkpoints")
        (copied / "result.json").unlink()
        before = weights(copied)
        assert_bad(train(*tiny, "--out", copied), "is being trained by another process")
        assert weights(copied) == before


def test_a_run_that_finished_in_the_folder_meanwhile(tiny, finished, tmp_path, monkeypatch):
    """Of two processes that start in one folder the second must not delete the run of the first."""
    folder, make_plan = tmp_path / "run", run_module.make_plan

    def slow_plan(*args):
        shutil.copytree(finished, folder)
        return make_plan(*args)

    monkeypatch.setattr(run_module, "make_plan", slow_plan)
    assert_bad(train(*tiny, "--out", folder), "holds a finished run")
    assert weights(folder) == weights(finished)


# --resume


def test_resuming_a_folder_without_a_run(tmp_path, text):
    for folder in (tmp_path / "none", tmp_path, text):
        assert_bad(train("--resume", folder))
    assert_bad(train("--resume", ""), "--resume")


def test_resuming_with_other_settings(copied, text, tmp_path):
    other = write_text(tmp_path / "other.txt", seed=1)
    for flags in (
        ["--d-model", 32],
        ["--seed", 7],
        ["--learning-rate", 0.5],
        ["--data", other],
        ["--dtype", "bfloat16"],
        ["--no-compile"],
        ["--size", "small"],
    ):
        assert_bad(train("--resume", copied, *flags), flags[0], "a resumed run keeps its settings")
    assert_bad(train("--resume", copied, "--out", tmp_path / "x"), "--out", "exclude each other")
    assert not (tmp_path / "x").exists()


def test_resuming_with_the_same_flags_again(copied, text):
    flags = ["--d-model", 16, "--data", os.path.relpath(text), "--size", "nano", "--max-steps", 13]
    assert train("--resume", copied, *flags, "--quiet").code == 0
    assert result(copied)["steps"] == 13


def test_resuming_with_a_smaller_limit_ends_at_once(copied):
    assert train("--resume", copied, "--max-steps", 5, "--quiet").code == 0
    assert (result(copied)["steps"], result(copied)["stopped"]) == (12, "max_steps")


def test_resuming_a_folder_that_was_moved(copied):
    moved = copied.rename(copied.parent / "moved")
    assert train("--resume", moved, "--max-steps", 13, "--quiet").code == 0
    assert result(moved)["steps"] == 13


def test_resuming_a_run_of_another_phase(copied):
    path = copied / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "phase": 2}))
    assert_bad(train("--resume", copied), "is a run of phase 2, not of phase 1")


def test_resuming_when_the_text_has_changed(tmp_path):
    text = write_text(tmp_path / "text.txt")
    folder = tmp_path / "run"
    assert train(*TINY, "--data", text, "--max-steps", 1, "--quiet", "--out", folder).code == 0
    before = (folder / "settings.json").read_text()
    write_text(text, seed=1)
    assert_bad(train("--resume", folder, "--max-steps", 2), "another corpus")
    text.unlink()
    assert_bad(train("--resume", folder, "--max-steps", 2), "does not exist")
    assert (folder / "settings.json").read_text() == before


SETTINGS = {
    "empty": "",
    "cut": '{"phase": 1, "fl',
    "a list": "[]",
    "a number": "7",
    "no flags": '{"phase": 1}',
    "flags that are none": '{"phase": 1, "flags": []}',
    "an unknown flag": '{"phase": 1, "flags": {"nosuch": 1}}',
    "a call for help": '{"phase": 1, "flags": {"help": true}}',
    "a width in words": '{"phase": 1, "flags": {"d_model": "wide"}}',
    "a width of nothing": '{"phase": 1, "flags": {"d_model": 0}}',
    "a width of null": '{"phase": 1, "flags": {"d_model": null}}',
    "a list for a number": '{"phase": 1, "flags": {"seed": [1, "x"]}}',
    "a folder in folders": '{"phase": 1, "flags": {"data": {"a": 1}}}',
    "not UTF-8": b'{"phase": "\xff"}',
}


@pytest.mark.parametrize("content", SETTINGS.values(), ids=SETTINGS)
def test_resuming_with_damaged_settings(content, copied):
    (copied / "settings.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_bad(train("--resume", copied, "--max-steps", 13))
    assert result(copied)["steps"] == 12


def test_resuming_with_settings_of_another_model(copied):
    path = copied / "settings.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "flags": {**stored["flags"], "d_ff": 48}}))
    assert_bad(train("--resume", copied, "--max-steps", 13), "another config")


def test_resuming_with_another_tokenizer_of_the_same_size(copied):
    path = copied / "settings.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "tokenizer": "0" * 64}))
    assert_bad(train("--resume", copied, "--max-steps", 13), "another tokenizer")


def test_a_damaged_checkpoint_is_skipped_with_a_note(copied, finished):
    (copied / "result.json").unlink()
    (copied / "checkpoints" / "step_00000012" / "arrays.safetensors").write_bytes(b"\0")
    ended = train("--resume", copied)
    assert ended.code == 0
    assert re.search("checkpoint '.*step_00000012' is damaged .*: skipped", ended.out)
    assert "resuming from step 10" in ended.out
    assert weights(copied) == weights(finished)
    assert result(copied) == result(finished)


def test_resuming_with_every_checkpoint_damaged(copied):
    for path in (copied / "checkpoints").glob("*/state.json"):
        path.write_text("{}")
    assert_bad(train("--resume", copied, "--max-steps", 13), "every checkpoint under", "is damaged")


def test_resuming_a_finished_run_without_its_checkpoints(copied, finished):
    shutil.rmtree(copied / "checkpoints")
    assert_bad(train("--resume", copied, "--max-steps", 13), "without its checkpoints", f"--init-from {copied}")
    assert weights(copied) == weights(finished)
