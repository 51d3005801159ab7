"""Data: a corpus is loaded, a tokenizer learned from it, both make token files, and those are drawn in batches."""

from mlx_transformer.data.corpus import Corpus, load_corpus, read_documents
from mlx_transformer.data.stream import Batches, Prefetch, validation_rows
from mlx_transformer.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mlx_transformer.data.tokens import Tokens, tokenize_corpus

__all__ = [
    "Batches",
    "Corpus",
    "Prefetch",
    "Tokenizer",
    "Tokens",
    "load_corpus",
    "load_tokenizer",
    "read_documents",
    "tokenize_corpus",
    "train_tokenizer",
    "validation_rows",
]
