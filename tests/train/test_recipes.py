"""Phase 2's recipes through the command line: what a recipe decides, what a flag decides over it, what is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlx_transformer.nn.config import SIZES
from mlx_transformer.run import memory, training
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.utils.errors import BadInput
from phases import phase1, phase2
from tests.faults.runs import assert_bad, command, result

pytestmark = pytest.mark.usefixtures("no_pictures")


def train(*args):
    """`python -m phases.phase2 ARGS` in this process."""
    return command(lambda: training.main(find_phase(2)), *args)


def test_the_recipe_decides_the_dropout_and_the_flag_over_it(tiny, tmp_path):
    found = []
    for i, flags in enumerate(([], ["--recipe", "without_no_dropout"], ["--dropout", 0.3])):
        folder = tmp_path / str(i)
        assert train(*tiny, *flags, "--out", folder).code == 0
        written = result(folder)
        found.append((written["config"]["dropout"], written["recipe"]["dropout"]))
    assert found == [(0.0, 0.0), (phase1.Config().dropout, None), (0.3, 0.3)]


def test_a_model_of_another_width_has_the_learning_rates_of_that_width(tiny, tmp_path):
    own, given, grown = tmp_path / "own", tmp_path / "given", tmp_path / "grown"
    assert train(*tiny, "--out", own).code == 0
    found = result(own)
    rate, width = phase2.LEARNING_RATE, found["config"]["d_model"]
    assert width != rate.width
    assert found["recipe"]["learning_rate"] == rate.at(width) > rate.value
    multipliers = {group["name"]: group["lr_multiplier"] for group in found["recipe"]["groups"]}
    assert multipliers["embedding"] == phase2.EMBEDDING.at(width) < phase2.EMBEDDING.value
    assert train(*tiny, "--learning-rate", 0.001, "--out", given).code == 0
    assert result(given)["recipe"]["learning_rate"] == 0.001
    numbers = ("--data", tiny[tiny.index("--data") + 1], "--max-steps", 2, "--device", "cpu", "--size", "nano")
    assert train(*numbers, "--init-from", own, "--out", grown).code == 0
    assert result(grown)["recipe"]["learning_rate"] == rate.at(width)


def test_the_original_recipe_is_recorded_resumed_and_logged(tiny, tmp_path):
    assert train(*tiny, "--recipe", "original", "--dtype", "float16", "--eval-every", 2, "--out", tmp_path).code == 0
    written = result(tmp_path)
    assert written["recipe_name"] == "original"
    assert (written["recipe"]["label_smoothing"], written["recipe"]["accumulate"]) == (0.1, 2)
    assert written["recipe"]["schedule"]["kind"] == "Cosine"
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["kind"] == "log"]
    assert all(line["loss_scale"] > 0 and line["skipped_steps"] >= 0 for line in logged)
    assert "accumulated over 2" in (tmp_path / "log.txt").read_text()
    assert train("--resume", tmp_path, "--max-steps", 5).code == 0
    assert result(tmp_path)["steps"] == 5


def test_the_original_recipe_at_base_is_what_it_was():
    """Two batches of 256 x 128."""
    recipe = phase2.RECIPES["original"].at("base")
    assert recipe.batch_size(128) // recipe.accumulate == 256
    assert recipe.groups[0].optimizer.weight_decay == 0.01


def test_the_memory_that_is_asked_for_is_that_of_one_part(monkeypatch):
    """A step of sixteen thousand sequences that fits a device in eight parts, and not in one."""
    monkeypatch.setattr(memory, "device_info", lambda: SimpleNamespace(memory_bytes=2**33))
    recipe = replace(phase1.RECIPE.at("nano"), batch_tokens=2**20)
    model = phase1.Model(phase1.Config(**SIZES["nano"]))

    def check(**changes):
        memory.check_memory(model, replace(recipe, **changes), 0, ())

    with pytest.raises(BadInput, match="1,048,576 tokens at a time"):
        check()
    check(accumulate=8)


def test_help_names_the_recipes_and_the_dropout(capsys):
    written = train("--help")
    assert "original" in written.out
    assert "dropout 0" in " ".join(written.out.replace("│", " ").split())


def test_groups_that_share_a_parameter_are_refused_before_a_folder_is_made(tiny, tmp_path, monkeypatch):
    *others, vectors = phase2.RECIPES["original"].groups
    twice = replace(phase2.RECIPES["original"], groups=(*others, vectors, replace(vectors, name="again")))
    monkeypatch.setitem(phase2.RECIPES, "twice", twice)
    refused = train(*tiny, "--recipe", "twice", "--out", tmp_path / "run")
    assert_bad(refused, "'vectors' and 'again'")
    assert not (tmp_path / "run").exists()
