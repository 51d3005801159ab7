"""Every phase, branch and idea can run on a Mac's GPU: no primitive without a Metal kernel in its graph, no float64."""

import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from bench.tools.graph import FOR_A_CPU, NO_METAL_KERNEL, labels, on_metal, trace, training_step
from mlx_transformer import backend
from mlx_transformer.backend import describe_primitives, primitives
from mlx_transformer.generate.decoding import Decoder, _prefill
from mlx_transformer.nn import MixtureOfExperts
from mlx_transformer.utils.trees import by_path
from phases import phase1
from tests.ladder import V, kinds, modules, tiny

KINDS = kinds()


def _recipes():
    """(model, recipe) by name: every kind with its phase's recipe, every phase with its other recipes."""
    found = {}
    for name, kind in KINDS.items():
        module = modules()[int(name[0])] if name[0].isdigit() else phase1
        found[name] = kind, module.RECIPE
    for n, module in modules().items():
        found |= {f"{n}+{name}": (module.Model, recipe) for name, recipe in module.RECIPES.items()}
    return found


RECIPES = _recipes()


@contextmanager
def _uncompiled():
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def _train(kind, recipe=phase1.RECIPE, **options):
    """A training step as a function of its batch, and a batch."""
    model = tiny(kind, n_layers=2, dropout=0.1 if recipe.checkpoint == "none" else 0.0)
    model.train()
    return training_step(model, recipe.at("nano"), **options), mx.zeros((2, 18), mx.int32)


def _decode(kind):
    """A step of cached decoding as a function of the tokens just sampled, and such tokens.

    A translator takes its source from the first five tokens of a prompt (tests/ladder.py).
    """
    model = tiny(kind, n_layers=2)
    _, cache = _prefill(model, [[1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]])
    cache.reserve(4)
    mx.eval(cache.state)
    decoder, before = Decoder(model), cache.state

    def step(tokens):
        cache.state = before
        return [decoder.step(tokens, cache), *(array for _, array in tree_flatten(cache.state))]

    return step, mx.zeros((2,), mx.int32)


def _missing(function, x):
    """What of the real, uncompiled graph has no Metal kernel: the hidden parts of custom functions included."""
    with _uncompiled():
        return set(labels(*function(x))) & NO_METAL_KERNEL


def test_the_operations_for_a_cpu_are_those_of_our_source():
    files = Path(backend.__file__).parent.glob("*.cpp")
    assert {name for file in files for name in re.findall(r'"(Cpu\w+)"', file.read_text("utf-8"))} == FOR_A_CPU


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step_has_a_metal_kernel_for_everything(name):
    with on_metal():
        assert not _missing(*_train(*RECIPES[name]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step_on_a_cpu_lacks_kernels_for_operations_of_ours_only(name):
    assert _missing(*_train(*RECIPES[name])) <= FOR_A_CPU


@pytest.mark.parametrize("name", KINDS)
def test_decoding_has_a_metal_kernel_for_everything(name):
    with on_metal():
        assert not _missing(*_decode(KINDS[name]))


@pytest.mark.skipif(primitives() is None, reason=describe_primitives())
@pytest.mark.parametrize("name", KINDS)
def test_decoding_on_a_cpu_has_operations_of_ours_besides(name):
    missing = _missing(*_decode(KINDS[name]))
    assert missing
    assert missing <= FOR_A_CPU


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step_on_metal_has_no_float64(name):
    with on_metal():
        assert not trace(*_train(*RECIPES[name])).unsupported()


@pytest.mark.parametrize("name", KINDS)
def test_decoding_on_metal_has_no_float64(name):
    with on_metal():
        assert not trace(*_decode(KINDS[name])).unsupported()


TABLES = {  # the tables whose gradients MLX adds atomically on a GPU
    "1": ["embedding.weight"],
    "2": ["embedding.weight"],
    "3": ["embedding.weight", "position.weight"],
    "4": ["embedding.weight", "position.weight"],
    "5": ["embedding.weight"],
    # The token shift looks earlier tokens up by itself.
    "6": ["embedding.weight"] * 2 + [f"blocks.{i}.mixer.value_embedding.weight" for i in range(2)],
}
DTYPES = ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("phase", TABLES)
def test_only_the_gradients_of_tables_are_added_atomically(phase, dtype):
    kind, recipe = RECIPES[phase]
    with on_metal():
        found = trace(*_train(kind, replace(recipe, dtype=dtype))).float_scatters()
    parameters = by_path(tiny(kind, n_layers=2).parameters())
    assert sorted(array.shape for array in found) == sorted(parameters[path].shape for path in TABLES[phase])


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_is_added_atomically_in_16_bits(name):
    kind, recipe = RECIPES[name]
    with on_metal():
        found = trace(*_train(kind, replace(recipe, dtype="bfloat16"))).float_scatters()
    assert {array.dtype for array in found} == {mx.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_a_deterministic_step_adds_nothing_atomically(name, dtype):
    kind, recipe = RECIPES[name]
    with on_metal():
        found = trace(*_train(kind, replace(recipe, dtype=dtype), deterministic=True)).float_scatters()
    # The gates of experts scatter their gradients to different experts: nothing is added twice.
    has_experts = isinstance(kind.FFN, type) and issubclass(kind.FFN, MixtureOfExperts)
    assert [array.shape for array in found] == ([(34, 8)] * 2 if has_experts else [])


class _QR(phase1.Model):
    def orthogonal(self, h):
        return h + mx.stop_gradient(mx.linalg.qr(h, stream=mx.cpu)[1].sum())

    def unembed(self, h):
        return super().unembed(self.orthogonal(h))

    def objective(self, h, targets, ctx):
        return super().objective(self.orthogonal(h), targets, ctx)


class _Double(phase1.Model):
    def final(self, h):
        return h.astype(mx.float64, stream=mx.cpu).astype(mx.float32, stream=mx.cpu)

    def unembed(self, h):
        return super().unembed(self.final(h))

    def objective(self, h, targets, ctx):
        return super().objective(self.final(h), targets, ctx)


@pytest.mark.parametrize("make", [_train, _decode])
def test_a_factorization_is_caught(make):
    with on_metal():
        assert "QRF" in trace(*make(_QR)).unsupported()
        assert _missing(*make(_QR)) == {"QRF"}


@pytest.mark.parametrize("make", [_train, _decode])
def test_float64_is_caught(make):
    with on_metal():
        assert "float64 in AsType" in trace(*make(_Double)).unsupported()


def test_the_forms_for_a_cpu_are_not_those_for_metal():
    with on_metal():
        metal = labels(*_decode(phase1.Model)[0](mx.array([V - 1, 1])))
    assert "Softmax" in metal
    assert ("Softmax" in labels(*_decode(phase1.Model)[0](mx.array([V - 1, 1])))) == (mx.default_device() == mx.gpu)
