"""`mt.data.load`: from a source to token ids that `fit` trains on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_transformer.data import Tokens, load, load_corpus, load_tokenizer, tokenize_corpus, train_tokenizer
from mlx_transformer.train.trainer import Eval, Limits, fit
from mlx_transformer.utils.errors import BadInput
from phases import phase5

pytestmark = pytest.mark.usefixtures("cache")
TEXT = "".join(f"The cat number {i} sat on mat {i % 7}, and slept.\n<|endoftext|>\n" for i in range(200))


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def same(a: Tokens, b: Tokens) -> bool:
    return np.array_equal(a.train, b.train) and np.array_equal(a.valid, b.valid) and a.train.dtype == b.train.dtype


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_a_text_gives_the_same_tokens_as_the_command_line(text, kind):
    data = load(text, tokenizer=kind, vocab_size=290, stories=100) if kind == "bpe" else load(text, tokenizer=kind)
    corpus = load_corpus(str(text), None, 100 if kind == "bpe" else None)
    tokenizer = train_tokenizer(kind, corpus, 290 if kind == "bpe" else None)
    assert data.tokenizer is not None
    assert data.tokenizer.sha256 == tokenizer.sha256
    assert same(data, tokenize_corpus(corpus, tokenizer))
    assert data.tokenizer.vocab_size == (290 if kind == "bpe" else data.train.max() + 1)


def test_a_tokenizer_may_be_passed(text, tmp_path):
    first = load(str(text), vocab_size=300)
    assert first.tokenizer is not None
    (tmp_path / "valid.txt").write_text(TEXT[:1000])
    data = load(text, tokenizer=first.tokenizer, valid=tmp_path / "valid.txt", vocab_size=300)
    assert data.tokenizer is first.tokenizer
    assert data.valid_documents == TEXT[:1000].count("<|endoftext|>") + 1
    with pytest.raises(BadInput, match="vocab_size 301 does not fit the tokenizer, which has 300 tokens"):
        load(text, tokenizer=first.tokenizer, vocab_size=301)


def test_a_tokenizer_json_may_be_named(text, tmp_path):
    library = pytest.importorskip("tokenizers")
    vocabulary = {"</s>": 0, "?": 1, "cat": 2, "mat": 3}
    made = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    data = load(text, tokenizer=tmp_path / "tokenizer.json")
    assert data.tokenizer is not None
    assert (data.tokenizer.kind, data.tokenizer.vocab_size, data.eos_id) == ("hf", 4, 0)
    data.tokenizer.save(tmp_path / "cache")
    assert load_tokenizer(tmp_path / "cache").sha256 == data.tokenizer.sha256


@pytest.mark.parametrize("source", ["nowhere.txt", Path("nowhere.txt")])
def test_a_missing_text_is_one_sentence(source):
    with pytest.raises(BadInput, match=r"nowhere\.txt does not exist"):
        load(source)


def test_fit_trains_on_fables_from_python():
    data = load("fables", vocab_size=512, stories=300)
    assert data.tokenizer is not None
    assert data.floor_bits
    config = phase5.Config(d_model=16, n_layers=1, n_heads=2, d_ff=32, seq_len=32, vocab_size=data.tokenizer.vocab_size)
    recipe = replace(phase5.RECIPE.at("nano"), batch_tokens=512)
    events = fit(phase5.Model(config, 0), recipe, data, limits=Limits(max_steps=40))
    losses = [event.valid_loss for event in events if isinstance(event, Eval)]
    assert losses[-1] < np.log(512)
