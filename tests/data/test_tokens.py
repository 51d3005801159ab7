"""Token files: what is in them, how the validation split is capped, and that they are whole or not there."""

import re
from pathlib import Path

import numpy as np
import pytest

from mlx_transformer.data import documents as reading
from mlx_transformer.data import tokens as module
from mlx_transformer.data.corpus import Corpus, load_corpus
from mlx_transformer.data.documents import read_documents
from mlx_transformer.data.tokenizers import HFTokenizer, Tokenizer, WordTokenizer, train_tokenizer
from mlx_transformer.data.tokens import Tokens, tokenize_corpus

pytestmark = pytest.mark.usefixtures("cache")
TEXTS = [f"Story {i}: the cat\nsat on the “mat” {i % 7} times. " + "It slept. " * (i % 5) for i in range(200)]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return corpus_of(tmp_path, TEXTS)


def corpus_of(folder: Path, texts: list[str]) -> Corpus:
    (folder / "text.txt").write_text("".join(f"{text}\n<|endoftext|>\n" for text in texts))
    return load_corpus(str(folder / "text.txt"), say=lambda line: None)


@pytest.fixture
def bpe(corpus) -> Tokenizer:
    return train_tokenizer("bpe", corpus, 330, explicit=False)


def framed(tokenizer: Tokenizer, documents: list[str]) -> list[int]:
    ids = [tokenizer.eos_id]
    for document in documents:
        ids += [*tokenizer.encode(document), tokenizer.eos_id]
    return ids


def test_bos_follows_eos(tmp_path):
    """In front of each document, of one that is read in parts too."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"</s>": 0, "<s>": 1, "cat": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.post_processor = library.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = tokenize(corpus_of(tmp_path, ["cat " * i + "?" for i in range(40)]), HFTokenizer(made.to_str().encode()))
    for ids in (tokens.train.tolist(), tokens.valid.tolist()):
        first, *documents, last = "".join(map(str, ids)).split("0")
        assert (first, last) == ("", "")
        assert all(re.fullmatch("12*3", document) for document in documents)
    assert tokens.unknown_rate == tokens.valid_documents / np.isin(tokens.valid, (2, 3)).sum()


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    return tokenize_corpus(corpus, tokenizer, say=lambda line: None)


def test_eos_separates_documents(corpus, bpe):
    tokens = tokenize(corpus, bpe)
    assert isinstance(tokens.train, np.memmap)
    assert tokens.train.dtype == tokens.valid.dtype == np.uint16
    assert tokens.train.tolist() == framed(bpe, list(read_documents(corpus.train)))
    assert tokens.valid.tolist() == framed(bpe, list(read_documents(corpus.valid)))
    assert (tokens.valid_bytes, tokens.valid_documents) == (corpus.valid_bytes, 10)
    assert (tokens.unknown_rate, tokens.lossless, tokens.eos_id) == (0.0, True, bpe.eos_id)


@pytest.mark.parametrize(("segment", "batch"), [(40, 1 << 20), (1 << 20, 100), (40, 100)])
def test_the_tokens_do_not_depend_on_how_the_text_is_streamed(corpus, bpe, monkeypatch, segment, batch, tmp_path):
    wanted = tokenize(corpus, bpe)
    monkeypatch.setattr(reading, "SEGMENT", segment)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", batch)
    monkeypatch.setenv("MLX_TRANSFORMER_CACHE", str(tmp_path / "another"))
    streamed = tokenize(corpus, bpe)
    assert streamed.train.tolist() == wanted.train.tolist()
    assert bpe.decode(streamed.train.tolist()) == "".join(read_documents(corpus.train))


def test_more_than_65535_tokens_take_four_bytes(corpus):
    words = WordTokenizer([f"w{i}" for i in range(65_532)])
    assert words.vocab_size == 65_536
    assert tokenize(corpus, words).train.dtype == np.uint32
    assert tokenize(corpus, WordTokenizer([f"w{i}" for i in range(65_531)])).train.dtype == np.uint16


def test_the_validation_split_is_capped_at_whole_documents(corpus, bpe, monkeypatch):
    documents = list(read_documents(corpus.valid))
    three = framed(bpe, documents[:3])
    for spare in (0, 1):
        monkeypatch.setattr(module, "MAX_VALID_TOKENS", len(three) + spare)
        messages: list[str] = []
        tokens = tokenize_corpus(corpus, bpe, messages.append)
        assert tokens.valid.tolist() == three
        assert tokens.valid_documents == 3
        assert tokens.valid_bytes == sum(len(text.encode()) for text in documents[:3])
        assert tokens.floor_bits is None
        assert "first" in messages[0]


@pytest.mark.parametrize("last", ["line of words\n" * 300 + "end", "words without an end " * 300, "“x”" * 2000])
def test_one_long_validation_document_is_cut_at_a_line_or_a_character(tmp_path, monkeypatch, last):
    corpus = corpus_of(tmp_path, [*TEXTS, last])
    (tmp_path / "valid.txt").write_text(last)
    corpus = load_corpus(str(tmp_path / "text.txt"), str(tmp_path / "valid.txt"), say=lambda line: None)
    bpe = train_tokenizer("bpe", corpus, 330, explicit=False)
    monkeypatch.setattr(module, "MAX_VALID_TOKENS", 501)
    monkeypatch.setattr(reading, "SEGMENT", 1000)
    tokens = tokenize(corpus, bpe)
    assert 480 < len(tokens.valid) <= 501
    kept = bpe.decode(tokens.valid.tolist())
    assert last.startswith(kept)
    assert kept.endswith("\n") or "\n" not in last
    assert tokens.valid_bytes == len(kept.encode())
    assert tokens.lossless
    assert (tokens.valid[0], tokens.valid[-1]) == (bpe.eos_id, bpe.eos_id)


@pytest.mark.parametrize(("words", "said"), [(1, "2 tokens"), (4094, "4,095 tokens"), (4095, None)])
def test_a_short_validation_text_is_noisy(corpus, tmp_path, words, said):
    (tmp_path / "valid.txt").write_text("cat " * words)
    corpus = load_corpus(str(tmp_path / "text.txt"), str(tmp_path / "valid.txt"), say=lambda line: None)
    messages: list[str] = []
    tokenize_corpus(corpus, WordTokenizer(["cat"]), messages.append)
    assert [line for line in messages if "noisy" in line] == messages
    assert messages == [] if said is None else f"has only {said}," in messages[0]


def test_a_floor_is_kept_where_nothing_was_cut(corpus, bpe):
    from dataclasses import replace

    assert tokenize(replace(corpus, floor_bits=12.5), bpe).floor_bits == 12.5


def test_word_level_reports_what_it_does_not_know(corpus):
    words = train_tokenizer("word", corpus, 20)
    tokens = tokenize(corpus, words)
    inner = [token for token in tokens.valid.tolist() if token != words.eos_id]
    assert tokens.unknown_rate == pytest.approx(inner.count(words.unk_id) / len(inner))
    assert 0.05 < tokens.unknown_rate < 0.6
    assert not tokens.lossless


def test_files_are_cached_and_made_again_when_damaged(corpus, bpe, cache, monkeypatch):
    first = tokenize(corpus, bpe).train.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_train", None)
        assert tokenize(corpus, bpe).train.tolist() == first
    (file,) = (cache / "tokens").glob("*/train.bin")
    file.write_bytes(b"\0\0")
    assert tokenize(corpus, bpe).train.tolist() == first


def test_a_run_that_is_cut_off_leaves_nothing(corpus, bpe, cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "encode_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(corpus, bpe)
    assert list((cache / "tokens").iterdir()) == []
