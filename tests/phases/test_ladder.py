"""Properties of every phase and every branch."""

import ast
import inspect
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from mlx_transformer.nn import init, model
from mlx_transformer.nn.cache import Cache
from mlx_transformer.nn.mixers import RecurrentMixer
from mlx_transformer.train.optim.groups import assign
from mlx_transformer.utils.errors import BadInput
from tests.ladder import PHASES, TINY, V, kinds, modules, tiny, tokens

KINDS = kinds()
everywhere = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@everywhere
def test_forward_has_the_shape_of_logits(kind):
    logits = tiny(kind)(tokens())
    assert logits.shape == (2, 17, V)
    assert logits.dtype == mx.float32
    assert mx.isfinite(logits).all()


@everywhere
def test_a_token_changes_its_own_and_later_logits_only(kind):
    net, before = tiny(kind), tokens()
    after = mx.array(np.array(before))
    after[:, 9] = (before[:, 9] + 1) % V
    change = mx.abs(net(before) - net(after)).max(axis=(0, 2))
    assert change[:9].max() == 0
    assert change[9] > 1e-4
    assert change[10:].max() > 1e-4


def rounding(net):
    """The difference allowed to two forms of a model: those of a recurrence sum in other orders, before its norm."""
    return 1e-4 if any(isinstance(part, RecurrentMixer) for part in net.modules()) else 1e-5


@everywhere
def test_cached_decoding_equals_the_full_forward(kind):
    net, x = tiny(kind), tokens(length=90)
    cache = net.make_cache(2)
    parts = [net(x[:, :8], cache), net(x[:, 8:10], cache)]
    parts += [net(x[:, i : i + 1], cache) for i in range(10, 90)]  # beyond one growth of the buffer
    np.testing.assert_allclose(mx.concatenate(parts, axis=1), net(x), atol=rounding(net))


@everywhere
def test_selecting_sequences_of_the_cache_selects_them_in_the_batch(kind):
    net, x = tiny(kind), tokens()
    cache = net.make_cache(2)
    net(x[:, :8], cache)
    cache.select(mx.array([1, 0]))
    exchanged = x[mx.array([1, 0])]
    np.testing.assert_allclose(
        net(x[:, 8:], cache)[0], net(mx.concatenate([exchanged[:, :8], x[:, 8:]], 1))[0, 8:], atol=rounding(net)
    )


SHORT = {
    "window": 4,
    "n_global": 7,
    "segment_len": 3,
    "stride": 4,
    "n_summary": 1,
}  # so that windows roll, and a prompt is shorter than n_global


@everywhere
def test_sequences_of_unequal_length_decode_as_if_alone(kind):
    net, x = tiny(kind, **{name: n for name, n in SHORT.items() if hasattr(kind.Config, name)}), tokens()
    caches = []
    for row, length in ((0, 5), (1, 9)):
        cache = net.make_cache(1)
        net(x[row : row + 1, :length], cache)
        caches.append(cache)
    cache, full = Cache.merge(caches), net(x)
    for i in range(6):
        logits = net(mx.stack([x[0, 5 + i], x[1, 9 + i]])[:, None], cache)[:, 0]
        np.testing.assert_allclose(logits, mx.stack([full[0, 5 + i], full[1, 9 + i]]), atol=rounding(net))


@everywhere
def test_the_compiled_step_equals_the_eager_one_and_every_parameter_moves(kind):
    def run(compiled):
        net, optimizer = tiny(kind), mlx.optimizers.AdamW(1e-3, bias_correction=True)
        optimizer.init(net.trainable_parameters())
        state = [net.state, optimizer.state]

        def step(batch):
            (loss, _), gradients = nn.value_and_grad(net, net.loss)(batch)
            optimizer.update(net, gradients)
            return loss, gradients

        step = mx.compile(step, inputs=state, outputs=state) if compiled else step
        losses = []
        for i in range(3):
            loss, gradients = step(tokens(4, 18, seed=i))
            mx.eval(loss, state, gradients)
            losses.append(loss.item())
        return losses, gradients

    (eager, gradients), (compiled, _) = run(False), run(True)
    np.testing.assert_allclose(eager, compiled, rtol=2e-5)
    # A bias of the keys adds the same number to all scores of a query, which the softmax cancels.
    still = [path for path, g in tree_flatten(gradients) if mx.abs(g).max() == 0 and not path.endswith("k_proj.bias")]
    assert not still


@everywhere
def test_every_parameter_is_initialized_once_and_equal_paths_equally(kind):
    drawn = []

    class Recorded(kind):
        def init_weight(self, path, value, key):
            drawn.append(path)
            return super().init_weight(path, value, key)

    own = dict(tree_flatten(Recorded(kind.Config(**TINY), seed=7).parameters()))
    assert sorted(drawn) == sorted(own)
    baselines = {module.Model for module in modules().values()}
    before = [ancestor for ancestor in kind.__mro__[1:] if ancestor in baselines]
    alone = kind if kind in baselines else before[0]  # a phase with rules of its own is paired with its branches only
    baseline = next((ancestor for ancestor in before if ancestor.init_weight is kind.init_weight), alone)
    first = dict(tree_flatten(baseline(baseline.Config(**TINY), seed=7).parameters()))
    shared = [path for path in own.keys() & first.keys() if own[path].shape == first[path].shape]
    assert shared
    assert all(mx.array_equal(own[path], first[path]) for path in shared)


@everywhere
def test_bfloat16_stays_bfloat16(kind):
    net = tiny(kind)
    net.update(tree_map(lambda w: w.astype(mx.bfloat16), net.parameters()))
    cache = net.make_cache(2)
    assert net.hidden(net.context(tokens())).dtype == mx.bfloat16
    assert net(tokens(), cache).dtype == mx.bfloat16
    assert net(tokens(length=1), cache).dtype == mx.bfloat16


@pytest.mark.parametrize("n", PHASES)
def test_every_parameter_has_one_optimizer_group(n):
    module = modules()[n]
    for kind in (module.Model, *module.BRANCHES.values()):
        own = dict(tree_flatten(tiny(kind).trainable_parameters()))
        for recipe in (module.RECIPE, *module.RECIPES.values()):
            paths = [path for group in assign(recipe.at("nano").groups, own).values() for path in group]
            assert sorted(paths) == sorted(own)


def test_learned_positions_train_like_the_embedding():
    module = modules()[3]
    own = dict(tree_flatten(tiny(module.Model).trainable_parameters()))
    groups = assign(module.RECIPE.at("nano").groups, own)
    assert groups["embedding"] == ["embedding.weight", "position.weight"]
    assert all(".mixer." in path or ".ffn." in path for path in groups["matrices"])


def test_tables_of_distances_are_not_in_the_group_of_matrices():
    """Shaw's tables train like the embedding, Transformer-XL's u and v like biases."""
    module = modules()[3]
    for branch, group, ending in (("shaw", "embedding", "relative_"), ("transformer_xl", "vectors", "_bias")):
        own = dict(tree_flatten(tiny(module.BRANCHES[branch]).trainable_parameters()))
        groups = assign(module.RECIPE.at("nano").groups, own)
        of_distances = [path for path in groups[group] if f".mixer.{ending}" in path or path.endswith(ending)]
        assert len(of_distances) == 2 * TINY["n_layers"]
        assert all(path.endswith("_proj.weight") for path in groups["matrices"])


@pytest.mark.parametrize("n", PHASES)
def test_a_phase_overrides_declared_hooks_only(n):
    for kind in (modules()[n].Model, *modules()[n].BRANCHES.values()):
        before_model = kind.__mro__[: kind.__mro__.index(model.Model)]
        bases = [model.Model, *(one for one in before_model if one.__module__.startswith("mlx_transformer.nn."))]
        declared = {
            name for base in bases for name in (*vars(base), *base.__annotations__) if not name.startswith("__")
        }
        for ancestor in before_model:
            own = {name for name in vars(ancestor) if not name.startswith("__")}
            assert own <= declared, f"{ancestor} defines what no model of mlx_transformer.nn declares"
            assert "__init__" not in vars(ancestor), f"{ancestor}: Model.__init__ is final, extend build"


@pytest.mark.parametrize("n", PHASES)
def test_a_phase_file_deletes_nothing_and_tests_for_no_attribute(n):
    tree = ast.parse(Path(inspect.getsourcefile(modules()[n])).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Delete)]
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in ("hasattr", "delattr", "isinstance")]


@pytest.mark.parametrize("n", PHASES)
def test_the_model_of_a_phase_subclasses_the_one_before(n):
    before = modules()[n - 1].Model if n > 1 else model.Model
    assert issubclass(modules()[n].Model, before)
    assert all(issubclass(kind, modules()[n].Model) for kind in modules()[n].BRANCHES.values())


@pytest.mark.parametrize("n", PHASES)
def test_every_parameter_of_the_ladder_has_one_rule_in_its_table(n, monkeypatch):
    def one_rule(path, rules=init.RULES):
        assert sum(re.fullmatch(pattern, path) is not None for pattern, _ in rules) == 1, path
        return init.keep

    monkeypatch.setattr(init, "rule_for", one_rule)
    for kind in (modules()[n].Model, *modules()[n].BRANCHES.values()):
        kind(kind.Config(**TINY))


def test_a_parameter_in_no_group_or_two_is_named():
    matrices, _, _, vectors = modules()[1].RECIPE.groups
    groups = (matrices, vectors)
    with pytest.raises(BadInput, match="'w' must be in one optimizer group, and is in none"):
        assign(groups[1:], {"w": mx.zeros((2, 2)), "b": mx.zeros(2)})
    with pytest.raises(ValueError, match=r"'b' .* is in 'vectors' and 'twice'"):
        assign((*groups, replace(groups[1], name="twice")), {"b": mx.zeros(2)})
    with pytest.raises(ValueError, match="group 'vectors' has no parameter"):
        assign(groups, {"w": mx.zeros((2, 2))})
