"""The training command: the files of a run, its output and its flags."""

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path

import jsonschema
import mlx.core as mx
import pytest

from mlx_transformer.run.commands import generate
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.run.settings import COMMON, GROUPS, Settings, meaning
from mlx_transformer.utils.errors import exit_cleanly
from tests.faults.runs import ROOT, TINY, assert_bad, list_runs, result, spawn, train, weights

pytestmark = pytest.mark.usefixtures("finished", "no_pictures")  # in this order: the first run draws its picture
SCHEMA = json.loads((ROOT / "mlx_transformer" / "run" / "result.schema.json").read_text())


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ended = train(
        *tiny, "--max-steps", 12, "--eval-every", 5, "--prompt", "the cat", "--prompt", "a dog", "--out", folder
    )
    assert (ended.code, ended.err) == (0, "")
    (folder / "said").write_text(ended.out)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")


# What a run leaves


def test_the_files_of_a_run(finished):
    found = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    checkpoints = {name for name in found if name.startswith("checkpoints/step_")}
    assert found - checkpoints == {
        ".lock",
        "said",
        "settings.json",
        "result.json",
        "curve.jsonl",
        "report.md",
        "loss.png",
        "log.txt",
        "stories.md",
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.model",
    }
    assert {name.split("/")[1] for name in checkpoints} == {"step_00000010", "step_00000012"}
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_its_result_fits_the_schema_and_the_settings(finished, text):
    found = json.loads((finished / "result.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert (found["phase"], found["branch"], found["recipe_name"], found["size"]) == (1, None, None, "nano")
    assert (found["steps"], found["tokens"], found["stopped"]) == (12, 12 * 3 * 24, "max_steps")
    assert (found["config"]["d_model"], found["config"]["n_layers"], found["config"]["seq_len"]) == (16, 1, 24)
    assert found["tokenizer"] == {"kind": "bpe", "vocab_size": 384, "unknown_rate": 0.0}
    corpus = found["corpus"]
    bits = found["best_valid_loss"] / math.log(2) * corpus["valid_tokens"]
    assert found["best_valid_bpb"] == pytest.approx(bits / corpus["valid_bytes"])
    assert found["epochs"] == pytest.approx(found["tokens"] / corpus["train_tokens"])
    assert found["parameters"]["total"] == sum(
        value.size for value in mx.load(str(finished / "model" / "model.safetensors")).values()
    )


def test_its_curve(finished):
    lines = [json.loads(line) for line in (finished / "curve.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines if line["kind"] == "eval"] == [
        ("eval", 5),
        ("eval", 10),
        ("eval", 12),
    ]
    assert [line["step"] for line in lines if line["kind"] == "log"] == list(range(1, 13))
    assert all(line["tokens"] == 72 * line["step"] for line in lines)
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "data_wait_share"} <= lines[0].keys()
    best = min(line["valid_loss"] for line in lines if line["kind"] == "eval")
    assert best == result(finished)["best_valid_loss"]


def test_its_stories_and_its_report(finished):
    stories, report = (finished / "stories.md").read_text(), (finished / "report.md").read_text()
    assert "**the cat**" in stories
    assert "**a dog**" in stories
    assert stories.count("## ") == 2
    assert "loss.png" in report
    assert f"{result(finished)['best_valid_loss']:.3f}" in report


def test_its_output_is_in_its_log(finished):
    said, log = (finished / "said").read_text(), (finished / "log.txt").read_text()
    assert "step 12: validation loss" in said
    for line in said.splitlines()[:-4]:  # before the story, of which a terminal shows no control characters
        assert line in log


def test_the_same_flags_give_the_same_run(tiny, finished, tmp_path):
    flags = [*tiny, "--max-steps", 12, "--eval-every", 5, "--prompt", "the cat", "--prompt", "a dog"]
    assert train(*flags, "--out", tmp_path / "again", "--quiet").code == 0
    assert weights(tmp_path / "again") == weights(finished)
    assert result(tmp_path / "again") == result(finished)
    assert train(*flags, "--seed", 1, "--out", tmp_path / "other", "--quiet").code == 0
    assert weights(tmp_path / "other") != weights(finished)


def test_quiet_prints_nothing(tiny, tmp_path):
    ended = train(*tiny, "--quiet", "--out", tmp_path / "run")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert "stopped: max_steps" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_that_diverges_fails_and_keeps_good_weights(tiny, tmp_path):
    folder = tmp_path / "run"
    ended = train(*tiny, "--quiet", "--max-steps", 50, "--learning-rate", "1e9", "--out", folder)
    assert ended.code == 1
    assert re.fullmatch(r"error: diverged at step \d+: .*--learning-rate\n", ended.err)
    jsonschema.validate(json.loads((folder / "result.json").read_text()), SCHEMA)
    assert result(folder)["stopped"] == "diverged"
    assert all(
        mx.isfinite(value).all().item() for value in mx.load(str(folder / "model" / "model.safetensors")).values()
    )
    for line in (folder / "curve.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_word_level_run(text, tmp_path):
    folder = tmp_path / "run"
    small = [flag for flag in TINY if flag not in ("--vocab-size", "384")]
    ended = train(
        *small, "--data", text, "--tokenizer", "word", "--max-steps", 3, "--prompt", "the cat", "--out", folder
    )
    assert ended.code == 0
    found = json.loads((folder / "result.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["best_valid_bpb"] is None
    assert re.search(r"\*\*the cat\*\* ?\w", (folder / "stories.md").read_text())


def test_a_table_is_trained_on(text, tmp_path):
    """The result is titled by the file, whatever its name; only the built-in fables are judged as such."""
    table, fables = tmp_path / "$a_b$ [c].csv", tmp_path / "fables"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([["id", "story"], *enumerate(text.read_text().split("<|endoftext|>"))])
    ended = train(*TINY, "--data", table, "--text-column", "story", "--max-steps", 1, "--out", tmp_path / "run")
    assert ended.code == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert (found["corpus"]["name"], found["corpus"]["text_column"]) == ("$a_b$ [c].csv", "story")
    assert "trained on $a\\_b$" in (tmp_path / "run" / "report.md").read_text()
    shutil.copy(text, fables)
    ended = train(*TINY, "--data", fables, "--max-steps", 1, "--out", tmp_path / "judged")
    assert ended.code == 0
    found = json.loads((tmp_path / "judged" / "result.json").read_text())
    assert found["corpus"]["name"] == "fables"
    assert "grammatical" not in found["quality"]


def test_the_smallest_possible_run(text, tmp_path):
    numbers = {"d-model": 2, "n-layers": 1, "n-heads": 1, "d-ff": 1, "seq-len": 1, "batch-size": 1, "vocab-size": 384}
    flags = [part for name, value in numbers.items() for part in (f"--{name}", value)]
    ended = train("--size", "nano", *flags, "--data", text, "--max-steps", 1, "--out", tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    jsonschema.validate(json.loads((tmp_path / "run" / "result.json").read_text()), SCHEMA)


def test_initialized_from_the_weights_of_another_run(finished, text, tmp_path):
    flags = ["--size", "nano", "--data", text, "--init-from", finished, "--max-steps", 1, "--learning-rate", 1e-12]
    assert train(*flags, "--quiet", "--out", tmp_path / "run").code == 0
    assert result(tmp_path / "run")["config"] == result(finished)["config"]
    one, other = (mx.load(str(run / "model" / "model.safetensors")) for run in (tmp_path / "run", finished))
    assert all(mx.allclose(one[name], other[name], atol=1e-6).item() for name in other)


def test_the_size_comes_with_the_weights(text, tmp_path):
    flags = ["--data", text, "--max-steps", 1, "--batch-size", 2, "--quiet"]
    own = ["--seq-len", 24, "--vocab-size", 384]
    assert train("--size", "nano", *flags, *own, "--out", tmp_path / "nano_run").code == 0
    assert train(*flags, "--init-from", tmp_path / "nano_run", "--out", tmp_path / "tuned").code == 0
    assert result(tmp_path / "tuned")["size"] == "nano"
    ended = train(*flags, "--size", "small", "--init-from", tmp_path / "nano_run", "--out", tmp_path / "out")
    assert_bad(ended, "--size small", "nano_run/model' is of size nano")
    assert not (tmp_path / "out").exists()


def test_a_run_continues_after_a_broken_pipe(tiny, tmp_path):
    """python -m phases.phase1 | head -1"""
    process = spawn(*tiny, "--out", tmp_path / "run")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0
    assert result(tmp_path / "run")["stopped"] == "max_steps"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here that is always full")
def test_output_to_a_full_device(finished, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate", str(finished), "--prompt", "a", "--max-tokens", "2"])
    said = io.StringIO()
    with open("/dev/full", "w") as full, redirect_stdout(full), redirect_stderr(said), pytest.raises(SystemExit) as end:
        exit_cleanly(generate.main)
    assert (end.value.code, said.getvalue().count("\n")) == (1, 1)
    assert said.getvalue().startswith("error: no space is left")


def test_closed_streams_are_no_error(finished):
    """`<&-` and `>&-`: without care the next file opened becomes the standard input."""
    command = f"'{sys.executable}' -m mlx_transformer.generate '{finished}' --prompt a --max-tokens 2"
    for closing in ("<&-", ">&-", "<&- >&-"):
        ended = subprocess.run(["sh", "-c", f"{command} {closing}"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert (ended.returncode, ended.stderr) == (0, ""), closing


def test_a_terminal_that_cannot_show_a_character(finished, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", ["generate", str(finished), "--prompt", "né🙂", "--max-tokens", "2"])
    with redirect_stdout(screen), pytest.raises(SystemExit) as end:
        exit_cleanly(generate.main)
    screen.flush()
    assert end.value.code == 0
    assert screen.buffer.getvalue().startswith(b"n??")


def test_help_shows_the_common_flags_and_help_all_every_one():
    short, full = train("--help"), train("--help-all")
    assert (short.code, full.code) == (0, 0)
    for name in Settings.__dataclass_fields__:
        flag = rf"--{name.replace('_', '-')}\b"
        assert re.search(flag, full.out)
        assert bool(re.search(flag, short.out)) == (name in COMMON)
    assert "--help-all" in short.out
    assert re.search(r"--norm-eps X +\S", full.out)


def test_every_setting_is_in_one_group_of_the_help():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(Settings.__dataclass_fields__)


def test_every_hyperparameter_has_a_comment():
    for n in range(1, 7):
        module = find_phase(n)
        for kind in (module.Model, *module.BRANCHES.values()):
            for field in fields(kind.Config):
                assert field.name in Settings.__dataclass_fields__ or meaning(kind.Config, field.name) != field.name


# The list of runs


def test_the_list_shows_the_newest_first(finished, tmp_path):
    for name, age in (("old", 300), ("new", 100), ("middle", 200)):
        shutil.copytree(finished, tmp_path / name)
        os.utime(tmp_path / name / "settings.json", (time.time() - age,) * 2)
    (tmp_path / "middle" / "result.json").unlink()
    (tmp_path / "no run").mkdir()
    ended = list_runs("list", tmp_path)
    assert (ended.code, ended.err) == (0, "")
    rows = [line for line in ended.out.splitlines() if re.search("new|middle|old", line)]
    assert [next(name for name in ("new", "middle", "old") if name in row) for row in rows] == ["new", "middle", "old"]
    assert f"{result(finished)['best_valid_loss']:.4f}" in rows[0]
    assert "unfinished" in rows[1]
    assert "no run" not in ended.out


@pytest.mark.parametrize("name", ["settings.json", "result.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "7", '{"phase": 1, "flags": []}'])
def test_a_damaged_run_does_not_hide_the_others(name, content, finished, copied):
    shutil.copytree(finished, copied.parent / "sound")
    (copied / name).write_text(content)
    ended = list_runs("list", copied.parent)
    assert (ended.code, ended.err) == (0, "")
    assert "sound" in ended.out
    assert "damaged" in next(line for line in ended.out.splitlines() if "copy" in line)


def test_a_name_is_shown_whole_and_as_it_is(finished, tmp_path):
    names = ["phase_1_attention_is_all_you_need_" + 30 * "very_" + "long", "sweep[lr=0.1]", "sweep[bold]", "x[/y]"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        shutil.copyfile(finished / "settings.json", tmp_path / name / "settings.json")
    shown = list_runs("list", tmp_path).out
    for name in names:
        assert name in shown


def test_the_runs_of_comparisons_are_listed_where_they_are_asked_for(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("phases/mine", "bench/runs/0123abcd"):
        (tmp_path / "results" / name).mkdir(parents=True)
        shutil.copyfile(finished / "settings.json", tmp_path / "results" / name / "settings.json")
    shown = list_runs("list").out
    assert "phases/mine" in shown
    assert "0123abcd" not in shown
    assert "0123abcd" in list_runs("list", "results/bench/runs").out


@pytest.mark.parametrize("line", [[], ["lsit"], ["list", "nowhere"], ["list", "a", "b"], ["--all"]])
def test_list_refuses_bad_arguments(line):
    assert_bad(list_runs(*line))
