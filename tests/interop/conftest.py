"""Fixtures of the tests of Hugging Face's formats: no network, a text and a tokenizer of ours."""

import socket

import pytest

from mlx_transformer.data.corpus import load_corpus
from mlx_transformer.data.tokenizers import train_tokenizer


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def connect(*_):
        raise AssertionError("nothing here may ask the network")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="module")
def bpe(text, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_TRANSFORMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        return train_tokenizer("bpe", load_corpus(str(text), say=lambda line: None), 290)
