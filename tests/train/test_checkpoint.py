"""Checkpoints are complete or absent, and damaged ones are skipped."""

import errno
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transformer.nn import weights
from mlx_transformer.nn.weights import save_arrays
from mlx_transformer.train import checkpoint
from mlx_transformer.train.checkpoint import list_checkpoints, load_newest, save_checkpoint
from mlx_transformer.utils.errors import BadInput, RunFailed


def save(folder, step):
    """A checkpoint in which every value is its step."""
    arrays = {"model.w": mx.full((3, 4), step), "best.b": mx.arange(step % 100, dtype=mx.uint32)}
    return save_checkpoint(folder, step, arrays, {"progress": {"step": step}, "data": [0.1, None]})


def assert_newest(folder, step, notes=0):
    arrays, state, damaged = load_newest(folder)
    assert set(arrays) == {"model.w", "best.b"}
    assert mx.array_equal(arrays["model.w"], mx.full((3, 4), step))
    assert mx.array_equal(arrays["best.b"], mx.arange(step % 100, dtype=mx.uint32))
    assert state == {"step": step, "progress": {"step": step}, "data": [0.1, None]}
    assert len(damaged) == notes
    return damaged


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_saved_and_loaded(tmp_path):
    assert save(tmp_path / "a" / "b", 7).name == "step_00000007"
    assert_newest(tmp_path / "a" / "b", 7)


def test_nothing_saved_is_nothing_to_load(tmp_path):
    assert load_newest(tmp_path / "none") is None
    assert load_newest(tmp_path) is None


def test_the_last_two_are_kept_in_order_of_steps(tmp_path):
    for step in (9, 10, 99_999_999, 100_000_000):
        save(tmp_path, step)
        assert_newest(tmp_path, step)
    assert names(tmp_path) == ["step_99999999", "step_100000000"]


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    draw = np.random.default_rng(0)
    arrays = {name: mx.array(draw.normal(size=(5, 7)).astype(np.float32)) for name in "qwertz"}
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_arrays(one, arrays)
    save_arrays(two, dict(reversed(arrays.items())))
    assert one.read_bytes() == two.read_bytes()


FILES = ("arrays.safetensors", "state.json", "sums.json")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-2])


def lengthened(path):
    path.write_bytes(path.read_bytes() + b" ")


def emptied(path):
    path.write_bytes(b"")


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def other_json(path):
    path.write_text("[]")


def made_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [os.remove, truncated, lengthened, emptied, zeroed, other_json, made_a_folder])
def test_a_damaged_checkpoint_is_passed_over_and_named(name, damage, tmp_path):
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    if damage is lengthened and name == "sums.json":
        assert_newest(tmp_path, 2)  # white space after JSON is ignored
        return
    (note,) = assert_newest(tmp_path, 1, notes=1)
    assert str(tmp_path / "step_00000002") in note
    assert "damaged" in note


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    for step in (1, 2):
        save(folder, step)
    return folder


@settings(max_examples=100)
@given(st.sampled_from(FILES), st.integers(0, 10**6), st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(pair, name, position, bit):
    path = pair / "step_00000002" / name
    whole = path.read_bytes()
    position %= len(whole)
    flipped = bytearray(whole)
    flipped[position] ^= 1 << bit
    try:
        path.write_bytes(flipped)
        if name == "sums.json" and whole[position : position + 1].isspace() and not load_newest(pair)[2]:
            assert_newest(pair, 2)  # still white space
        else:
            assert_newest(pair, 1, notes=1)
    finally:
        path.write_bytes(whole)


def test_every_one_damaged_is_bad_input(tmp_path):
    for step in (1, 2):
        truncated(save(tmp_path, step) / "arrays.safetensors")
    with pytest.raises(BadInput, match=r"every checkpoint under .* is damaged"):
        load_newest(tmp_path)


def test_a_damaged_one_does_not_push_out_a_good_one(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    truncated(save(tmp_path, 30) / "state.json")
    assert_newest(tmp_path, 20, notes=1)
    save(tmp_path, 25)  # the run went on from 20
    assert names(tmp_path) == ["step_00000020", "step_00000025"]
    assert_newest(tmp_path, 25)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    truncated(save(tmp_path, 2) / "arrays.safetensors")
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert_newest(tmp_path, 2)


def test_what_killed_processes_left_is_ignored_and_cleared_away(tmp_path):
    save(tmp_path, 1)
    for left in (".step_00000003.tmp", ".step_00000009.tmp"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / left)
    (tmp_path / "step_foreign").mkdir()
    (tmp_path / "step_00000005").write_text("a file")
    assert_newest(tmp_path, 1)
    save(tmp_path, 2)
    assert_newest(tmp_path, 2)
    assert not list(tmp_path.glob(".*"))


def test_loaded_arrays_do_not_need_their_file(tmp_path):
    save(tmp_path, 3)
    arrays, _, _ = load_newest(tmp_path)
    shutil.rmtree(tmp_path / "step_00000003")
    assert mx.array_equal(arrays["model.w"], mx.full((3, 4), 3))


OPERATIONS = ("Path.mkdir", "checkpoint.save_arrays", "checkpoint.write_json", "Path.rename", "checkpoint.sync_path")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_refusing_disk_is_said_and_leaves_the_earlier_ones(operation, tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = operation.split(".")
    monkeypatch.setattr({"Path": checkpoint.Path, "checkpoint": checkpoint}[owner], name, refuse)
    with pytest.raises(RunFailed, match=r"could not save to .*No space left.*free some space"):
        save(tmp_path, 3)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*"))
    assert {"step_00000001", "step_00000002"} <= set(names(tmp_path))
    save(tmp_path, 4)
    assert_newest(tmp_path, 4)


def test_a_disk_that_takes_only_a_part_is_noticed(tmp_path, monkeypatch):
    """MLX does not look whether the disk took every byte."""

    def half(path, arrays, metadata):
        mx.save_safetensors(path, arrays, metadata)
        with open(path, "rb+") as file:
            file.truncate(os.path.getsize(path) - 4)

    save(tmp_path, 1)
    monkeypatch.setattr(weights, "mx", type("mx", (), {**vars(mx), "save_safetensors": staticmethod(half)}))
    with pytest.raises(RunFailed, match="cut short"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert_newest(tmp_path, 1)
