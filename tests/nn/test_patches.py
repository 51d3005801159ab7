"""Patches of pictures beside tokens: in every phase and branch."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_transformer import nn
from mlx_transformer.generate import Decoder
from mlx_transformer.nn.patches import class_of, pixels, with_patches, without_patches
from mlx_transformer.train.optim.groups import assign
from tests.ladder import PHASES, V, kinds, modules, tiny, tokens

KINDS = {name: kind for name, kind in kinds().items() if not kind.parallel}


def test_pixels_are_the_bits_times_the_color():
    code = 0b011_000000101  # red and green; pixels 0 and 2
    expected = np.zeros(27)
    expected[[0, 2, 9, 11]] = 1
    np.testing.assert_array_equal(pixels(mx.array([[code]]), 3)[0, 0], expected)
    assert pixels(mx.array([0]), 3).sum() == 0


def test_the_class_is_the_same_each_time_and_found_by_its_numbers():
    kind = modules()[1].Model
    assert with_patches(kind) is with_patches(kind)
    assert without_patches(with_patches(kind)) is without_patches(kind) is kind
    assert class_of(kind, with_patches(kind).Config().to_dict()) is with_patches(kind)
    assert class_of(kind, kind.Config().to_dict()) is kind


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_every_model_sees_the_pixels_of_a_patch_and_nothing_else_of_it(kind):
    net, x = tiny(with_patches(kind)), tokens(1, 12)
    x[:, 4] = V + 0b100_000000111
    logits = net(x)
    other = mx.array(np.array(x))
    other[:, 4] = V + 0b100_000011111
    change = mx.abs(net(other) - logits).max(axis=(0, 2))
    assert change[:4].max() == 0
    assert change[4] > 1e-4
    blank, token = (mx.array(np.array(x)) for _ in range(2))
    blank[:, 4], token[:, 4] = V, 1  # a patch without color is the token that stands for patches
    np.testing.assert_allclose(net(blank), net(token), atol=1e-6)


@pytest.mark.parametrize("n", PHASES)
def test_patches_decode_through_the_cache_and_their_map_trains_with_the_embedding(n):
    module = modules()[n]
    net, x = tiny(with_patches(module.Model)), tokens(2, 12)
    x[:, 2:6] = V + mx.array([[511, 3 << 9 | 7, 1 << 9 | 64, 0]])
    cache = net.make_cache(2)
    parts = [net(x[:, :8], cache), *(net(x[:, i : i + 1], cache) for i in range(8, 12))]
    np.testing.assert_allclose(mx.concatenate(parts, axis=1), net(x), atol=1e-5)
    own = dict(tree_flatten(net.trainable_parameters()))
    for recipe in (module.RECIPE, *module.RECIPES.values()):
        groups = assign(recipe.at("nano").groups, own)
        assert [name for name, group in groups.items() if "patch_proj.weight" in group and "embedding.weight" in group]
    assert mx.abs(kind_of(module).patch_proj.weight).max() > 0


def test_greedy_decoding_after_patches_writes_what_the_full_forward_predicts():
    """Sampled tokens are unsigned integers, those of a prompt signed ones."""
    net, prompt = tiny(with_patches(modules()[5].Model), seq_len=32), [3, V + 511, V + (1 << 9 | 64), 5]
    written = [tokens[0] for tokens in Decoder(net)([prompt], 6)]
    for _ in range(6):
        prompt.append(int(net(mx.array([prompt]))[0, -1].argmax()))
    assert written == prompt[4:]


def kind_of(module):
    kind = with_patches(module.Model)
    return kind(kind.Config(vocab_size=V, d_model=32, n_layers=1, n_heads=4, d_ff=48, seq_len=17))


MASKED = {name: KINDS[name] for name in ("1", "5", "6", "6-mtp", "6-mtp_parallel", "6-ngram_expert", "6-ngram_tables")}


@pytest.mark.parametrize("kind", MASKED.values(), ids=MASKED)
def test_a_masked_batch_with_patches_counts_its_answers_alone(kind):
    """The loss is the mean over the scored targets, and the other targets may be patches."""
    net, x = tiny(with_patches(kind)), np.array(tokens(3, 18))
    scored = np.random.default_rng(0).random(x.shape) < 0.3
    x[:, 2:5] += V * ~scored[:, 2:5]
    net.masked = True
    _, metrics = net.loss(mx.array(np.where(scored, x, ~x)))
    net.masked = False
    ctx, targets = net.inputs(mx.array(x))
    each = np.array(net.token_loss(net.hidden(ctx), targets))
    np.testing.assert_allclose(metrics["loss"].item(), each[scored[:, 1:]].mean(), rtol=1e-5)
    further = [name for name in metrics if name.startswith("loss_token")]
    assert bool(further) == ("MultiToken" in str(kind.__mro__))
    assert all(mx.isfinite(metrics[name]) for name in further)


def test_with_patches_is_exported():
    assert nn.with_patches is with_patches
