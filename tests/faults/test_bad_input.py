"""Bad input: one sentence, exit code 2, nothing written."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from bench.tools import baselines
from mlx_transformer.run import memory
from mlx_transformer.run.commands import generate, interop, runs
from mlx_transformer.utils.errors import exit_cleanly
from phases import phase3
from tests.faults.runs import TINY, assert_bad, command, train, write_text


@pytest.fixture
def refused(tiny, tmp_path):
    """Check that flags, appended to good ones, are refused and nothing is written."""

    def check(*flags, words=()):
        out = tmp_path / "out"
        assert_bad(train(*tiny, "--out", out, *flags), *words)
        assert not out.exists()

    return check


def test_weights_of_a_run_that_diverged(copied, text, tmp_path):
    path = copied / "model" / "model.safetensors"
    arrays = mx.load(str(path))
    mx.save_safetensors(str(path), {**arrays, "head.weight": arrays["head.weight"] * mx.nan})
    words = ("not finite in 'head.weight'",)
    assert_bad(command(lambda: exit_cleanly(generate.main), copied, "--prompt", "a cat"), *words)
    assert_bad(train("--data", text, "--max-steps", 3, "--init-from", copied, "--out", tmp_path / "out"), *words)


TEXTS = {
    "empty": (b"", "is empty"),
    "white space": (b" \n\t\n", "holds no text"),
    "separators": (b"<|endoftext|>\n<|endoftext|>\n", "holds no text"),
    "not UTF-8": (b"once upon \xff a time\n" * 9, "byte 10 "),
    "Latin-1": ("once upon a time\n" * 9 + "né").encode("latin-1"),
    "cut in a character": ("once upon a time\n" * 9 + "né").encode()[:-1],
    "UTF-16": ("once upon a time\n" * 9).encode("utf-16"),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9,
    "one line": (b"once upon a time", "--valid"),
    "one document": (b"once upon a time\n<|endoftext|>\n", "--valid"),
}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_files_that_are_no_text(content, refused, tmp_path):
    raw, words = content if isinstance(content, tuple) else (content, "UTF-8")
    path = tmp_path / "bad.txt"
    path.write_bytes(raw)
    refused("--data", path, words=(path, words))
    refused("--valid", path, words=(path,)) if "--valid" not in words else None


def test_paths_that_are_no_text_file(refused, tmp_path, text):
    refused("--data", tmp_path / "none.txt", words=("none.txt", "does not exist"))
    refused("--valid", tmp_path / "none.txt", words=("none.txt", "does not exist; --valid takes the path of a text"))
    (tmp_path / "folder").mkdir()
    refused("--data", tmp_path / "folder", words=("is a folder without files",))
    refused("--data", "/dev/null", words=("not a regular file",))
    refused("--data", text / "below a file")
    refused("--data", "x" * 300)
    for flag in ("--data", "--valid", "--tokenizer", "--init-from"):
        refused(flag, "", words=(flag,))
        refused(flag, "~nobody_of_that_name/x", words=(flag, "no user"))


@pytest.mark.parametrize("path", ["x" * 300, "~nobody_of_that_name/x"], ids=["too long", "nobody's"])
def test_paths_that_the_system_refuses(path, refused, tmp_path):
    refused("--init-from", path)
    for body, line in (
        (generate.main, [path]),
        (runs.main, ["list", path]),
        (interop.main, ["import", path, tmp_path / "run"]),
        (interop.main, ["export", tmp_path, path]),
        (baselines.main, ["--data", path]),
    ):
        assert_bad(command(lambda body=body: exit_cleanly(body), *line), path)


def test_texts_that_are_too_short(refused, text, tmp_path):
    short = write_text(tmp_path / "short.txt", size=3000)
    refused("--data", short, "--seq-len", 5000, words=("5,001",))
    refused("--vocab-size", 5000, words=("--vocab-size 5000 is more than this text supports", "the largest is"))
    refused("--vocab-size", 100, words=("--vocab-size 100 is too small",))
    refused("--valid", text, words=("nothing is left to train on",))


EXTENTS = ("--vocab-size", "--d-model", "--n-layers", "--n-heads", "--d-ff", "--seq-len", "--batch-size")
WHOLE = (*EXTENTS, "--stories", "--max-steps", "--max-tokens", "--top-k", "--eval-every", "--save-every")
POSITIVE = ("--learning-rate", "--max-epochs", "--max-seconds", "--target-loss")
REAL = ("--dropout", "--temperature", "--top-p", "--min-p")
NONSENSE = ("-1", "nan", "inf", "-inf", "abc", "", " ", "1e999", "0x10", "--seed")


@pytest.mark.parametrize("flag", [*WHOLE, *POSITIVE, *REAL, "--seed"])
def test_malformed_numbers(flag, refused):
    for value in NONSENSE:
        refused(flag, value, words=(flag,))
        if value:
            refused(f"{flag}={value}", words=(flag,))
    refused(flag, words=(flag,))
    if flag not in (*REAL, "--seed"):
        refused(flag, "0", words=(flag, "'0'"))
    if flag in (*WHOLE, "--seed"):
        for value in ("1.5", "1e3", "१", "²", "9" * 30):
            refused(flag, value, words=(flag,))


@pytest.mark.parametrize("flag", EXTENTS)
def test_lengths_beyond_32_bits(flag, refused):
    refused(flag, 2**31, words=(flag, 2**31 - 1))


@pytest.mark.parametrize(
    "flags",
    [
        ["--d-model", 2**31 - 1, "--n-heads", 1],
        ["--d-ff", 2**31 - 1],
        ["--n-layers", 2**31 - 1],
        ["--batch-size", 2**31 - 1],
    ],
)
def test_models_larger_than_memory(flags, refused):
    refused(*flags, words=("need at least", "GiB"))


def test_sequences_whose_mask_exceeds_memory(refused, text, tmp_path, monkeypatch):
    """On a device of 4 GiB. Windowed attention computes scores in blocks: it needs a mask of a block alone."""
    monkeypatch.setattr(memory, "device_info", lambda: SimpleNamespace(memory_bytes=2**32))
    long = write_text(tmp_path / "long.txt", size=500_000)
    settings = {"seq_len": 100_000, "d_model": 64, "n_heads": 4, "n_layers": 1}
    refused(
        *("--data", long, "--valid", text, "--seq-len", 100_000, "--d-model", 64, "--n-heads", 4, "--batch-size", 1),
        words=("need at least", "give a smaller", "or --seq-len"),
    )
    whole, blocks = (
        kind(kind.Config(**settings)).blocks[0].mixer for kind in (phase3.Model, phase3.BRANCHES["longformer"])
    )
    assert whole.n_scores(100_000) == 4 * 100_000**2
    assert blocks.n_scores(100_000) == 4 * 100_000 * (1 + 2 * 32)


RANGES = {
    "dropout of everything": (["--dropout", "1"], "dropout = 1"),
    "width and heads": (["--d-model", "15"], "d_model = 15 is not a multiple of n_heads = 2"),
    "top-p of nothing": (["--top-p", "0"], "top-p = 0"),
    "top-p of more than all": (["--top-p", "1.1"], "top-p = 1.1"),
    "min-p of more than all": (["--min-p", "1.1"], "min-p = 1.1"),
}


@pytest.mark.parametrize(("flags", "words"), RANGES.values(), ids=RANGES)
def test_numbers_out_of_range(flags, words, refused):
    refused(*flags, words=(words,))


WORDS = {
    "branch": (["--branch", "rop"], "branch 'rop' is unknown in phase 1: it has"),
    "branch of two lines": (["--branch", "a\nb"], "is unknown"),
    "recipe": (["--recipe", "nosuch"], "recipe 'nosuch' is unknown in phase 1: it has"),
    "size": (["--size", "huge"], "nano, small, base, auto"),
    "dtype": (["--dtype", "int8"], "float32, float16, bfloat16"),
    "device": (["--device", "tpu"], "auto, gpu, cpu"),
    "unknown flag": (["--max-step", "3"], "--max-step"),
    "no flag": (["more"], "more"),
    "a switch with a value": (["--quiet", "no"], "no"),
    "a flag without its value": (["--max-steps"], "--max-steps"),
    "tokenizer": (["--tokenizer", "bytes"], "bytes"),
    "corpus and its own validation": (["--data", "fables", "--valid", "x"], "--valid"),
    "empty prompt": (["--prompt", ""], "is empty"),
    "white prompt": (["--prompt", " \n"], "is empty"),
    "prompt longer than the context": (["--prompt", "the cat " * 40], "expected fewer than the context of 24"),
    "not UTF-8": (["--prompt", "\udcff"], "is not UTF-8"),
    "no such weights": (["--init-from", "nowhere"], "holds no model"),
    "weights and another vocabulary": (["--init-from", "nowhere", "--vocab-size", "300"], "holds no model"),
}


@pytest.mark.parametrize(("flags", "words"), WORDS.values(), ids=WORDS)
def test_unknown_names(flags, words, refused):
    refused(*flags, words=(words,))


def test_damaged_tokenizer_files(refused, tmp_path):
    pytest.importorskip("tokenizers")
    for content in (b"", b"{}", b"\xff", b"not json"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        refused("--tokenizer", tmp_path / "tokenizer.json")


def test_weights_that_do_not_fit(refused, finished, text, tmp_path):
    assert_bad(
        train(*TINY, "--data", text, "--init-from", finished, "--out", tmp_path / "x"), "--vocab-size and --init-from"
    )
    small = ["--size", "nano", "--data", text, "--init-from", finished, "--out", tmp_path / "x"]
    assert_bad(train(*small, "--d-ff", 33), "does not fit this model")
    assert_bad(train(*small, "--tokenizer", "word"), "--tokenizer and --init-from")
    assert not (tmp_path / "x").exists()


def test_no_gpu(refused):
    if mx.is_available(mx.gpu):
        pytest.skip("there is a GPU")
    refused("--device", "gpu", words=("none here",))
