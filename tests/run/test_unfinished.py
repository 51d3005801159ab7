"""Models of runs that have not ended, or that diverged: which weights they have, and the note on them."""

import json
import shutil

import mlx.core as mx
import pytest

from mlx_transformer import load
from mlx_transformer.run.commands import evaluate as evaluate_command
from mlx_transformer.run.commands import info as info_command
from mlx_transformer.run.commands.interop import export_command
from mlx_transformer.train.checkpoint import arrays_of
from mlx_transformer.utils.errors import exit_cleanly
from mlx_transformer.utils.trees import by_path
from phases import phase1
from tests.faults import runs
from tests.faults.runs import ON_CPU, assert_bad, command, result, train


@pytest.fixture(scope="module")
def flags(text):
    return [*ON_CPU, "--data", text, "--quiet", "--max-steps", 9]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train(*flags, "--eval-every", 3, "--out", folder).code == 0
    return folder


@pytest.fixture
def cut(finished, tmp_path):
    """The finished run as one that is killed behind its last checkpoint leaves it."""
    folder = shutil.copytree(finished, tmp_path / "run")
    for name in ("result.json", "report.md", "stories.md", "loss.png", "model/model.safetensors"):
        (folder / name).unlink()
    return folder


def assert_weights(folder, expected):
    with pytest.warns(UserWarning, match="is unfinished"):
        model, _ = load(folder)
    found = by_path(model.parameters())
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(value, expected[path]).item() for path, value in found.items())


def test_an_unfinished_run_has_the_best_weights_of_its_newest_checkpoint(cut, finished):
    best = mx.load(str(finished / "model" / "model.safetensors"))
    assert_weights(cut, best)
    assert_weights(cut / "model", best)


def test_every_command_takes_it_with_one_note(cut, text, tmp_path):
    note = f"note: '{cut}' is unfinished: the best weights up to step 9 are used\n"
    ended = runs.generate(cut, "--prompt", "the cat", "--max-tokens", 3)
    assert (ended.code, ended.err) == (0, note)
    assert ended.out.startswith("the cat")
    for main, *args in ((evaluate_command.main, "--data", text), (info_command.main,)):
        ended = command(lambda main=main: exit_cleanly(main), cut, *args)
        assert (ended.code, ended.err) == (0, note)
    ended = command(lambda: exit_cleanly(lambda: export_command("export", [str(cut), str(tmp_path / "x")])))
    assert ended.err.startswith(f"{note}error: phase 1 is not exported")
    ended = train("--data", text, "--max-steps", 1, "--init-from", cut, "--out", tmp_path / "out")
    assert ended.code == 0
    assert note in ended.out


def test_a_damaged_newest_checkpoint_is_noted_too(cut):
    (cut / "checkpoints" / "step_00000009" / "state.json").write_text("{")
    ended = runs.generate(cut, "--prompt", "the cat", "--max-tokens", 3)
    assert ended.code == 0
    damaged, unfinished = ended.err.splitlines()
    assert "step_00000009' is damaged" in damaged
    assert "up to step 6" in unfinished


def test_a_resumed_run_has_the_weights_of_now(cut, finished):
    """Its result and its model folder are from before."""
    shutil.copy(finished / "model" / "model.safetensors", cut / "model")
    before = json.loads((finished / "result.json").read_text())
    (cut / "result.json").write_text(json.dumps({**before, "steps": 8}))
    assert "up to step 9" in runs.generate(cut, "--prompt", "a", "--max-tokens", 3).err
    (cut / "result.json").write_text(json.dumps(before))
    assert runs.generate(cut, "--prompt", "a", "--max-tokens", 3).err == ""


def test_a_run_killed_before_its_first_evaluation_and_before_its_first_checkpoint(flags, tmp_path):
    line = [*flags, "--eval-every", 100, "--save-every", 2, "--out"]
    assert runs.train_and_die(r"os.rename .*step_00000004.tmp", 1, *line, tmp_path / "saved") != 0
    arrays = arrays_of(
        "model", mx.load(str(tmp_path / "saved" / "checkpoints" / "step_00000002" / "arrays.safetensors"))
    )
    assert_weights(tmp_path / "saved", arrays)
    assert runs.train_and_die(r"os.rename .*step_00000002.tmp", 1, *line, tmp_path / "begun") != 0
    assert_bad(runs.generate(tmp_path / "begun", "--prompt", "a"), "has no weights yet")


@pytest.mark.parametrize(("eval_every", "which"), [(100, "initial ones"), (1, "best before it")])
def test_a_run_that_diverged_says_which_weights_it_has(eval_every, which, flags, tmp_path):
    folder = tmp_path / "run"
    line = [*flags, "--max-steps", 50, "--learning-rate", "1e25" if eval_every == 100 else "1e9"]
    ended = train(*line, "--eval-every", eval_every, "--out", folder)
    assert ended.code == 1
    assert ("best evaluation" in ended.err) == (eval_every == 1)
    assert ("initial ones" in ended.err) == (eval_every == 100)
    assert (result(folder)["best_valid_loss"] is None) == (eval_every == 100)
    assert "diverged" in (folder / "report.md").read_text()
    note = f"note: '{folder}' diverged at step {result(folder)['steps']}: its weights are the {which}\n"
    assert runs.generate(folder, "--prompt", "a", "--max-tokens", 3).err == note
    if eval_every == 100:
        model = load_quietly(folder)
        start = by_path(phase1.Model(model.config, 0).parameters())
        assert all(mx.array_equal(value, start[path]).item() for path, value in by_path(model.parameters()).items())


def load_quietly(folder):
    with pytest.warns(UserWarning, match="diverged"):
        return load(folder)[0]
