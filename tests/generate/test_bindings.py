"""The words that fables determine: where they are among the tokens, and what a model is told to be right in."""

import mlx.core as mx
import pytest

from mlx_transformer.data.fables import GROUPS, generate
from mlx_transformer.data.tokenizers.bpe import train_bpe
from mlx_transformer.generate.bindings import Bindings
from tests.ladder import modules

TEXTS = [generate(seed).text for seed in range(60)]


@pytest.fixture(scope="module", params=[400, 2000])
def tokenizer(request):
    """One that splits names into several tokens, and one that has most words whole."""
    return train_bpe(TEXTS, request.param)[0]


class Told:
    """A model whose logits are `sign` for the token that follows in the story, and 0 for every other one."""

    training = True

    def __init__(self, bindings, vocab_size, sign, seq_len):
        self.rows = {tuple(tokens[i : i + seq_len + 1]) for tokens, _ in bindings.stories for i in range(len(tokens))}
        self.config = type("Config", (), {"seq_len": seq_len})
        self.vocab_size, self.sign, self.modes = vocab_size, sign, []

    def eval(self):
        self.modes.append("eval")

    def train(self, mode):
        self.modes.append(mode)

    def __call__(self, tokens):
        after = {row[:-1]: row[-1] for row in self.rows}
        last = [after.get(tuple(row), 0) for row in tokens.tolist()]
        following = mx.concatenate([tokens[:, 1:], mx.array(last)[:, None]], axis=1)
        return self.sign * mx.eye(self.vocab_size)[following]


@pytest.mark.parametrize("seq_len", [32, 100, 1000])
def test_what_the_story_says_is_right(tokenizer, seq_len):
    bindings = Bindings(TEXTS, tokenizer)
    for sign, right in ((1, 1.0), (-1, 0.0)):
        model = Told(bindings, tokenizer.vocab_size, sign, seq_len)
        found = bindings(model)
        assert model.modes == ["eval", True]
        assert list(found) == list(GROUPS)
        assert {one["right"] for one in found.values()} == {right}
    assert sum(one["words"] for one in found.values()) == sum(len(places) for _, places in bindings.stories)
    assert 0.3 < found["pronouns"]["chance"] <= 0.5
    assert found["names"]["chance"] < 0.2


def test_a_place_is_where_the_word_is(tokenizer):
    for tokens, places in Bindings(TEXTS[:10], tokenizer).stories:
        for place in places:
            assert tokens[place.at] == place.right
            assert place.right not in place.rivals


def test_a_random_model_guesses(tokenizer):
    kind = modules()[5].Model
    numbers = {"d_model": 32, "n_layers": 1, "n_heads": 4, "d_ff": 48, "seq_len": 64, "dropout": 0.5}
    model = kind(kind.Config(vocab_size=tokenizer.vocab_size, **numbers))
    bindings = Bindings(TEXTS, tokenizer)
    found = bindings(model)
    assert found == bindings(model), "without dropout"
    assert model.training
    assert found["names"]["right"] < 0.3


def test_what_is_no_fable_has_no_words(tokenizer):
    bindings = Bindings(["", "A cat sat.", TEXTS[0] + "x"], tokenizer)
    assert bindings(Told(bindings, tokenizer.vocab_size, 1, 64)) == {}
