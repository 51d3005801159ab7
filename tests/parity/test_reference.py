"""Every phase and branch with a PyTorch reference, against it: logits, gradients, fifty steps, greedy decoding."""

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_transformer.backend import divided_blas
from mlx_transformer.generate.decoding import decode
from mlx_transformer.nn.config import SIZES
from mlx_transformer.run.ladder import find_branch
from mlx_transformer.train.optim.groups import assign
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.trees import by_path
from tests.ladder import PHASES, TINY, V, modules, tiny, tokens

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
from bench.reference import find  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
PRESENT = [n for n in PHASES if (ROOT / "bench" / "reference" / f"phase{n}.py").is_file()]


@dataclass(frozen=True)
class Reference:
    """A phase or a branch, and its reference in PyTorch."""

    n: int
    branch: str | None

    @property
    def ours(self):
        return find_branch(modules()[self.n], self.branch)

    @property
    def module(self):
        return find(self.n, self.branch)[0]

    @property
    def recipe(self):
        return modules()[self.n].RECIPE.at("nano")

    def model(self, ours, **numbers):
        """Return the reference with our model's weights."""
        theirs = find(self.n, self.branch)[1](**{**ours.config.to_dict(), **numbers})
        theirs.load(arrays(ours))
        return theirs.eval()

    def __str__(self):
        return f"{self.n}/{self.branch}" if self.branch else str(self.n)


REFERENCES = [Reference(n, branch) for n in PRESENT for branch in (None, *getattr(find(n)[0], "BRANCHES", {}))]
everywhere = pytest.mark.parametrize("reference", REFERENCES, ids=str)


@pytest.fixture(autouse=True)
def _one_thread():
    """At these sizes, several threads of a busy machine wait for each other for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arrays(model):
    return {path: np.array(value) for path, value in by_path(model.parameters()).items()}


def long(x):
    return torch.from_numpy(np.array(x)).long()


@pytest.fixture(params=REFERENCES, ids=str)
def pair(request):
    ours = tiny(request.param.ours)
    return request.param, ours, request.param.model(ours)


def test_logits_agree(pair):
    _, ours, theirs = pair
    x = tokens(4)
    with torch.no_grad():
        np.testing.assert_allclose(np.array(ours(x)), theirs(long(x)).numpy(), atol=1e-4)


def test_every_gradient_agrees(pair):
    _, ours, theirs = pair
    batch = tokens(4, 18)
    (loss, _), gradients = nn.value_and_grad(ours, ours.loss)(batch)
    expected = theirs.loss(long(batch)[:, :-1], long(batch)[:, 1:])
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    slopes = theirs.by_our_path(lambda parameter: parameter.grad)
    own = {path: torch.from_numpy(np.array(value)) for path, value in by_path(gradients).items()}
    assert own.keys() == slopes.keys()
    scale = max(slope.abs().max().item() for slope in slopes.values())
    for path, slope in slopes.items():
        # The gradient of a bias of the keys is only rounding: hence the small share of the largest gradient.
        bound = 1e-3 * slope.abs().max().item() + 1e-6 * scale
        assert (own[path] - slope).abs().max().item() <= bound, path


@everywhere
def test_fifty_steps_of_training_agree(reference):
    """At nano with a small batch; the warm-up ends within, and the first gradients are clipped."""
    ours = reference.ours(reference.ours.Config(**SIZES["nano"], dropout=0.0))
    schedule = replace(reference.recipe.schedule, warmup_tokens=5_000)
    recipe = replace(reference.recipe, learning_rate=3e-4, schedule=schedule)
    theirs = reference.model(ours).train()
    training = reference.module.Training(theirs, **reference.module.rules(recipe.to_dict()))
    take_step = TrainingStep(ours, recipe)
    shares = 1 / np.arange(1, SIZES["nano"]["vocab_size"] + 1)
    draw = np.random.default_rng(0)
    losses = []
    with divided_blas():
        for i in range(50):
            batch = draw.choice(len(shares), (4, 65), p=shares / shares.sum()).astype(np.int32)
            rate = recipe.learning_rate * recipe.schedule((i + 1) * 4 * 64)
            metrics, _ = take_step(mx.array(batch), rate)
            mx.eval(metrics, take_step.state)
            losses.append((metrics["loss"].item(), training.step(batch)))
    own, expected = np.array(losses).T
    np.testing.assert_allclose(own, expected, atol=1e-3)
    assert own[-5:].mean() < own[:5].mean() - 0.1, "the loss hardly fell, so nothing was compared"
    bound = 50 * 3e-4 * max(group.lr_multiplier for group in recipe.groups)
    for path, value in theirs.by_our_path().items():
        apart = np.abs(arrays(ours)[path] - value.numpy()).max()
        assert apart <= bound, path


@everywhere
def test_the_groups_own_the_same_parameters(reference):
    ours = tiny(reference.ours)
    theirs = reference.model(ours)
    training = reference.module.Training(theirs, **reference.module.rules(reference.recipe.to_dict()))
    number = {p: i for i, group in enumerate(training.optimizer.param_groups) for p in group["params"]}
    owned = assign(reference.recipe.groups, by_path(ours.parameters()))
    expected = {path: i for i, paths in enumerate(owned.values()) for path in paths}
    found = theirs.by_our_path(lambda parameter: torch.full_like(parameter, number[parameter]))
    assert {path: set(value.flatten().tolist()) for path, value in found.items()} == {
        path: {i} for path, i in expected.items()
    }


@everywhere
def test_a_different_learning_rate_is_detected(reference):
    """The comparison above can fail: a learning rate 10 % higher changes the losses by more than its tolerance."""
    schedule = replace(reference.recipe.schedule, warmup_tokens=500)
    rules = reference.module.rules(replace(reference.recipe, schedule=schedule).to_dict())
    ours = tiny(reference.ours)
    batch = np.array(tokens(4, 18))
    last = []
    for rate in (3e-4, 3.3e-4):
        training = reference.module.Training(reference.model(ours).train(), **{**rules, "learning_rate": rate})
        last.append([training.step(batch) for _ in range(50)][-1])
    assert abs(last[0] - last[1]) > 1e-3


def test_greedy_decoding_agrees(pair):
    reference, ours, _ = pair
    prompts = np.array(tokens(3, 5))
    theirs = reference.model(ours, seq_len=5 + 9)
    expected = reference.module.Decoder(theirs)(torch.from_numpy(prompts).long(), 9)
    assert np.array(list(decode(ours, prompts.tolist(), 9))).T.tolist() == expected.tolist()
    whole = torch.cat([torch.from_numpy(prompts).long(), expected], dim=1)
    with torch.no_grad():  # the cache against the forward pass without one
        assert theirs(whole[:, :-1])[:, 4:].argmax(-1).tolist() == expected.tolist()


@everywhere
def test_weights_that_do_not_fit_are_refused(reference):
    ours = tiny(reference.ours)
    model, named = reference.model(ours), arrays(ours)
    with pytest.raises(ValueError, match="unknown"):
        model.load({**named, "unknown": np.zeros(1)})
    with pytest.raises(ValueError, match="should be"):
        model.load({**named, "embedding.weight": np.zeros((V, TINY["d_model"] + 1))})


@pytest.mark.parametrize("n", PRESENT)
def test_an_unknown_rule_is_refused(n):
    recipe = modules()[n].RECIPE.at("nano").to_dict()
    with pytest.raises(ValueError, match="Surprise"):
        find(n)[0].rules({**recipe, "clip": {"kind": "Surprise"}})


@pytest.mark.parametrize(
    ("device", "options", "backend"),
    [("mps", {"dynamic": True}, "aot_eager"), ("mps", {}, "inductor"), ("cpu", {"dynamic": True}, "inductor")],
)
def test_shapes_that_change_are_not_compiled_for_an_apple_gpu(monkeypatch, device, options, backend):
    chosen = {}
    monkeypatch.setattr(torch, "compile", lambda function, **own: chosen.update(own) or function)
    find(1)[0].compile_for(torch.device(device), lambda x: x, **options)
    assert chosen == {"backend": backend, **options}
