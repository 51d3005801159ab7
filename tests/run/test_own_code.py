"""A model from a file of one's own: trained, kept with its code, and loaded only on request."""

import json
import os
import re
import shutil
import subprocess
import sys

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer import __main__ as entry
from mlx_transformer.run import training
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.run.own_code import load_code, record
from mlx_transformer.run.saved import load, save
from mlx_transformer.utils.errors import BadInput
from phases import phase1, phase3
from tests.faults.runs import ROOT, TINY, assert_bad, command, result, train, weights, write_text

IDEA = '''"""An idea: a bent line."""
import mlx_transformer as mt
from bend import bend
from mlx_transformer.nn.feedforward import FeedForward
from phases import phase1

class Config(phase1.Config):
    slope: float = 0.5  # left of zero

class FFN(FeedForward):
    def build(self, config):
        super().build(config)
        self._slope = config.slope

    def activation(self, x):
        return bend(x, self._slope)

class Model(phase1.Model):
    FFN = FFN

class Wide(Model):
    pass

BRANCHES = {"wide": Wide}
mt.main(__name__)
'''
pytestmark = pytest.mark.usefixtures("no_pictures")
BEND = "import mlx.core as mx\ndef bend(x, slope):\n    return mx.maximum(x, slope * x)\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folder with the idea, a text, and a run of 3 steps."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "my_idea.py").write_text(IDEA)
    (folder / "bend.py").write_text(BEND)
    text = write_text(folder / "text.txt")
    flags = [*TINY, "--data", text, "--max-steps", 3, "--slope", 0.25, "--prompt", "the", "--out", folder / "run"]
    ended = own(folder, *flags)
    assert (ended.code, ended.err) == (0, "")
    return folder


@pytest.fixture
def copied(home, tmp_path):
    return shutil.copytree(home, tmp_path / "home")


def own(folder, *args):
    """`python my_idea.py ARGS` in this process."""
    return command(lambda: training.main(load_code(folder / "my_idea.py")[0]), *args)


def logits(model):
    return np.array(model(mx.array([[0, 5, 9, 300, 2]])))


def test_what_a_run_keeps(home):
    run = home / "run"
    assert ((run / "code" / "my_idea.py").read_text(), (run / "code" / "bend.py").read_text()) == (IDEA, BEND)
    found = json.loads((run / "result.json").read_text())
    jsonschema.validate(found, json.loads((ROOT / "mlx_transformer" / "run" / "result.schema.json").read_text()))
    code = record(Experiment.of_file(home / "my_idea.py").code)
    assert (found["code"]["file"], found["code"]["files"].keys()) == ("my_idea.py", {"my_idea.py", "bend.py"})
    for name in ("result.json", "settings.json", "model/config.json"):
        assert json.loads((run / name).read_text())["code"] == code
    assert (found["phase"], found["config"]["slope"]) == (1, 0.25)
    assert "--code kept" in (run / "report.md").read_text()


def test_its_code_runs_only_on_request(copied):
    (copied / "run" / "code" / "my_idea.py").write_text("raise SystemExit('it ran')")
    for folder in (copied / "run", copied / "run" / "model"):
        with pytest.raises(BadInput, match=r'code="my_idea.py" \(--code my_idea.py\), or code="kept"'):
            load(folder)
    with pytest.raises(SystemExit, match="it ran"):
        load(copied / "run", code="kept")


def test_loaded_with_the_copy_and_with_the_file(home, recwarn):
    kept, _ = load(home / "run", code="kept")
    given, _ = load(home / "run" / "model", code=home / "my_idea.py")
    assert kept.config.slope == given.config.slope == 0.25
    assert type(kept) is not type(given)
    np.testing.assert_array_equal(logits(kept), logits(given))
    assert not recwarn.list


def test_code_on_the_command_line(copied):
    text = ["--data", copied / "text.txt", "--json"]
    for line in (["generate", copied / "run", "--prompt", "the"], ["evaluate", copied / "run", *text]):
        kept = command(entry.main, *line, "--code", "kept")
        assert (kept.code, kept.err) == (0, "")
        assert command(entry.main, *line, "--code", copied / "my_idea.py") == kept
        assert_bad(command(entry.main, *line), "--code my_idea.py")
    (copied / "bend.py").write_text(BEND.replace("slope * x", "-x"))
    changed = command(entry.main, *line, "--code", copied / "my_idea.py")
    assert changed.err.startswith("note: ")
    assert "differs from the file that the model" in changed.err
    assert changed.out != kept.out


def test_its_export_is_refused_without_a_flag_that_does_not_exist(home, tmp_path):
    refused = command(entry.main, "export", home / "run", tmp_path / "out")
    assert_bad(refused, "holds a model of your own file")
    assert "--code" not in refused.err


def test_another_file_is_loaded_with_a_warning(copied):
    before = logits(load(copied / "run", code="kept")[0])
    (copied / "bend.py").write_text(BEND.replace("slope * x", "-x"))
    with pytest.warns(UserWarning, match="differs from the file that the model"):
        model, _ = load(copied / "run", code=copied / "my_idea.py")
    assert not np.array_equal(logits(model), before)


def test_saved_and_loaded_in_python(home, tmp_path):
    model, tokenizer = load(home / "run", code="kept")
    save(tmp_path / "saved", model, tokenizer)
    with pytest.raises(BadInput, match="runs only on request"):
        load(tmp_path / "saved")
    again, _ = load(tmp_path / "saved", code="kept")
    np.testing.assert_array_equal(logits(again), logits(model))
    branch = Experiment.of_file(home / "my_idea.py").find_branch("wide")(model.config)
    save(tmp_path / "branch", branch, tokenizer)
    assert json.loads((tmp_path / "branch" / "config.json").read_text())["branch"] == "wide"
    rope = phase3.BRANCHES["rope"]
    save(tmp_path / "ladder", rope(rope.Config(**SMALL)), tokenizer)
    assert type(load(tmp_path / "ladder")[0]) is rope


def test_a_class_of_no_file_is_not_saved(home, tmp_path):
    _, tokenizer = load(home / "run", code="kept")

    class Local(phase1.Model):
        pass

    with pytest.raises(BadInput, match="cannot be found again by load"):
        save(tmp_path / "local", Local(Local.Config(**SMALL)), tokenizer)
    assert not (tmp_path / "local").exists()


SMALL = {"vocab_size": 384, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "seq_len": 24}


def test_resumed_with_the_same_code_only(copied):
    run = copied / "run"
    assert own(copied, "--resume", run, "--max-steps", 4, "--quiet").code == 0
    assert result(run)["steps"] == 4
    before = weights(run)
    assert_bad(train("--resume", run, "--max-steps", 5), "is a run of my_idea.py, not of phase 1")
    (copied / "bend.py").write_text(BEND + "# a word\n")
    assert_bad(own(copied, "--resume", run, "--max-steps", 5), "was started with another code")
    assert weights(run) == before


def test_a_recipe_from_a_file(home, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom phases import phase1\nSLOW = dataclasses.replace(phase1.RECIPE, learning_rate=1e-9)\n"
    )
    flags = [*TINY, "--data", home / "text.txt", "--max-steps", 1, "--quiet", "--out", tmp_path / "run"]
    assert train(*flags, "--recipe", f"{tmp_path}/mine.py:SLOW").code == 0
    found = result(tmp_path / "run")
    assert (found["recipe_name"], found["recipe"]["learning_rate"], found["code"]) == ("mine.py:SLOW", 1e-9, None)
    assert (tmp_path / "run" / "recipe_code" / "mine.py").exists()
    assert type(load(tmp_path / "run")[0]) is phase1.Model
    assert train("--resume", tmp_path / "run", "--max-steps", 2, "--quiet").code == 0
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + "# a word\n")
    assert_bad(train("--resume", tmp_path / "run", "--max-steps", 3), "another recipe_code")


def test_as_a_program_in_a_folder_of_its_own(copied):
    flags = [*TINY, "--data", "text.txt", "--max-steps", 1, "--branch", "wide", "--quiet"]
    line = [sys.executable, "my_idea.py", *map(str, flags)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(line, cwd=copied, env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    (run,) = (copied / "results" / "phases").iterdir()
    assert run.name.startswith("my_idea_wide_")
    assert "python my_idea.py --resume results/phases" in (run / "report.md").read_text()
    assert sorted(path.name for path in (run / "code").iterdir()) == ["bend.py", "my_idea.py"]


LATE = """
import mlx.core
import mlx_transformer as mt
from mlx_transformer.backend import prepare
from phases.phase1 import Model

print("late:", prepare().late)
mt.main(__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX needs no preparation")
def test_a_file_that_imports_mlx_first_is_started_again(tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    line = [sys.executable, "-X", "utf8", "late.py", "--help"]
    done = subprocess.run(
        line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.findall("late: (True|False)", done.stdout) == ["True", "False"]


def test_only_what_a_file_imports_belongs_to_it(tmp_path):
    """A program that runs in or below the folder of an idea is no part of it."""
    (tmp_path / "idea.py").write_text(
        "import a\nfrom pack import part\nfrom phases import phase1\nModel = phase1.Model\n"
    )
    (tmp_path / "a.py").write_text("import b\n")
    (tmp_path / "b.py").write_text("")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "part.py").write_text("from . import other\n")
    (tmp_path / "pack" / "other.py").write_text("")
    program = tmp_path / "use.py"
    program.write_text(
        "import sys; from mlx_transformer.run.own_code import load_code; from pathlib import Path\n"
        "print(sorted(load_code(Path(sys.argv[1]))[1].files))\n"
    )
    line, environment = [sys.executable, "use.py", "idea.py"], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "['a.py', 'b.py', 'idea.py', 'pack/__init__.py', 'pack/other.py', 'pack/part.py']\n", (
        done.stderr
    )
