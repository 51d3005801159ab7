"""Corpora, tokenizers and token files: from a text to batches of tokens.

    sources    open_source      text, .jsonl, .csv, .gz, a folder, a data set of the hub -> documents
    corpus     load_corpus      documents -> train.txt and valid.txt: UTF-8, one separator line after each document
    tokenizer  train_tokenizer  learn a vocabulary from train.txt (BPE or words), or read a Hugging Face tokenizer.json
    tasks      TASKS            generated texts with exact scores, for task:NAME
    tokens     tokenize_corpus  both texts -> one array of token ids each, an EOS token between documents, on disk
    stream     Batches          the training array -> shuffled sequences of seq_len + 1 token ids; Prefetch draws ahead
    shards     find_shards      files of a text larger than a disk, fetched and read while a model trains
    streaming  ShardBatches     the same sequences from such files, through a shuffled buffer, a share for each rank

`load` does the first four. Each step is cached by the content that it depends on.
"""

from pathlib import Path

from mlx_transformer.data.corpus import Corpus, load_corpus
from mlx_transformer.data.documents import read_documents
from mlx_transformer.data.stream import Batches, Prefetch, validation_sequences
from mlx_transformer.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from mlx_transformer.data.tokens import Tokens, tokenize_corpus
from mlx_transformer.utils.errors import BadInput

__all__ = [
    "Batches",
    "Corpus",
    "Prefetch",
    "Tokenizer",
    "Tokens",
    "load",
    "load_corpus",
    "load_tokenizer",
    "read_documents",
    "tokenize_corpus",
    "train_tokenizer",
    "validation_sequences",
]


def load(
    source: str | Path,
    *,
    tokenizer: str | Path | Tokenizer = "bpe",
    vocab_size: int | None = None,
    valid: str | Path | None = None,
    stories: int | None = None,
    text_column: str | None = None,
    stream: bool = False,
) -> Tokens:
    """Return the token ids of a corpus, ready for `fit`; `.tokenizer` is the tokenizer that made them.

    source: "fables" (built in), "tinystories" (from the cache or the Hugging Face hub), "task:NAME", or a path: UTF-8
        text with `<|endoftext|>` between documents, .jsonl or .csv, each also as .gz, or a folder of them;
        or "OWNER/NAME" of a data set on the hub.
    tokenizer: "bpe" or "word" (learned from the training text), the path of a tokenizer.json, or a Tokenizer.
    vocab_size: size of a learned vocabulary; None: 8,192, or fewer where the text supports no more.
    valid: path of a validation text; None: the last 5 % of the documents are held out.
    text_column: key or column of .jsonl and .csv that holds the text; None: "text".
    stories: number of training documents to keep; None: all of a text, 30,000 fables, 100,000 of TinyStories.
    stream: read a folder or data set of several files while a model trains; above 5 GB that is always so.

    Raises BadInput if a text cannot be read, split or fetched, or does not support the vocabulary; and for a tokenizer
    or a vocab_size with a task, which has its own.
    """
    corpus = load_corpus(str(source), None if valid is None else str(valid), stories, _discard, text_column, stream)
    if corpus.task is not None and (tokenizer != "bpe" or vocab_size is not None):
        raise BadInput(f"task:{corpus.task} has a tokenizer of its own: leave tokenizer and vocab_size out")
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = train_tokenizer(str(tokenizer), corpus, vocab_size)
    elif vocab_size not in (None, tokenizer.vocab_size):
        raise BadInput(f"vocab_size {vocab_size} does not fit the tokenizer, which has {tokenizer.vocab_size} tokens")
    return tokenize_corpus(corpus, tokenizer, say=_discard)


def _discard(_message: str) -> None: ...
