"""Scores of tasks, and the calculator that answers while a model decodes."""

import itertools

import numpy as np
import pytest

from mlx_transformer.data.tasks import TASKS
from mlx_transformer.data.tokenizers import WordTokenizer
from mlx_transformer.data.tokenizers.training import task_tokenizer
from mlx_transformer.generate import Decoder, Scorer, generate, score
from mlx_transformer.generate.tools import runtime
from mlx_transformer.utils.errors import BadInput
from tests.ladder import modules


def small(name, phase=5):
    """A tiny random model with a task's vocabulary."""
    kind = modules()[phase].Model
    numbers = {"d_model": 32, "n_layers": 1, "n_heads": 4, "d_ff": 48, "seq_len": 64, "dropout": 0.0}
    model = kind(kind.Config(vocab_size=task_tokenizer(name).vocab_size, **numbers))
    model.eval()
    return model


class Answering:
    """A decoder that writes the right answer of every example but each third, whose last word but one it drops."""

    def __init__(self, examples, tokenizer):
        self.by_prompt = {each.prompt: each.rest for each in examples}
        self.tokenizer = tokenizer

    def __call__(self, prompts, count, respond=None):
        rows = []
        for i, prompt in enumerate(prompts):
            words = tuple(self.tokenizer.token(token) for token in prompt[1:])
            rest = self.by_prompt[words]
            rest = rest if i % 3 else (*rest[:-2], rest[-1])
            rows.append(self.tokenizer.encode(" ".join(rest)) + [self.tokenizer.eos_id] * (count - len(rest)))
        yield from map(list, zip(*rows, strict=True))


@pytest.mark.parametrize("name", ["copying", "sums", "sums_steps"])
def test_right_answers_count_and_wrong_ones_do_not(name):
    task, tokenizer = TASKS[name], task_tokenizer(name)
    scorer = Scorer(task, tokenizer, examples=12)
    for _, examples in scorer.examples:
        right = scorer._decoded(Answering(examples, tokenizer), examples)
        assert right == [i % 3 > 0 for i in range(12)]


def test_answers_that_are_read_off_are_those_that_decoding_writes():
    task, tokenizer, model = TASKS["recall"], task_tokenizer("recall"), small("recall")
    scorer, decoder = Scorer(task, tokenizer, examples=6), Decoder(model)
    _, examples = scorer.examples[1]
    right = iter(scorer._read_off(decoder, examples))
    for each in examples:
        ids = [tokenizer.eos_id, *tokenizer.encode(" ".join(each.words))]
        for i, scored in enumerate(each.scored):
            if scored:
                (written,) = next(iter(decoder([ids[: i + 1]], 1)))
                assert next(right) == (written == ids[i + 1])


def test_the_score_of_a_random_model_has_every_level_with_its_bounds():
    model = small("regression")
    model.train()
    found = score(model, task_tokenizer("regression"), "task:regression", examples=20)
    assert model.training
    assert [level.level for level in found.levels] == [level.name for level in TASKS["regression"].levels]
    trained = [level for level in found.levels if level.trained]
    assert found.accuracy == pytest.approx(np.mean([level.accuracy for level in trained]))
    assert all(level.answers == 20 and 0 < level.floor < level.ceiling for level in found.levels)
    assert all(0 < level.references["least_squares"] <= 1 for level in found.levels)
    assert len(Scorer(TASKS["recall"], task_tokenizer("recall"), examples=2, trained_only=True).examples) == 5


def test_another_tokenizer_and_too_many_examples_are_refused():
    with pytest.raises(BadInput, match=r"task:recall scores models that were trained on it; this one .* on task:sums"):
        score(small("sums"), task_tokenizer("sums"), "recall")
    with pytest.raises(BadInput, match="this one was trained on a text"):
        Scorer(TASKS["recall"], WordTokenizer(["a"]))
    with pytest.raises(BadInput, match="examples = 251: expected 1 to 250"):
        Scorer(TASKS["sums"], task_tokenizer("sums"), examples=251)


def test_the_runtime_answers_a_call_and_the_model_continues_after_its_result():
    """The result stands in the cache as if it had been in the prompt; sequences without a call are left alone."""
    tokenizer, model = task_tokenizer("calculator"), small("calculator")
    calls = ["ann has 1 2 ( 1 2 + 3 =", "ann has 7 ( 7 - 9 9 =", "ann has 1 2 nuts . ben has"]
    results = ["1 5 )", "- 9 2 )", ""]
    prompts = [[tokenizer.eos_id, *tokenizer.encode(call)] for call in calls]
    drawn = itertools.islice(Decoder(model)(prompts, 12, respond=runtime(tokenizer, prompts)), 12)
    written = np.array(list(drawn)).T.tolist()
    for prompt, result, own in zip(prompts, results, written, strict=True):
        answer = tokenizer.encode(result)
        assert own[: len(answer)] == answer
        rest = [tokens[0] for tokens in Decoder(model)([prompt + answer], 1)]
        assert own[len(answer)] == rest[0]


def test_generate_answers_calls_too():
    tokenizer, model = task_tokenizer("calculator"), small("calculator")
    (completion,) = generate(model, tokenizer, "ann has 4 0 ( 4 0 + 2 =", max_tokens=3, temperature=0)
    assert completion.continuation.split() == ["4", "2", ")"]
    (text,) = ["".join(generate(model, tokenizer, "ben has 4 ( 4 + 4 =", max_tokens=2, temperature=0, stream=True))]
    assert text.split() == ["8", ")"]


def test_a_call_that_the_model_writes_is_answered_token_by_token():
    tokenizer = task_tokenizer("calculator")
    respond = runtime(tokenizer, [[0], [0]])
    assert respond is not None
    sampled = ["(", "1", "2", "+", "9", "=", "ann", "ben", "cora", "has"]
    written = [respond([tokenizer.encode(word)[0], 0]) for word in sampled]
    assert tokenizer.decode([first for first, _ in written]) == "( 1 2 + 9 = 2 1 ) has"
    assert [second for _, second in written] == [0] * 10
