"""evaluate(): the loss of a model over a text file."""

import math
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_transformer import data
from mlx_transformer.train import trainer
from mlx_transformer.train.evaluate import Evaluator, evaluate
from mlx_transformer.train.trainer import Eval, Limits, RunOptions, fit
from mlx_transformer.utils.errors import BadInput
from phases import phase1

module = sys.modules["mlx_transformer.train.evaluate"]  # the package has a function of this name
STORIES = [f"Tom had {n} apples.\nHe ate {n - 1} of them, and was glad." for n in range(2, 120)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, stories in (("train", STORIES[:100]), ("valid", STORIES[100:])):
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(stories))
    return folder


def load(texts, tokenizer="bpe", vocab_size=300):
    return data.load(texts / "train.txt", valid=texts / "valid.txt", tokenizer=tokenizer, vocab_size=vocab_size)


def make_model(vocab_size, seq_len=16):
    return phase1.Model(
        phase1.Config(vocab_size=vocab_size, d_model=16, n_layers=2, n_heads=2, d_ff=24, seq_len=seq_len)
    )


def test_a_run_s_validation_text_gives_its_validation_loss(texts):
    tokens = load(texts)
    model = make_model(tokens.tokenizer.vocab_size)
    recipe = replace(phase1.RECIPE.at("nano"), batch_tokens=64)
    events = list(fit(model, recipe, tokens, limits=Limits(max_steps=8), options=RunOptions(eval_every=4)))
    best = min(event.valid_loss for event in events if isinstance(event, Eval))
    found = evaluate(model, tokens.tokenizer, texts / "valid.txt")
    assert found.tokens == len(tokens.valid) - 1
    assert found.nats_per_token == pytest.approx(best, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(best), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(best * found.tokens / math.log(2) / tokens.valid_bytes, rel=1e-5)


def test_a_gpu_is_waited_for_once_and_the_result_is_the_same(texts, monkeypatch):
    tokens = load(texts)
    model = make_model(tokens.tokenizer.vocab_size)
    monkeypatch.setattr(module, "_BATCH_TOKENS", {"cpu": 64, "gpu": 64})
    queued, evaluated = [], []
    monkeypatch.setattr(mx, "async_eval", queued.append)
    expected = Evaluator(model, tokens.validation(16, module.batch_tokens()))()
    monkeypatch.setattr(module, "on_gpu", lambda: True)
    evaluator = Evaluator(model, tokens.validation(16, module.batch_tokens()))
    monkeypatch.setattr(mx, "eval", evaluated.append)
    assert evaluator() == expected, "bit for bit"
    assert len(queued) == len(evaluator.batches) > 3
    assert not evaluated


def test_a_gpu_evaluates_larger_batches_and_a_tenth_of_the_time(texts, monkeypatch):
    tokens = load(texts)
    recipe = replace(phase1.RECIPE.at("nano"), batch_tokens=64, eval_tokens=1)
    long = replace(tokens, valid=np.resize(tokens.valid, 100_000))
    found = {}
    for name in ("cpu", "gpu"):
        monkeypatch.setattr(module, "on_gpu", lambda name=name: name == "gpu")
        monkeypatch.setattr(trainer, "on_gpu", module.on_gpu)
        steps = trainer.default_eval_every(recipe, tokens, 16)
        cost = len(tokens.valid) / 3  # of a pass, in tokens of a training step
        found[name] = len(long.validation(16, module.batch_tokens())[0][0]), cost / (cost + 64 * steps)
    assert [size for size, _ in found.values()] == [512, 2048]
    assert 0.2 < found["cpu"][1] <= 0.25
    assert 0.08 < found["gpu"][1] <= 0.1


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(texts, training):
    tokens = load(texts)
    model = make_model(tokens.tokenizer.vocab_size)
    model.train(training)
    before = np.array(model.embedding.weight)
    found = [evaluate(model, tokens.tokenizer, str(texts / "valid.txt")) for _ in range(2)]
    assert found[0] == found[1], "dropout was active"
    assert {part.training for part in model.modules()} == {training}
    np.testing.assert_array_equal(np.array(model.embedding.weight), before)


def test_every_token_is_predicted_once_and_the_context_counted(tmp_path, texts):
    """Against the plain log-probabilities, with a vocabulary that is larger than the tokenizer's."""
    tokenizer = load(texts).tokenizer
    model = make_model(tokenizer.vocab_size + 7, seq_len=8)
    text = "One.\n<|endoftext|>\n\n<|endoftext|>\nTwo, and three.\n"
    (tmp_path / "text.txt").write_text(text)
    ids = [tokenizer.eos_id]
    for document in ("One.", "Two, and three."):
        ids += [*tokenizer.encode(document), tokenizer.eos_id]
    model.eval()
    nats, before = [], []
    for start in range(0, len(ids) - 1, 8):
        inputs, targets = ids[start : start + 8], ids[start + 1 : start + 9]
        logits = np.array(model(mx.array([inputs])))[0].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats += [-logs[i, target] for i, target in enumerate(targets)]
        before += [(i + 1) / 8 for i in range(len(targets))]
    found = evaluate(model, tokenizer, tmp_path / "text.txt")
    assert found.tokens == len(ids) - 1
    assert found.nats_per_token == pytest.approx(np.mean(nats), abs=1e-5)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / len("One.Two, and three."), rel=1e-5)
    assert found.context_used == pytest.approx(np.mean(before))


def test_a_lossy_tokenizer_has_no_bits_per_byte(texts):
    tokens = load(texts, "word", 60)
    assert (
        evaluate(make_model(tokens.tokenizer.vocab_size), tokens.tokenizer, texts / "valid.txt").bits_per_byte is None
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n<|endoftext|>\n", "holds no text"),
        (b"caf\xe9\n", "not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_read_is_bad_input(tmp_path, texts, content, message):
    tokenizer = load(texts).tokenizer
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        evaluate(make_model(tokenizer.vocab_size), tokenizer, tmp_path / "text.txt")
