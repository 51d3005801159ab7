"""Phases found by number as files of this project, and experiments from files of one's own."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from mlx_transformer.run.ladder import Experiment, find_branch, find_phase, read_variant
from mlx_transformer.utils.errors import BadInput
from phases import phase1, phase5
from tests.faults.runs import ROOT, TINY, train, write_text


@pytest.fixture
def own(tmp_path):
    """Write a file and return its experiment."""

    def write(text, name="my_idea.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return Experiment.of_file(path)

    return write


def test_phases_by_number():
    assert find_phase(1) is phase1
    assert find_branch(phase1, None) is phase1.Model
    for number in (6.0, True, "1", 0, 7, None):
        with pytest.raises(BadInput, match="is unknown: present are 1, 2, 3, 4, 5, 6"):
            find_phase(number)


def test_the_file_of_a_phase_is_that_phase():
    found = Experiment.of_file(ROOT / "phases" / "phase5.py")
    assert (found.module, found.phase, found.code) == (phase5, 5, None)


def test_a_file_phases_in_the_working_folder_does_not_matter(tmp_path):
    text = write_text(tmp_path / "text.txt")
    run = tmp_path / "run"
    assert train(*TINY, "--data", text, "--max-steps", 1, "--quiet", "--out", run).code == 0
    (tmp_path / "phases.py").write_text("raise SystemExit('the wrong phases')")

    def code_of(*args):
        ended = subprocess.run([sys.executable, *map(str, args)], cwd=tmp_path, capture_output=True, text=True)
        assert "the wrong phases" not in ended.stdout + ended.stderr
        return ended.returncode

    assert code_of("-c", f"import mlx_transformer; mlx_transformer.load('{run}')") == 0
    assert code_of("-m", "mlx_transformer.generate", run, "--prompt", "the", "--max-tokens", 2) == 0
    assert code_of("-m", "mlx_transformer.interop", "export", run, "theirs") == 2  # phase 1 has no such form
    assert code_of("-m", "mlx_transformer.evaluate", run, "--data", text) == 0
    (tmp_path / "idea.py").write_text("from phases import phase1\nclass Config(phase1.Config):\n    width: int = 3")
    assert code_of("-m", "bench.compare", "--phases", "1", "idea.py", "--size", "nano", "--data", text, "--plan") == 0


def test_another_module_phases_is_named(tmp_path):
    (tmp_path / "phases.py").touch()
    code = "import sys; sys.path.insert(0, '.'); import phases; import mlx_transformer.run.ladder as l; l.find_phase(1)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f"BadInput: another module 'phases' is imported already, from '{tmp_path}/phases.py'" in ended.stderr


def test_a_package_phases_installed_over_ours(tmp_path):
    """Its __init__.py is not run; where it removed our files, one sentence names it."""
    for name in ("mlx_transformer", "phases"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "phases" / "__init__.py").write_text("raise SystemExit('the wrong phases')")

    def load_phase():
        code = "import mlx_transformer.run.ladder as ladder; print(ladder.find_phase(5).NAME)"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)

    assert load_phase().stdout == "modern\n"
    for path in (tmp_path / "phases").glob("phase*.py"):
        path.unlink()
    assert f"BadInput: '{tmp_path}/phases' holds no phase of mlx-transformer" in load_phase().stderr


def test_a_phase_that_is_the_program_is_not_imported_again():
    code = """
        import runpy
        from mlx_transformer.run import ladder, training
        training.main = lambda module: print(ladder.Experiment.of_module(module).module is ladder.find_phase(2))
        runpy.run_module("phases.phase2", run_name="__main__", alter_sys=True)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("True\n", "")


def test_a_file_defines_only_what_differs_from_its_phase(own):
    found = own(
        """
        from mlx_transformer.nn.feedforward import FeedForward
        from phases import phase3, phase5

        class Config(phase5.Config):
            slope: float = 0.5  # of the left half

        class FFN(FeedForward):
            pass

        class Model(phase5.Model):
            FFN = FFN

        class Wide(Model):
            pass

        BRANCHES = {"wide": Wide}
        """
    )
    assert (found.phase, found.name, found.code.path.name) == (5, "my_idea", "my_idea.py")
    assert (found.recipe, found.recipes) == (phase5.RECIPE, phase5.RECIPES)
    assert found.model.Config(d_model=8, n_heads=2).slope == 0.5
    assert found.find_branch("wide").Config is found.model.Config
    assert str(found) == "my_idea.py"


def test_a_file_with_a_config_or_a_recipe_alone(own):
    numbers = own("from phases import phase3, phase5\nclass Config(phase5.Config):\n    slope: float = 0.5")
    assert (numbers.phase, numbers.model.Config, numbers.branches) == (5, numbers.module.Config, {})
    assert issubclass(numbers.model, phase5.Model)
    text = "from dataclasses import replace\nfrom phases import phase5\nRECIPE = replace(phase5.RECIPE, dropout=0.5)"
    recipe = own(text, "recipe.py")
    assert (recipe.model, recipe.branches, recipe.recipe.dropout) == (phase5.Model, phase5.BRANCHES, 0.5)


def test_two_files_of_one_name_do_not_collide(own, tmp_path):
    (tmp_path / "helper.py").write_text("WIDTH = 3")
    one = own("from helper import WIDTH\nfrom phases import phase1\nclass Model(phase1.Model):\n    width = WIDTH")
    (tmp_path / "helper.py").write_text("WIDTH = 44")
    other = own("from helper import WIDTH\nfrom phases import phase1\nclass Model(phase1.Model):\n    width = WIDTH")
    assert (one.model.width, other.model.width) == (3, 44)
    assert one.code.files.keys() == other.code.files.keys() == {"my_idea.py", "helper.py"}
    assert one.code.sha256 != other.code.sha256
    assert "helper" not in sys.modules


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no Model: expected a class Model, or an import of a phase"),
        ("Model = 3", "Model in '.*' is 3: expected a subclass"),
        ("from mlx_transformer.nn.model import Model", "has no RECIPE, and builds on no phase"),
        ("import nothing_of_this_name", "cannot be run: ModuleNotFoundError"),
        ("def (", "cannot be run: SyntaxError"),
    ],
)
def test_files_that_define_nothing_to_train(text, words, own):
    with pytest.raises(BadInput, match=words):
        own(text)


def test_a_recipe_from_a_file(own, tmp_path):
    own("from dataclasses import replace\nfrom phases import phase5\nFAST = replace(phase5.RECIPE, dropout=0.5)")
    experiment = Experiment.of_phase(5)
    assert experiment.find_recipe(f"{tmp_path}/my_idea.py:FAST")[0].dropout == 0.5
    with pytest.raises(BadInput, match=r"recipe 'SLOW' is unknown in '.*my_idea\.py': it has FAST"):
        experiment.find_recipe(f"{tmp_path}/my_idea.py:SLOW")
    with pytest.raises(BadInput, match="does not exist"):
        experiment.find_recipe(f"{tmp_path}/none.py:SLOW")


def test_a_variant_is_an_experiment_a_branch_and_a_recipe(own, tmp_path):
    own("from phases import phase5\nRECIPE = FAST = phase5.RECIPE\nRECIPES = {'slow': FAST}")
    file = f"{tmp_path}/my_idea.py"
    for text, place, *names in (
        ("3", "phase 3", None, None),
        ("3/rope", "phase 3", "rope", None),
        ("2:original", "phase 2", None, "original"),
        ("6/phase_5:phase_5_with_muon", "phase 6", "phase_5", "phase_5_with_muon"),
        (f"5:{file}:FAST", "phase 5", None, f"{file}:FAST"),
        (file, "my_idea.py", None, None),
        (f"{file}/qwen3:slow", "my_idea.py", "qwen3", "slow"),
    ):
        experiment, branch, recipe = read_variant(text)
        assert [str(experiment), branch, recipe] == [place, *names]
    for text, words in (
        ("one", "'one' is no phase and no file: expected 2, 3/BRANCH"),
        ("9", "phase 9 is unknown: present are 1"),
        ("3/", "'3/' is no phase"),
        ("3/none", "branch 'none' is unknown in phase 3: it has"),
        ("3:none", "recipe 'none' is unknown in phase 3: it has no_warmup"),
        (f"{file}/none", "branch 'none' is unknown in my_idea.py: it has"),
        (f"{tmp_path}/none.py", "does not exist"),
    ):
        with pytest.raises(BadInput, match=words):
            read_variant(text)
