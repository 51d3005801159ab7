"""Config, leaf, initialization, Ctx and recipes: what the tests over the whole ladder do not cover."""

from dataclasses import FrozenInstanceError, replace
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx import nn
from mlx.utils import tree_flatten

from mlx_transformer.nn import init
from mlx_transformer.nn.config import SIZES, Config, Hyperparameters
from mlx_transformer.nn.model import class_for_layer, leaf
from mlx_transformer.nn.position import RotaryPosition, SinusoidalPosition
from mlx_transformer.run.settings import meaning
from mlx_transformer.train.recipe import BySize, ByWidth
from mlx_transformer.utils.errors import BadInput
from phases import phase1, phase4
from tests.ladder import tiny, tokens


def test_parameter_counts_of_the_three_sizes():
    def count(size):
        return phase1.Model(phase1.Config(**SIZES[size])).count_parameters()["total"]

    assert [count(size) for size in ("nano", "small", "base")] == [231_040, 1_841_664, 7_353_344]


def test_config_is_a_frozen_keyword_only_value_extended_by_inheritance():
    class Wider(Config):
        window: int = 3

    config = Wider(d_model=64, window=5)
    assert config.window == 5
    assert config.to_dict()["d_model"] == 64
    assert Wider(**config.to_dict()) == config
    with pytest.raises(FrozenInstanceError):
        config.window = 4
    with pytest.raises(TypeError):
        Wider(1024)
    with pytest.raises(BadInput, match="window = 0"):
        Wider(window=0)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"d_model": 100, "n_heads": 8}, "d_model = 100 is not a multiple of n_heads = 8"),
        ({"n_layers": 0}, "n_layers = 0"),
        ({"seq_len": -1}, "seq_len = -1"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"vocab_size": 1.5}, "vocab_size = 1.5"),
    ],
)
def test_a_field_out_of_range_is_named(numbers, words):
    with pytest.raises(BadInput, match=words):
        Config(**numbers)


class Rope(Hyperparameters):
    rope_theta: float = 500.0  # base of the wavelengths


class Window(Hyperparameters):
    window: int = 0  # tokens that a query attends to

    def __post_init__(self):
        self.derive("window", self.seq_len // 2)
        super().__post_init__()


def test_a_leaf_combines_mixins_of_fields_and_slots():
    kind = leaf(phase4.Model, Rope, Window, Position=RotaryPosition)
    assert issubclass(kind, phase4.Model)
    assert kind.Position is RotaryPosition
    assert phase4.Model.Position is not RotaryPosition
    config = kind.Config(**SIZES["nano"])
    assert isinstance(config, phase4.Config)
    assert (config.rope_theta, config.window, config.n_kv_heads) == (500.0, 32, 2)  # n_kv_heads is derived by phase 4
    assert kind.Config(**config.to_dict()) == config
    for field, words in (("window", "window = -1"), ("n_heads", "n_heads = -1"), ("rope_theta", "rope_theta = nan")):
        with pytest.raises(BadInput, match=words):
            kind.Config(**{field: float("nan") if field == "rope_theta" else -1})
    assert meaning(kind.Config, "window") == "tokens that a query attends to"
    assert meaning(kind.Config, "rope_theta") == "base of the wavelengths"
    assert kind(config)(tokens() % 7).shape == (2, 17, 1024)
    assert leaf(phase4.Model).Config is phase4.Config


def test_a_leaf_with_an_unknown_slot_is_an_error():
    with pytest.raises(TypeError, match=r"phases.phase4.Model has no slot 'Positions'"):
        leaf(phase4.Model, Positions=RotaryPosition)


def test_a_tuple_in_a_slot_is_used_cyclically_over_the_layers():
    assert [class_for_layer((int, str), i) for i in range(4)] == [int, str, int, str]
    assert class_for_layer(int, 3) is int


def test_auxiliary_losses_are_weighted_sums_and_metrics_are_means():
    ctx = tiny(phase1.Model).context(tokens())
    ctx.at(0).record("balance", mx.array(2.0), weight=0.5)
    ctx.at(1).record("balance", mx.array(4.0), weight=0.5)
    ctx.record("seen", mx.array(7.0))
    total, means = ctx.auxiliary_loss()
    assert total.item() == 3.0
    assert {name: value.item() for name, value in means.items()} == {"balance": 3.0, "seen": 7.0}


@given(st.integers(0, 10**6), st.sampled_from([8, 31, 64]))
def test_sinusoids_are_those_of_the_paper(position, d_model):
    encoding = SinusoidalPosition(Config()).encoding(mx.array([position]), d_model)
    angle = position / 10_000.0 ** (np.arange(0, d_model, 2) / d_model)
    expected = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(-1)[:d_model]
    np.testing.assert_allclose(np.array(encoding[0]), expected, atol=2e-6 * max(1, position))


def test_ctx_mask_hides_a_token():
    net, x = tiny(phase1.Model), tokens()
    ctx = net.context(x)
    blind = replace(ctx, mask=mx.arange(17)[None, :] != 3)  # token 3 is hidden from all
    changed = mx.array(np.array(x))
    changed[:, 3] = (x[:, 3] + 1) % 67
    other = replace(net.context(changed), mask=blind.mask)
    h, g = net.hidden(blind), net.hidden(other)
    assert mx.abs(h - g)[:, 4:].max() == 0
    assert mx.abs(net.hidden(ctx) - h)[:, 4:].max() > 1e-3


def test_dropout_is_active_in_training_alone():
    net, x = tiny(phase1.Model, dropout=0.5), tokens()
    assert mx.array_equal(net(x), net(x))
    net.train()
    assert not mx.array_equal(net(x), net(x))


def test_a_recipe_is_sized_and_described():
    recipe = phase1.RECIPE.at("small")
    assert recipe.batch_tokens == 8192
    assert isinstance(recipe.schedule.warmup_tokens, int)
    described = recipe.to_dict()
    assert described["schedule"]["kind"] == "InverseSqrt"
    assert described["groups"][0]["optimizer"]["betas"] == [0.9, 0.98]
    assert "BySize" not in str(described)
    assert replace(phase1.RECIPE, learning_rate=BySize(nano=1, small=2, base=3)).at("base").learning_rate == 3


def test_a_number_by_width_follows_the_width_of_the_model():
    rate = ByWidth(0.012, power=-1)
    groups = (replace(phase1.RECIPE.groups[0], lr_multiplier=ByWidth(2.0, power=0.5, width=32)),)
    recipe = replace(phase1.RECIPE, learning_rate=rate, groups=groups)
    assert [recipe.at(size).learning_rate for size in SIZES] == [0.012, 0.006, 0.003]
    assert recipe.at("base", 96).learning_rate == 0.008
    assert recipe.at("base", 96).groups[0].lr_multiplier == 3.46
    assert "ByWidth" not in str(recipe.at("nano").to_dict())
    with pytest.raises(BadInput, match="learning_rate differs by model size"):
        replace(phase1.RECIPE.at("nano"), learning_rate=rate).check()


OUT_OF_RANGE = {
    "learning_rate": [0.0, float("nan"), float("inf")],
    "dtype": ["int8"],
    "label_smoothing": [-0.1, 1.0],
    "accumulate": [0],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name in OUT_OF_RANGE for value in OUT_OF_RANGE[name]])
def test_a_recipe_out_of_range_is_bad_input(field, value):
    with pytest.raises(BadInput, match=f"{value}"):
        replace(phase1.RECIPE.at("nano"), **{field: value}).check()


def test_equal_seeds_give_equal_weights_and_others_do_not():
    def weights(seed):
        return dict(tree_flatten(phase1.Model(phase1.Config(**SIZES["nano"]), seed).parameters()))

    a, b, c = weights(1), weights(1), weights(2)
    assert all(mx.array_equal(a[path], b[path]) for path in a)
    assert not mx.array_equal(a["head.weight"], c["head.weight"])


class Gain(nn.Module):
    init_rules: ClassVar = {"gain": init.normal(2.0), "weight": init.zeros}

    def __init__(self, config):
        super().__init__()
        self.gain, self.offset = mx.zeros((config.d_model,)), mx.full((3,), 7.0)
        self.up_proj = nn.Linear(config.d_model, config.d_ff)


class ShiftedGain(Gain):
    init_rules: ClassVar = {"offset": init.ones}


@pytest.mark.parametrize("model", [phase1.Model, phase4.Model])
def test_a_part_initializes_the_parameters_that_no_table_names(model):
    def weights(ffn, seed=0):
        return dict(tree_flatten(leaf(model, FFN=ffn)(model.Config(**SIZES["nano"]), seed).parameters()))

    own, further, base = weights(Gain), weights(ShiftedGain), weights(model.FFN)
    assert own["blocks.1.ffn.gain"].std().item() == pytest.approx(2, rel=0.3)
    assert mx.array_equal(own["blocks.1.ffn.gain"], further["blocks.1.ffn.gain"])  # rules are inherited
    assert not mx.array_equal(own["blocks.0.ffn.gain"], own["blocks.1.ffn.gain"])
    assert not mx.array_equal(own["blocks.1.ffn.gain"], weights(Gain, 1)["blocks.1.ffn.gain"])
    assert (own["blocks.0.ffn.offset"] == 7).all()  # as the part set it
    assert (further["blocks.0.ffn.offset"] == 1).all()
    assert mx.array_equal(own["blocks.0.ffn.up_proj.weight"], base["blocks.0.ffn.up_proj.weight"])  # by the table


def test_a_parameter_that_two_rules_match_is_named():
    with pytest.raises(ValueError, match=r"'blocks.0.o_proj.weight' matches 2 rules"):
        init.rule_for("blocks.0.o_proj.weight", (*init.RULES, (r".*o_proj\.weight", init.zeros)))
