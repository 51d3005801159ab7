"""The commands of `python -m mlx_transformer` and their module forms."""

import json
import math
import subprocess
import sys

import pytest

from mlx_transformer import __main__ as entry
from mlx_transformer.run import training
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.run.saved import load
from mlx_transformer.train.evaluate import evaluate
from tests.faults.runs import ROOT, TINY, assert_bad, command, result, train, write_text


def call(*args):
    return command(entry.main, *args)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(args):
    ended = call(*args)
    assert (ended.code, ended.err) == (0, "")
    for name, (_, line) in entry.COMMANDS.items():
        assert any(row.split()[:1] == [name] and row.endswith(line) for row in ended.out.splitlines()), name


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_command_has_help_under_the_name_that_was_called(name):
    ended = call(name, "--help")
    assert ended.code == 0
    assert f"usage: command {name}" in ended.out


@pytest.mark.parametrize("args", [["nosuch"], ["runs", "nosuch"], ["--quiet"]])
def test_an_unknown_command(args):
    assert_bad(call(*args), f"command '{args[-1]}' is unknown: expected ")


def test_a_bad_flag_names_the_form_that_was_called():
    assert_bad(call("generate", "x", "--length", "5"), "see command generate --help")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate"], "RUN is missing: a run folder, or its model/"),
        (["import", "there"], "RUN is missing: run folder to write"),
        (["export", "a"], "PATH is missing: folder to write"),
        (["generate", "a", "--seed"], "--seed has no value"),
        (["generate", "a", "--top-k", 3, "--top_k=4"], "--top-k is there more than once"),
        (["info", "a", "--code", "b", "--code", "b"], "--code is there more than once"),
        (["runs", "compare", "a", "b", "--out", "x.png", "--out", "y.png"], "--out is there more than once"),
        (["generate", "none", "--prompt", "a", "--prompt", "b"], "holds no model"),
    ],
)
def test_an_argument_that_is_missing_or_repeated_is_named(args, words):
    assert_bad(call(*args), words)


def test_a_repeated_flag_of_training():
    body = lambda: training.main(find_phase(3))  # noqa: E731
    assert_bad(command(body, "--branch", "rope", "--branch=alibi"), "--branch is there more than once")
    assert_bad(command(body, "--quiet", "--quiet"), "--quiet is there more than once")
    for value in ("-1", "many"):
        assert_bad(command(body, "--max-len", value), f"'{value}': expected a whole number from 1 to 2147483647, or 0")


@pytest.mark.parametrize("form", ["", ".generate", ".evaluate", ".interop", ".run", ".serve"])
def test_module_forms(form):
    ended = subprocess.run(
        [sys.executable, "-m", f"mlx_transformer{form}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"usage: python -m mlx_transformer{form}" in ended.stdout


def test_info():
    ended = call("info", "--seconds", 0.05)
    assert (ended.code, ended.err) == (0, "")
    assert {line.split()[0] for line in ended.out.splitlines()} >= {"device", "versions", "cache", "matmul"}
    assert_bad(call("info", "--device", "tpu"), "'tpu'")
    assert_bad(call("info", "--seconds", 0), "--seconds 0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 3 steps, and the text that it was validated on."""
    folder = tmp_path_factory.mktemp("run")
    train_text, valid_text = write_text(folder / "text.txt"), write_text(folder / "valid.txt", size=3000, seed=1)
    flags = ["--data", train_text, "--valid", valid_text, "--max-steps", 3, "--quiet", "--out", folder / "run"]
    assert train(*TINY, *flags).code == 0
    return folder / "run"


def test_evaluate_gives_the_run_s_own_loss(run):
    ended = call("evaluate", run, "--data", run.parent / "valid.txt", "--json")
    assert (ended.code, ended.err) == (0, "")
    values = json.loads(ended.out)
    assert list(values) == ["tokens", "nats_per_token", "perplexity", "bits_per_byte", "context_used"]
    assert values["nats_per_token"] == pytest.approx(result(run)["final_valid_loss"], abs=1e-5)
    assert values["bits_per_byte"] == pytest.approx(result(run)["best_valid_bpb"], abs=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(values["nats_per_token"]))
    table = call("evaluate", run / "model", "--data", run.parent / "valid.txt").out
    assert f"nats per token  {values['nats_per_token']:.4f}" in table
    assert evaluate(*load(run), run.parent / "valid.txt").tokens == values["tokens"]


def test_evaluate_reads_a_column(run, tmp_path):
    texts = (run.parent / "valid.txt").read_text().split("<|endoftext|>")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"story": text}) for text in texts))
    flags = ["evaluate", run, "--json", "--data"]
    ended = call(*flags, tmp_path / "a.jsonl", "--text-column", "story")
    assert json.loads(ended.out) == json.loads(call(*flags, run.parent / "valid.txt").out)
    assert_bad(call(*flags, tmp_path / "a.jsonl"), "no column 'text'")
    assert_bad(call(*flags, run.parent / "valid.txt", "--text-column", "story"), "no columns")


def test_what_cannot_be_evaluated(run, tmp_path):
    assert_bad(call("evaluate", run), "--data is missing")
    assert_bad(call("evaluate", run, "--data", tmp_path / "none.txt"), "none.txt")
    assert_bad(call("evaluate", tmp_path, "--data", run.parent / "valid.txt"), "holds no model")
    assert_bad(call("evaluate", run, "--data", run.parent / "valid.txt", "--code", "kept"), "takes no code")
    assert_bad(call("runs"), "a command is missing: expected list, compare")


def test_info_on_a_run(run):
    ended = call("info", run)
    assert (ended.code, ended.err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
    assert (rows["phase"], rows["d_model"], rows["code"]) == ("1", "16", "none")
