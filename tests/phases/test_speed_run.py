"""Phase 6: in one setting each idea equals phase 5, in any other it does not; an ablation changes one idea."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer import ops
from mlx_transformer.backend import divided_blas
from mlx_transformer.nn.block import PreNormBlock
from mlx_transformer.nn.config import SIZES
from mlx_transformer.run import training
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.train.optim.groups import assign
from mlx_transformer.train.optim.muon import Muon
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path
from phases import phase5, phase6
from tests.faults.runs import ON_CPU, assert_same_run, command, write_text
from tests.ladder import TINY, tiny, tokens
from tests.phases.test_architecture import apart, like, set_all

BRANCHES, RECIPES = phase6.BRANCHES, phase6.RECIPES


@pytest.fixture
def llama():
    return tiny(phase5.Model)


def start(kind, size="nano"):
    return kind(kind.Config(**SIZES[size]), seed=3)


# --- the ablation ---------------------------------------------------------------------------------------------------


def test_the_branch_phase_5_is_phase_5_and_so_is_the_recipe():
    ours, theirs = (by_path(start(kind).parameters()) for kind in (BRANCHES["phase_5"], phase5.Model))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[path], theirs[path]) for path in ours)
    net = tiny(phase5.Model)
    assert apart(like(BRANCHES["phase_5"], net), net) == 0
    assert phase6.RECIPES["phase_5"] == phase5.RECIPE


IDEAS = {  # the slots that each idea fills, and numbers of the configuration
    "value_embeddings": {"Mixer"},
    "relu_squared": {"FFN"},
    "half_width": {"FFN"},
    "zero_init": {"init_weight"},
    "token_shift": {"n_shifts"},
    "sampled_softmax": {"sample_ratio"},
    "qk_norm": {"Mixer"},
    "lambdas": {"Block"},
    "softcap": {"softcap", "Head"},
}
TECHNIQUES = {
    "muon": {"learning_rate", "groups"},
    "short": {"schedule", "eval_tokens"},
    "batch_warmup": {"batch_warmup"},
}


def slots(kind):
    """Each slot with the classes in it, and each number of the configuration."""
    names = ("Mixer", "FFN", "Block", "Head", "init_weight")
    return {name: getattr(kind, name) for name in names} | kind.Config().to_dict()


def differing(ours, theirs):
    return {name for name in ours | theirs if ours.get(name) != theirs.get(name)}


def check_ablation(name, changed, variants, before, ours):
    """Compare the fields of one idea's variants with those of phase 5 (before) and phase 6 (ours)."""
    added, kept = variants[f"phase_5_with_{name}"], f"without_{name}" in variants
    assert differing(added, before) == changed
    assert differing(variants[f"without_{name}" if kept else f"with_{name}"], ours) == changed
    if changed != {"FFN"}:  # of two ideas: below
        assert {field for field in changed if added[field] == ours.get(field)} == (changed if kept else set())


def test_half_a_feed_forward_layer_is_one_idea_and_its_activation_another():
    relu, half = (BRANCHES[f"phase_5_with_{name}"].FFN for name in ("relu_squared", "half_width"))
    assert (relu, half) == (BRANCHES["without_half_width"].FFN, BRANCHES["without_relu_squared"].FFN)
    wide, narrow = phase5.Config(d_model=8, n_heads=2, d_ff=48), phase5.Config(d_model=8, n_heads=2, d_ff=24)
    for ours, theirs in ((half, phase5.Model.FFN), (phase6.Model.FFN, relu)):
        assert shapes(ours(wide)) == shapes(theirs(narrow)) != shapes(theirs(wide))
    assert issubclass(phase6.Model.FFN, relu)


def shapes(part):
    return {path: w.shape for path, w in by_path(part.parameters()).items()}


@pytest.mark.parametrize(("idea", "changed"), IDEAS.items())
def test_an_ablation_of_the_model_differs_by_one_idea(idea, changed):
    variants = {name: slots(kind) for name, kind in BRANCHES.items()}
    check_ablation(idea, changed, variants, variants["phase_5"], slots(phase6.Model))


@pytest.mark.parametrize(("technique", "changed"), TECHNIQUES.items())
def test_an_ablation_of_the_recipe_differs_by_one_technique(technique, changed):
    variants = {name: vars(recipe) for name, recipe in RECIPES.items()}
    check_ablation(technique, changed, variants, vars(phase5.RECIPE), vars(phase6.RECIPE))


def test_every_ablation_of_phase_6_is_checked():
    ablated = {name.split("_with_")[-1] for name in [*BRANCHES, *RECIPES] if "_with_" in name}
    assert ablated == IDEAS.keys() | TECHNIQUES.keys()


# --- the ideas ------------------------------------------------------------------------------------------------------


def test_qk_norm_on_phase_5_is_qwen3(llama):
    normed = tiny(BRANCHES["phase_5_with_qk_norm"])
    assert apart(normed, like(phase5.BRANCHES["qwen3"], normed)) == 0
    assert apart(normed, llama) > 1e-3


def test_tables_of_zeros_are_no_value_embeddings(llama):
    valued = like(BRANCHES["phase_5_with_value_embeddings"], llama)
    tables = [path for path in by_path(valued.parameters()) if "value_embedding" in path]
    assert tables == [f"blocks.{i}.mixer.value_embedding.weight" for i in range(4)]
    assert apart(valued, llama) > 1e-3
    assert apart(set_all(valued, "value_embedding.weight", 0.0), llama) == 0


def test_a_value_embedding_is_what_the_token_adds_to_its_value():
    net = tiny(phase6.Model)
    mixer, ctx = net.blocks[1].mixer, net.context(tokens())
    x = mx.random.normal((2, 17, TINY["d_model"]))
    added = mixer.project(x, ctx)[2] - mixer.split(mixer.v_proj(x))
    row = mixer.value_embedding.weight[tokens()[1, 5]]
    np.testing.assert_allclose(added[1, :, 5].flatten(), row, atol=1e-5)


def test_lambdas_of_one_and_zero_are_the_plain_block(llama):
    mixed = like(BRANCHES["phase_5_with_lambdas"], llama)
    assert apart(mixed, llama) > 1e-3
    set_all(mixed, "x0_lambda", 0.0)
    assert apart(mixed, llama) > 1e-3
    assert apart(set_all(mixed, "residual_lambda", 1.0), llama) == 0
    fresh = start(BRANCHES["phase_5_with_lambdas"]).blocks[0]
    assert (fresh.residual_lambda.item(), fresh.x0_lambda.item()) == (1.0, 0.0)


def test_a_block_without_the_stream_reads_the_embeddings(llama):
    """With the lambdas 0 and 1 each block's input is x0, so the output is the last block's."""
    mixed = like(BRANCHES["phase_5_with_lambdas"], llama)
    set_all(set_all(mixed, "residual_lambda", 0.0), "x0_lambda", 1.0)
    ctx = mixed.context(tokens())
    x = mixed.embed(ctx)
    expected = PreNormBlock.__call__(mixed.blocks[-1], x, ctx.at(3))
    np.testing.assert_allclose(mixed.run_blocks(x, replace(ctx, x0=x)), expected, atol=1e-5)


def test_a_bound_out_of_reach_changes_nothing_and_a_near_one_holds(llama):
    assert apart(like(BRANCHES["phase_5_with_softcap"], llama, softcap=1e5), llama) < 1e-4
    capped = like(BRANCHES["phase_5_with_softcap"], llama, softcap=0.5)
    assert apart(capped, llama) > 1e-2
    assert mx.abs(capped(tokens())).max() < 0.5
    x, loss = tokens(2, 18), capped.loss(tokens(2, 18))[0]
    assert loss.item() == pytest.approx(_nats(capped(x[:, :-1]), x[:, 1:]), abs=1e-5)


def _nats(logits, targets):
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (mx.logsumexp(logits, axis=-1) - chosen).mean().item()


def test_a_bound_of_0_is_refused():
    with pytest.raises(BadInput, match=r"softcap = 0.0: expected a number above 0"):
        BRANCHES["with_softcap"].Config(**TINY, softcap=0.0)


def test_squared_relu_and_its_gradient():
    x = mx.array([-2.0, -0.0, 0.0, 0.5, 1.0, 3.0])
    np.testing.assert_array_equal(ops.relu_squared(x), [0, 0, 0, 0.25, 1, 9])
    np.testing.assert_array_equal(mx.grad(lambda x: ops.relu_squared(x).sum())(x), [0, 0, 0, 1, 2, 6])


def test_zero_initialization_predicts_uniformly_and_every_block_is_the_identity():
    net = start(phase6.Model)
    ctx = net.context(tokens())
    x = net.embed(ctx)
    assert mx.array_equal(net.run_blocks(x, replace(ctx, x0=x)), x)
    assert net.loss(tokens())[0].item() == pytest.approx(np.log(SIZES["nano"]["vocab_size"]), abs=1e-4)
    other = start(BRANCHES["without_zero_init"])
    assert not mx.array_equal(other.run_blocks(x, replace(ctx, x0=x)), x)
    zero = {path for path, w in by_path(net.parameters()).items() if mx.abs(w).max() == 0}
    kept = {path for path, w in by_path(other.parameters()).items() if mx.abs(w).max() == 0}
    assert {path.rpartition("blocks.")[2].partition(".")[2] for path in zero - kept} >= {
        "mixer.o_proj.weight",
        "ffn.down_proj.weight",
    }
    assert "head.weight" in zero - kept


# --- training -------------------------------------------------------------------------------------------------------


def batches(steps, vocab_size=SIZES["nano"]["vocab_size"]):
    """Sequences in which each token determines the next, so that there is something to learn."""
    draw = np.random.default_rng(0)
    firsts = draw.integers(0, vocab_size, (steps, 4, 1))
    return mx.array((firsts + 7 * np.arange(65)) % vocab_size, mx.int32)


def trained(recipe, steps=6, compiled=True):
    """The losses and the weights of a nano model after some steps."""
    net = start(phase6.Model)
    take_step = TrainingStep(net, recipe, compiled=compiled)
    losses = []
    with divided_blas():
        for batch in batches(steps):
            metrics, _ = take_step(batch, recipe.learning_rate)
            mx.eval(metrics, take_step.state)
            losses.append(metrics["loss"].item())
    return losses, by_path(net.parameters())


@pytest.fixture(scope="module")
def recipe():
    return phase6.RECIPE.at("nano")


def test_a_compiled_step_over_several_streams_is_the_eager_one(recipe):
    slow = replace(recipe, learning_rate=1e-3)  # at the full one, rounding alone makes the losses differ
    (compiled, _), (eager, _) = trained(slow), trained(slow, compiled=False)
    # The weights are not compared: where a gradient is only rounding, Muon follows it as far as any other.
    np.testing.assert_allclose(compiled, eager, atol=1e-3)
    assert compiled[-1] < compiled[0] - 0.01


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_trains_and_keeps_its_weights_in_float32(recipe, dtype):
    losses, weights = trained(replace(recipe, dtype=dtype))
    full, _ = trained(recipe)
    np.testing.assert_allclose(losses, full, atol=0.1)
    assert {w.dtype for w in weights.values()} == {mx.float32}


def test_muon_owns_the_matrices_of_the_blocks_and_nothing_else(recipe):
    owned = assign(recipe.groups, by_path(start(phase6.Model).parameters()))
    kinds = {group.name: type(group.optimizer) for group in recipe.groups}
    assert kinds["matrices"] is Muon
    assert all(path.startswith("blocks.") and path.endswith("_proj.weight") for path in owned["matrices"])
    assert len(owned["matrices"]) == 2 * (4 + 2)
    tables = [f"blocks.{i}.mixer.value_embedding.weight" for i in range(2)]
    assert sorted(owned["embeddings"]) == [*tables, "embedding.weight"]


def test_a_resumed_run_is_the_one_never_stopped(tmp_path):
    text = write_text(tmp_path / "text.txt")
    flags = [*ON_CPU, "--data", text, "--eval-every", 2]

    def train(*args):
        assert command(lambda: training.main(find_phase(6)), *args, "--quiet").code == 0

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(*flags, "--max-steps", 6, "--out", whole)
    train(*flags, "--max-steps", 4, "--out", stopped)
    train("--resume", stopped, "--max-steps", 6)
    assert_same_run(stopped, whole)
