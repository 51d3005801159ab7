"""Saved models: what `load` returns, and its errors for damaged folders."""

import json
import shutil
import struct

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_transformer import load, save
from mlx_transformer.nn.weights import load_weights
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.run.saved import model_folder, save_model
from mlx_transformer.utils.errors import BadInput
from phases import phase1
from tests.faults import runs
from tests.faults.runs import assert_bad

TOKENS = [[0, 5, 9, 300, 2], [0, 1, 1, 17, 383]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    text = runs.write_text(folder / "text.txt")
    flags = [*runs.TINY, "--data", text, "--dropout", 0.4, "--max-steps", 3, "--quiet", "--out", folder / "run"]
    assert runs.train(*flags).code == 0
    return folder / "run"


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the model folder, to be damaged."""
    return shutil.copytree(run / "model", tmp_path / "model")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_numbers(folder, **numbers):
    config = json.loads((folder / "config.json").read_text())["config"]
    change(folder, config={**config, **numbers})


def test_a_run_and_its_model_folder_give_the_model_in_evaluation_mode(run):
    tokens = mx.array(TOKENS)
    logits = []
    for folder in (run, run / "model", str(run)):
        model, tokenizer = load(folder)
        assert type(model) is phase1.Model
        assert not model.training
        assert tokenizer.decode(tokenizer.encode("the cat. né🙂")) == "the cat. né🙂"
        logits.append(np.array(model(tokens)))
        np.testing.assert_array_equal(np.array(model(tokens)), logits[-1])  # no dropout
    assert logits[0].shape == (2, 5, 384)
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


def test_the_weights_are_those_of_the_file(run):
    model, _ = load(run)
    stored = mx.load(str(run / "model" / "model.safetensors"))
    assert {path for path, _ in tree_flatten(model.parameters())} == set(stored)
    for path, value in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(np.array(value), np.array(stored[path]))


def test_a_run_is_not_hidden_behind_another_model(run):
    model, tokenizer = load(run)
    with pytest.raises(BadInput, match="folder of a run"):
        save(run, model, tokenizer)


def test_saved_again_is_the_same_bytes(run, tmp_path):
    model, tokenizer = load(run)
    save_model(tmp_path, model, tokenizer, 1, None)
    for path in sorted((run / "model").iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


# Folders that are no model


@pytest.mark.parametrize("phase", ["os", 7, 0, -1, "../x", "1", 1.0, True, None, [1], {"a": 1}, "phase1", "1.x"])
def test_an_unknown_phase(phase, copied, capsys):
    change(copied, phase=phase)
    assert_bad(runs.generate(copied, "--prompt", "a"), f"phase {phase!r} is unknown")


@pytest.mark.parametrize("branch", ["os", "../x", "__class__", 5, ["rope"], {"a": 1}, ""])
def test_an_unknown_branch(branch, copied):
    change(copied, branch=branch)
    assert_bad(runs.generate(copied, "--prompt", "a"), "is unknown in phase 1: it has ")


WRONG_NUMBERS = {
    "another width": {"d_model": 18},
    "not a multiple of the heads": {"n_heads": 3},
    "another vocabulary": {"vocab_size": 385},
    "a word": {"d_model": "16"},
    "a fraction": {"n_layers": 1.5},
    "none": {"n_layers": 0},
    "null": {"n_heads": None},
    "a list": {"d_ff": [32]},
    "dropout of all": {"dropout": 1},
    "dropout in words": {"dropout": "much"},
    "an unknown number": {"n_experts": 4},
    "more layers than any memory holds": {"n_layers": 10**9},
    "more than an axis may have": {"d_model": 10**12},
    "an epsilon in words": {"norm_eps": "x"},
    "no epsilon": {"norm_eps": float("nan")},
    "a negative epsilon": {"norm_eps": -1.0},
}


@pytest.mark.parametrize("numbers", WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_impossible_hyperparameters(numbers, copied):
    change_numbers(copied, **numbers)
    assert_bad(runs.generate(copied, "--prompt", "a"))


NO_CONFIG = ["", "{", "[]", "7", "null", '{"phase": 1}', '{"phase": 1, "config": []}', "\x00", "[" * 200_000]


@pytest.mark.parametrize("text", NO_CONFIG, ids=range(len(NO_CONFIG)))
def test_a_damaged_config(text, copied):
    (copied / "config.json").write_text(text)
    assert_bad(runs.generate(copied, "--prompt", "a"), "config.json")


def test_a_config_that_is_not_utf8(copied):
    (copied / "config.json").write_bytes(b'{"phase": "\xff"}')
    assert_bad(runs.generate(copied, "--prompt", "a"), "config.json")


def cut(raw):
    return raw[: len(raw) // 2]


def cut_by_one(raw):
    return raw[:-1]


def cut_in_the_header(raw):
    return raw[:100]


def empty(raw):
    return b""


def other_header(raw):
    return raw[:8] + b"[" + raw[9:]


def endless_header(raw):
    return struct.pack("<Q", 2**62) + raw[8:]


def no_safetensors(raw):
    return b"PK\x03\x04 a zip file, or so it says"


@pytest.mark.parametrize(
    "damage", [cut, cut_by_one, cut_in_the_header, empty, other_header, endless_header, no_safetensors]
)
def test_damaged_weights(damage, copied):
    path = copied / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert_bad(runs.generate(copied, "--prompt", "a"), "model.safetensors")


def test_missing_weights(copied):
    (copied / "model.safetensors").unlink()
    assert_bad(runs.generate(copied, "--prompt", "a"), "model.safetensors")


def without_one(arrays):
    del arrays["embedding.weight"]


def with_one_more(arrays):
    arrays["blocks.7.weight"] = mx.zeros((2,))


def of_another_shape(arrays):
    arrays["embedding.weight"] = mx.zeros((384, 17))


def turned(arrays):
    arrays["embedding.weight"] = arrays["embedding.weight"].T


@pytest.mark.parametrize("dtype", [mx.int32, mx.bool_, mx.complex64])
def test_weights_of_a_dtype_that_is_not_floating_point(dtype, copied):
    path = str(copied / "model.safetensors")
    arrays = {name: value.astype(dtype) for name, value in mx.load(path).items()}
    mx.eval(arrays)
    mx.save_safetensors(path, arrays)
    assert_bad(runs.generate(copied, "--prompt", "a"), "expected floating-point numbers")


@pytest.mark.parametrize("wrong", [without_one, with_one_more, of_another_shape, turned])
def test_weights_that_do_not_fit(wrong, copied):
    path = str(copied / "model.safetensors")
    arrays = mx.load(path)
    mx.eval(arrays)
    wrong(arrays)
    mx.save_safetensors(path, arrays)
    assert_bad(runs.generate(copied, "--prompt", "a"), "does not fit this model: ")


def test_a_missing_or_damaged_tokenizer(copied, capfd):
    path = copied / "tokenizer.model"
    raw = path.read_bytes()
    for content in (b"", raw[:100], b"no model at all"):
        path.write_bytes(content)
        assert_bad(runs.generate(copied, "--prompt", "a"), "tokenizer")
    path.unlink()
    assert_bad(runs.generate(copied, "--prompt", "a"), "has no tokenizer")
    assert capfd.readouterr().err == ""  # no lines of SentencePiece's own


@pytest.mark.parametrize("content", ['{"a": 1}', "[1, 2]", '["a", "b"]', "{"])
def test_a_foreign_word_list(content, copied):
    (copied / "tokenizer.model").unlink()
    (copied / "tokenizer.words.json").write_text(content)
    assert_bad(runs.generate(copied, "--prompt", "a"))


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(BadInput, match="holds no model"):
        model_folder(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BadInput, match="holds no model"):
        model_folder(tmp_path)


def test_only_phases_and_their_branches_can_be_named():
    assert find_phase(1) is phase1
    assert find_branch(phase1, None) is phase1.Model
    with pytest.raises(BadInput, match="unknown"):
        find_phase(6.0)


def test_weights_keep_their_dtype(run):
    """Weights stored in half precision are loaded in half precision."""
    model, _ = load(run)
    assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.float32}
    with pytest.raises(BadInput, match="does not fit"):
        load_weights(phase1.Model(phase1.Config(vocab_size=384, d_model=8, n_heads=2)), run / "model")
