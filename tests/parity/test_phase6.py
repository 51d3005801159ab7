"""Muon against PyTorch's own and against the reference's, and squared ReLU against that of transformers."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_transformer import ops
from mlx_transformer.train.optim.groups import AdamW, Group, Optimizers, Paths
from mlx_transformer.train.optim.muon import Muon, orthogonal_each
from mlx_transformer.utils.trees import by_path
from phases import phase6
from tests.ladder import TINY, V, tiny, tokens

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
from bench.reference.phase6 import Model, MuonAndAdamW, Training, orthogonalised, rules  # noqa: E402

SHAPES = ((24, 16), (16, 24), (16, 24), (12, 12))
RATE, DECAY, STEPS = 0.02, 0.1, 5


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ours(rule, lr_multiplier=1.0):
    """The weights after STEPS steps."""
    weights = {str(i): mx.array(normal(shape, i)) for i, shape in enumerate(SHAPES)}
    optimizers = Optimizers(
        [Group(name="all", select=Paths(".*"), optimizer=rule, lr_multiplier=lr_multiplier)], weights
    )
    for step in range(STEPS):
        optimizers.advance(mx.array(RATE))
        gradients = {str(i): mx.array(normal(shape, (step, i))) for i, shape in enumerate(SHAPES)}
        weights = optimizers.update(gradients, weights)
    return [np.array(w) for w in weights.values()]


def theirs(make, rate=1.0):
    """The same steps by an optimizer of PyTorch's."""
    weights = [torch.nn.Parameter(torch.from_numpy(normal(shape, i))) for i, shape in enumerate(SHAPES)]
    optimizer = make(weights)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate
        for i, w in enumerate(weights):
            w.grad = torch.from_numpy(normal(w.shape, (step, i)))
        optimizer.step()
    return [w.detach().numpy() for w in weights]


def agree(own, expected, atol):
    for a, b in zip(own, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_muon_is_pytorch_s_up_to_its_bfloat16():
    """PyTorch orthogonalizes in bfloat16, whose rounding is 0.4 %, and has no warm-up of the momentum."""
    expected = theirs(lambda weights: torch.optim.Muon(weights, lr=RATE, weight_decay=DECAY, momentum=0.95))
    agree(ours(Muon(first_momentum=0.95, weight_decay=DECAY)), expected, atol=STEPS * RATE * 0.02)
    still = ours(Muon(first_momentum=0.95, weight_decay=0.0))
    assert max(np.abs(a - b).max() for a, b in zip(still, expected, strict=True)) > STEPS * RATE * 0.05


def test_muon_is_the_reference_s():
    rule = Muon(weight_decay=DECAY, warmup_steps=3)
    numbers = {name: getattr(rule, name) for name in ("momentum", "first_momentum", "warmup_steps", "iterations")}

    def make(weights):
        rows = [[len(w)] for w in weights]
        return MuonAndAdamW([{"params": weights, "rows": rows, "weight_decay": DECAY, **numbers}])

    agree(ours(rule, lr_multiplier=0.5), theirs(make, rate=0.5), atol=1e-5)


def test_the_reference_s_state_is_saved_and_restored():
    """As bench/reference/train.py does it: by number, through arrays."""
    model = phase6.Model(phase6.Config(**TINY))
    weights = {path: np.array(w) for path, w in by_path(model.parameters()).items()}

    def make():
        theirs = Model(**model.config.to_dict())
        theirs.load(weights)
        return Training(theirs.train(), **rules(phase6.RECIPE.at("nano").to_dict()))

    whole, first, second = make(), make(), make()
    batches = [np.array(tokens(2, 18, seed=seed)) for seed in range(4)]
    expected = [whole.step(batch) for batch in batches]
    assert [first.step(batch) for batch in batches[:2]] == expected[:2]
    state = first.optimizer.state_dict()["state"]
    copied = {i: {name: value.clone() for name, value in values.items()} for i, values in state.items()}
    groups = second.optimizer.state_dict()["param_groups"]
    second.optimizer.load_state_dict({"state": copied, "param_groups": groups})
    second.model.load_state_dict(first.model.state_dict())
    second.tokens = first.tokens
    assert [second.step(batch) for batch in batches[2:]] == expected[2:]


def test_the_other_groups_of_the_reference_are_adamw_s():
    rule = AdamW(betas=(0.8, 0.95), eps=1e-10, weight_decay=DECAY)
    numbers = {"betas": rule.betas, "eps": rule.eps, "weight_decay": DECAY}
    agree(
        ours(rule, lr_multiplier=0.5), theirs(lambda w: MuonAndAdamW([{"params": w, **numbers}]), rate=0.5), atol=1e-5
    )


def test_maps_packed_in_one_matrix_are_orthogonalized_separately():
    parts = [normal((size, 16), size) for size in (16, 8, 8)]
    expected = orthogonal_each({str(i): mx.array(part) for i, part in enumerate(parts)}, 5)
    found = orthogonalised([torch.from_numpy(part) for part in parts], 5)
    agree([u.numpy() for u in found], [np.array(u) for u in expected.values()], atol=1e-5)


def test_squared_relu_is_transformers_s():
    activations = pytest.importorskip("transformers.activations")
    x = normal((50,), 0) * 3
    expected = activations.ACT2FN["relu2"](torch.from_numpy(x))
    np.testing.assert_allclose(ops.relu_squared(mx.array(x)), expected, rtol=1e-6)


def training_of(model):
    theirs = Model(**model.config.to_dict())
    theirs.load({path: np.array(w) for path, w in by_path(model.parameters()).items()})
    return Training(theirs.train(), **rules(phase6.RECIPE.at("nano").to_dict()))


def test_the_loss_over_a_sample_is_the_reference_s(monkeypatch):
    net, batch = tiny(phase6.Model), tokens(3, 18)
    sample, log_q = mx.array([*range(3, 60)]), mx.log(mx.linspace(0.2, 1, 57))
    monkeypatch.setattr(type(net), "sample_size", lambda self, n_targets: 57)
    monkeypatch.setattr(type(net), "draw", lambda self, targets, n: (sample, log_q))
    (loss, _), gradients = nn.value_and_grad(net, net.loss)(batch)
    training = training_of(net)
    sequences = torch.from_numpy(np.array(batch)).long()
    h = training.model.hidden(sequences[:, :-1]).flatten(0, 1)
    ids, logs = torch.from_numpy(np.array(sample)).long(), torch.from_numpy(np.array(log_q))
    expected = training.sampled(h, sequences[:, 1:].flatten(), ids, logs)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    slopes = training.model.by_our_path(lambda parameter: parameter.grad)
    for path, gradient in by_path(gradients).items():
        np.testing.assert_allclose(np.array(gradient), slopes[path], atol=1e-5, err_msg=path)


def test_a_sample_of_the_reference_is_as_large_as_ours_and_right_on_average():
    net = phase6.Model(phase6.Config(**TINY | {"vocab_size": 4096}))
    training = training_of(net)
    assert training.sample_size(1024) == net.sample_size(1024) == 1043
    assert training.sample_size(10**6) == net.sample_size(10**6) == 4096
    text = np.random.default_rng(0).geometric(0.02, 20_000) % 4096
    training.prepare(text)
    net.prepare(text, 0)
    np.testing.assert_allclose(training.frequency, net._frequency, rtol=1e-5)
    training, targets = training_of(tiny(phase6.Model)), torch.arange(24)
    torch.manual_seed(0)
    included = torch.zeros(V)
    for _ in range(3000):
        targets = torch.multinomial(training.frequency, 24, replacement=True)
        sample, log_q = training.draw(targets, 32)
        assert set(targets.tolist()) <= set(sample.tolist())
        included[sample] += torch.exp(-log_q)
    np.testing.assert_allclose(included / 3000, 1, atol=0.2)


def test_a_training_step_of_the_reference_samples():
    net = phase6.Model(phase6.Config(**TINY | {"vocab_size": 4096}))
    first, second = training_of(net), training_of(net)
    second.model.sample_ratio = 0.0
    batch = np.array(tokens(2, 18))
    torch.manual_seed(0)
    full, own = second.step(batch), first.step(batch)
    assert full == pytest.approx(np.log(4096), abs=1e-4)
    assert abs(own - full) > 1e-3
