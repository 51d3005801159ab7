"""Variants: how a command line names them, own files among them, and numbers that vary."""

import pytest

from bench.compare import runs, throughput, variants
from bench.compare.runs import Run
from bench.compare.variants import Variant, read_variants, read_vary
from bench.workers.process import measure_once
from mlx_transformer.backend import device_info
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import BadInput
from tests.bench.compare.tiny import TINY

IDEA = """
from dataclasses import replace

import mlx.core as mx
import mlx_transformer as mt
from helper import SLOPE
from mlx_transformer import nn
from phases import phase1

class FFN(nn.FeedForward):
    def activation(self, x):
        return mx.maximum(x, SLOPE * x) if SLOPE else super().activation(x)


class Model(phase1.Model):
    FFN: nn.Slot = FFN


class Wide(Model):
    pass


BRANCHES = {"wide": Wide}
FAST = replace(phase1.RECIPE, learning_rate=0.02)
mt.main(__name__)
"""


@pytest.fixture
def idea(tmp_path):
    path = tmp_path / "my_idea.py"
    path.write_text(IDEA)
    (tmp_path / "helper.py").write_text("SLOPE = 0.0")
    return path


def test_variants_are_read_and_named(idea):
    known = {
        "1": "phase 1",
        "3/rope": "phase 3/rope",
        "2:original": "phase 2:original",
        str(idea): "my_idea.py",
        f"{idea}/wide:FAST": "my_idea.py/wide:FAST",
        f"1:{idea}:FAST": "phase 1:my_idea.py:FAST",
    }
    for text, name in known.items():
        assert Variant.read(text).name == name
    odd = Variant(phase=3, branch="rope", recipe="original", change=("d_ff", 128), copy=2, backend="torch")
    assert odd.name == "phase 3/rope:original (d_ff=128) #2 · torch"
    for text, message in (("9", "present are 1"), ("1/none", "'none'"), ("1:none", "'none'"), ("one", "'one'")):
        with pytest.raises(BadInput, match=message):
            Variant.read(text)


def test_the_lowest_phase_itself_is_the_baseline(idea):
    assert [variant.name for variant in read_variants([str(idea), "2", "1", "1"])] == [
        "phase 1",
        "my_idea.py",
        "phase 2",
        "phase 1 #2",
    ]


def test_two_files_of_one_name_are_refused(idea, tmp_path):
    other = tmp_path / "other" / "my_idea.py"
    other.parent.mkdir()
    other.write_text(IDEA)
    other.with_name("helper.py").write_text("SLOPE = 0.0")
    with pytest.raises(BadInput, match=r"two files are called my_idea\.py"):
        read_variants([str(idea), str(other)])


def test_a_changed_file_is_run_again(idea, text):
    def fingerprint():
        variants._load.cache_clear()  # as in another process
        flags = Settings(size="nano", data=str(text), max_tokens=2000, **TINY)
        return Run.of(Variant.read(str(idea)), flags).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    idea.write_text(IDEA + "\n")
    edited = fingerprint()
    idea.with_name("helper.py").write_text("SLOPE = 0.5")
    assert len({before, edited, fingerprint()}) == 3


def test_an_own_file_is_trained_and_its_steps_are_timed(idea, text, tmp_path):
    flags = Settings(size="nano", data=str(text), max_tokens=720, eval_every=5, **TINY)
    run = Run.of(Variant.read(f"{idea}/wide:FAST"), flags)
    finished = runs.execute(run, tmp_path / "cache")
    assert finished.status == "done", finished.error
    assert (finished.result["branch"], finished.result["code"]["file"]) == ("wide", "my_idea.py")
    assert finished.result["recipe"]["learning_rate"] == 0.02
    assert device_info().describe() in (finished.folder / "log.txt").read_text(), "the BLAS is the phases'"
    row = run.variant.describe()
    assert (row["phase"], row["code"]["file"], row["recipe"]) == (1, "my_idea.py", "FAST")
    (worker,) = throughput._workers([run], tmp_path)
    assert len(measure_once(worker, steps=2)["losses"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d_ff", "expected NAME=VALUE,VALUE"),
        ("d_ff=128", "with different numbers"),
        ("d_ff=128,128", "with different numbers"),
        ("d_ff=128,wide", "with different numbers"),
        ("d_ff=128,0.5", "expected whole numbers of at least 1"),
        ("batch_size=8,0", "expected whole numbers of at least 1"),
        ("depth=1,2", "depth: expected one of d_model, n_layers, .*, learning_rate, batch_size, .*clip.max_norm"),
        ("vocab_size=512,1024", "losses would not compare"),
    ],
)
def test_a_bad_vary_is_one_sentence(text, message):
    with pytest.raises(BadInput, match=message):
        read_vary(text, Variant(phase=1))


def test_a_vary_is_a_variant_for_each_value_and_the_phases_own_is_the_baseline(planned):
    comparison = planned("--phases", 1, "--vary", "d_ff=128,256,512")
    assert [run.variant.name for run in comparison.runs] == [f"phase 1 (d_ff={width})" for width in (256, 128, 512)]
    assert [run.plan.config.d_ff for run in comparison.runs] == [256, 128, 512]
    (own,) = planned("--phases", 1).runs
    assert comparison.runs[0].fingerprint == own.fingerprint, "its runs are those of the phase"
    assert comparison.over(comparison.runs[2].variant) == comparison.baseline


def test_numbers_of_the_recipe_vary_too(planned, tmp_path):
    rates = planned("--phases", 1, "--vary", "learning_rate=0.001,0.002").runs
    assert [run.plan.recipe.learning_rate for run in rates] == [0.001, 0.002]
    smoothed, plain = planned("--phases", 2, "--vary", "label_smoothing=0.1,0").runs[::-1]
    assert (plain.plan.recipe.label_smoothing, smoothed.plan.recipe.label_smoothing) == (0, 0.1)
    assert plain.plan.recipe_code is None
    clipped = planned("--phases", "2:original", "--vary", "clip.max_norm=0.25,0.5").runs
    assert [run.plan.recipe.clip.max_norm for run in clipped] == [0.25, 0.5]
    assert clipped[0].fingerprint != clipped[1].fingerprint
    assert clipped[0].variant.describe()["recipe"] == "original"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--phases", "1", "2", "--vary", "d_ff=8,16"), "expected one phase"),
        (("--vary", "d_ff=8,16"), "expected one phase"),
        (("--phases", "1", "--ablate", "--vary", "d_ff=8,16"), "exclude each other"),
        (("--phases", "1", "--n-layers", "3", "--vary", "n_layers=1,2"), "exclude each other"),
        (("--phases", "1", "--vary", "n_heads=3,4"), "not a multiple"),
    ],
)
def test_what_cannot_vary_is_one_sentence(planned, line, message):
    with pytest.raises(BadInput, match=message):
        planned(*line)
