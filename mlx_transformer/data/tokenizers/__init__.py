"""Tokenizers: text to token ids and back. One interface, four kinds: bpe, word, hf, and symbols for a task."""

from mlx_transformer.data.tokenizers.base import Tokenizer
from mlx_transformer.data.tokenizers.bpe import BPETokenizer
from mlx_transformer.data.tokenizers.huggingface import HFTokenizer
from mlx_transformer.data.tokenizers.loading import load_tokenizer
from mlx_transformer.data.tokenizers.split import split_words
from mlx_transformer.data.tokenizers.symbols import SymbolTokenizer
from mlx_transformer.data.tokenizers.training import DEFAULT_VOCAB_SIZE, train_tokenizer
from mlx_transformer.data.tokenizers.word import WordTokenizer

__all__ = [
    "DEFAULT_VOCAB_SIZE",
    "BPETokenizer",
    "HFTokenizer",
    "SymbolTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "load_tokenizer",
    "split_words",
    "train_tokenizer",
]
