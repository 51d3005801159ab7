"""Learning a vocabulary from a corpus, cached by the content of its training text."""

import hashlib
import json
from pathlib import Path

from mlx_transformer.data.corpus import Corpus
from mlx_transformer.data.documents import read_parts
from mlx_transformer.data.store import cached_folder
from mlx_transformer.data.tasks import find_task
from mlx_transformer.data.tokenizers.base import Tokenizer
from mlx_transformer.data.tokenizers.bpe import SMALLEST_BPE, BPETokenizer, train_bpe
from mlx_transformer.data.tokenizers.loading import load_tokenizer, read_tokenizer_json
from mlx_transformer.data.tokenizers.symbols import SymbolTokenizer
from mlx_transformer.data.tokenizers.word import WordTokenizer, train_words
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import write_json

DEFAULT_VOCAB_SIZE = 8192
SAMPLE_BYTES = 20_000_000  # of the training text from which a vocabulary is learned


def train_tokenizer(kind: str, corpus: Corpus, vocab_size: int | None = None, explicit: bool = True) -> Tokenizer:
    """Return a tokenizer learned from the training text of a corpus, or read from a file; of a task its symbols.

    kind: "bpe", "word", or the path of a tokenizer.json.
    vocab_size: None: 8,192. If the text supports fewer tokens, an `explicit` size is BadInput; otherwise the vocabulary
        is as large as the text supports (bpe: a multiple of 64).

    Raises BadInput also for a size that is too small, a file that cannot be read, and a cache that cannot be written.
    """
    if corpus.task is not None:
        return task_tokenizer(corpus.task)
    if kind not in ("bpe", "word"):
        return read_tokenizer_json(kind, vocab_size if explicit else None)
    size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    least = SMALLEST_BPE if kind == "bpe" else len(WordTokenizer.SPECIALS) + 1
    explicit = explicit and vocab_size is not None
    if size < least:
        raise BadInput(f"--vocab-size {size} is too small for the tokenizer {kind}; give at least {least}")

    def build(folder: Path) -> None:
        sample = _sample(corpus)
        tokenizer, supported = train_bpe(sample, size) if kind == "bpe" else train_words(sample, size)
        tokenizer.save(folder)
        write_json(folder / "supported.json", supported)

    version = BPETokenizer.version if kind == "bpe" else WordTokenizer.version
    key = hashlib.sha256(repr((version, kind, size, SAMPLE_BYTES, corpus.train_sha256)).encode()).hexdigest()[:20]
    folder = cached_folder("tokenizers", f"{kind}-{key}", build)
    supported = json.loads((folder / "supported.json").read_text())
    if explicit and supported < size:
        raise BadInput(
            f"--vocab-size {size} is more than this text supports with the tokenizer {kind}; "
            f"the largest is {supported}: give that or less, or a longer text"
        )
    return load_tokenizer(folder)


def task_tokenizer(name: str) -> SymbolTokenizer:
    """Return the tokenizer of a task. Raises BadInput for an unknown one."""
    task = find_task(name)
    return SymbolTokenizer(task.symbols, task=task.name, patches=task.patches, tool=task.tool)


def _sample(corpus: Corpus) -> list[str]:
    """Return texts of about SAMPLE_BYTES in total, spread evenly over the training text: always the same ones."""
    share = min(1.0, SAMPLE_BYTES / corpus.train_bytes)
    seen, kept = 0, 0
    sample: list[str] = []
    for text, _ in read_parts(corpus.train):
        seen += len(text)
        if kept + len(text) <= seen * share or not sample:
            kept += len(text)
            sample.append(text)
    return sample
