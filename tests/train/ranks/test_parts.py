"""Models of which each rank has a part: the numbers of one process, in training and in decoding."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_transformer.train.optim import AGC
from mlx_transformer.train.parallel import ALONE, Ranks
from mlx_transformer.train.parts import check_parts
from mlx_transformer.train.split import parameter_of
from mlx_transformer.utils.errors import BadInput
from tests.faults.runs import ON_CPU, generate, merged
from tests.train.ranks import parts
from tests.train.ranks.rings import ring

WORKER = Path(parts.__file__)
# Each runs over two ranks from the start to step 5, or from the checkpoint of one process at step 5 to the end.
TRAINED = [
    {"phase": 1, "shard": "tensor", "steps": 5},
    {"phase": 6, "shard": "tensor", "steps": 10},
    {"phase": 6, "shard": "pipeline", "steps": 5},
    {"phase": 4, "branch": "tied", "shard": "pipeline", "steps": 10},
]
DECODED = [{"phase": 5, "shard": "tensor"}, {"phase": 5, "shard": "pipeline"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def alone(folder):
    """What one process computes in each run, by phase; checkpoints of steps 5 and 10."""
    runs = {job["phase"]: {"phase": job["phase"], "branch": job.get("branch")} for job in TRAINED}
    return {phase: parts.train(ALONE, **job, folder=str(folder / f"alone{phase}")) for phase, job in runs.items()}


@pytest.fixture(scope="module")
def everyone(folder, alone):
    """What each of two ranks computes, in one launch."""
    jobs = [{"job": "train", **job, "folder": str(folder / f"ranks{i}")} for i, job in enumerate(TRAINED)]
    for i, job in enumerate(TRAINED):
        if job["steps"] == 10:
            half = "step_00000005"
            shutil.copytree(folder / f"alone{job['phase']}" / half, folder / f"ranks{i}" / half)
    jobs += [{"job": "generate", **job} for job in DECODED]
    with ring(folder / "ring", *[[WORKER, folder / "out", *map(json.dumps, jobs)]] * 2) as own:
        assert own.wait() == [0, 0], own.err(0) + own.err(1)
    return [json.loads(Path(f"{folder / 'out'}.{rank}").read_text()) for rank in range(2)]


def test_a_run_in_parts_is_whole_and_parts_generate_the_text_of_one_process(text, tmp_path):
    run = tmp_path / "run"
    numbers = ("--n-layers", 3, "--n-heads", 4, "--batch-size", 5, "--dropout", 0)
    train = merged(["-m", "phases.phase5", *ON_CPU, *numbers, "--data", text, "--max-steps", 3, "--out", run])
    with ring(tmp_path / "a", *[[*train, "--shard", "pipeline"]] * 2) as two:
        assert two.wait() == [0, 0], two.err(0) + two.err(1)
        assert "2 ranks over ring, each with 1/2 of the layers" in two.out(0)
        assert two.out(1) == two.err(1) == ""
    assert json.loads((run / "result.json").read_text())["ranks"]["count"] == 2
    words = [run, "--prompt", "the cat", "--prompt", "sand", "--temperature", 0, "--max-tokens", 40, "--device", "cpu"]
    expected = generate(*words)
    with ring(tmp_path / "b", *[["-m", "mlx_transformer", "generate", *words, "--shard", "pipeline"]] * 2) as two:
        assert two.wait() == [0, 0], two.err(0) + two.err(1)
        assert two.out(0) == expected.out
        assert two.out(1) == two.err(1) == ""


def assert_equal_runs(found: dict, expected: dict) -> None:
    """Compare the steps that two runs have in common, and what both end with."""
    for key in ("losses", "valid"):
        theirs = {str(step): value for step, value in expected[key].items()}
        np.testing.assert_allclose([*found[key].values()], [theirs[str(step)] for step in found[key]], rtol=1e-5)
    for path, norm in expected["weights"].items() if "10" in map(str, found["losses"]) else ():
        assert found["weights"][path] == pytest.approx(norm, rel=1e-4, abs=1e-6), path


@pytest.mark.parametrize("i", range(len(TRAINED)), ids=[f"{job['shard']}-phase{job['phase']}" for job in TRAINED])
def test_parts_train_as_one_process_does_and_resume_on_another_number_of_ranks(i, alone, everyone, folder):
    job = TRAINED[i]
    found = everyone[0][i]
    assert [*found["losses"]] == [str(step) for step in range(1 if job["steps"] == 5 else 6, job["steps"] + 1)]
    assert_equal_runs(found, alone[job["phase"]])
    if job["steps"] == 5:
        job = {name: value for name, value in job.items() if name != "steps"}
        assert_equal_runs(parts.train(ALONE, **job, folder=str(folder / f"ranks{i}")), alone[job["phase"]])


@pytest.mark.parametrize("i", range(len(DECODED)), ids=[job["shard"] for job in DECODED])
def test_parts_decode_as_one_process_does(i, everyone):
    expected = parts.generate(ALONE, DECODED[i]["phase"])
    for found in (one[len(TRAINED) + i] for one in everyone):
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
        assert found["tokens"] == expected["tokens"]
        assert found["share"] < 0.75


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.head.weight", "head.weight"),
        ("best.head.weight", "head.weight"),
        ("memory.average.head.weight", "head.weight"),
        ("snapshots.newest_first.2.head.weight", "head.weight"),
        ("optimizers.0.blocks.1.ffn.up_proj.weight.m", "blocks.1.ffn.up_proj.weight"),
        ("optimizers.0.step", ""),
        ("memory.clip.mean", ""),
    ],
)
def test_the_name_of_an_array_tells_its_parameter(name, path):
    assert parameter_of(name, {"head.weight", "blocks.1.ffn.up_proj.weight"})[1] == path


def some_ranks(size: int) -> Ranks:
    return Ranks(SimpleNamespace(rank=lambda: 0, size=lambda: size), "ring")


@pytest.mark.parametrize(
    ("phase", "branch", "numbers", "size", "says"),
    [
        (5, None, {}, 4, "n_kv_heads = 2 cannot be divided among 4 ranks"),
        (3, None, {"d_ff": 63}, 2, "d_ff = 63 cannot be divided among 2 ranks"),
        (3, "alibi", {}, 2, "ALiBi numbers the heads"),
        (6, "mamba", {}, 2, "Mamba cannot be split over ranks"),
        (4, "moe", {}, 2, "MixtureOfExperts cannot be split over ranks"),
        (6, "mod", {}, 2, "MixtureOfDepths chooses tokens"),
        (4, "mla", {}, 2, "FusedLatent cannot be split over ranks"),
    ],
)
def test_what_cannot_be_sliced_is_refused_by_name(phase, branch, numbers, size, says):
    module, model = parts.make(phase, branch, **numbers)
    with pytest.raises(BadInput, match=says):
        check_parts(model, module.RECIPE.at("nano"), "tensor", some_ranks(size))


@pytest.mark.parametrize(
    ("phase", "branch", "says"),
    [
        (3, None, "2 blocks cannot be divided among 3 ranks"),
        (4, "universal", "Universal does more than its blocks in order"),
        (4, "moe", "MixtureOfExperts needs more than the blocks of one rank"),
        (6, "mtp", "MultiToken does more than its blocks in order"),
        (6, "with_lambdas", "MixedInputBlock needs more than the blocks of one rank"),
    ],
)
def test_what_is_no_chain_of_blocks_is_refused_by_name(phase, branch, says):
    module, model = parts.make(phase, branch)
    with pytest.raises(BadInput, match=says):
        check_parts(model, module.RECIPE.at("nano"), "pipeline", some_ranks(3))


def test_recipes_that_need_whole_batches_or_draws_are_refused_in_a_pipeline():
    module, model = parts.make(5, None)
    for recipe, says in (
        (replace(module.RECIPE.at("nano"), dropout=0.1), "would drop other values"),
        (module.RECIPES["sophia"].at("nano"), "Sophia samples from the model"),
    ):
        with pytest.raises(BadInput, match=says):
            check_parts(model, recipe, "pipeline", some_ranks(2))


def test_a_clipping_of_whole_rows_is_refused():
    module, model = parts.make(3, None)
    recipe = replace(module.RECIPE.at("nano"), clip=AGC(ratio=0.1))
    with pytest.raises(BadInput, match="AGC clips by whole rows"):
        check_parts(model, recipe, "tensor", some_ranks(2))
