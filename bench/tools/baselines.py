"""Baselines by counting: uniform to 5-gram models on the tokens of the validation loss.

`python -m bench baselines --data PATH --valid PATH --vocab-size 4096` prints nats per token and bits per byte by order.
A neural model that does not beat the 5-gram has learnt less than a table of counts.
"""

import math
from dataclasses import dataclass

import numpy as np

from mlx_transformer.data import Tokens, load_corpus, tokenize_corpus, train_tokenizer
from mlx_transformer.data.ngrams import kneser_ney
from mlx_transformer.run.flags import DataFlags, Place, WholeNumber, parse
from mlx_transformer.utils.errors import BadInput


def bits_per_byte(log_prob: np.ndarray, n_bytes: int) -> float:
    """Return -log_prob (nats) summed, in bits per UTF-8 byte of the documents without separators."""
    return float(-log_prob.sum() / math.log(2) / n_bytes)


@dataclass
class Flags(DataFlags):
    """Nats per token and bits per byte of n-gram models on the validation text of a corpus."""

    stories: WholeNumber = None
    """count only this many training documents (a token needs some 100 bytes of memory)"""
    tokenizer: Place = None
    """bpe, word or the path of a tokenizer.json (default: bpe)"""
    vocab_size: WholeNumber = None
    """tokens of the vocabulary (default: 4096, or as many as the text supports)"""
    order: WholeNumber = None
    """highest order (default: 5)"""


def table(tokens: Tokens, vocab_size: int, order: int) -> list[tuple[str, float, float | None]]:
    """Return (model, nats per token, bits per byte or None if the tokenizer is lossy) by order, and the floor."""
    rows = []
    for n in range(order + 1):
        log_prob = kneser_ney(tokens.train, vocab_size, tokens.eos_id, n).log_prob(tokens.valid)
        bits = bits_per_byte(log_prob, tokens.valid_bytes) if tokens.lossless else None
        rows.append(("uniform" if n == 0 else f"{n}-gram", float(-log_prob.mean()), bits))
    if tokens.floor_bits is not None:
        nats = tokens.floor_bits * math.log(2) / (len(tokens.valid) - 1)
        rows.append(("entropy floor", nats, tokens.floor_bits / tokens.valid_bytes if tokens.lossless else None))
    return rows


def main(prog: str = "python -m bench baselines", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    corpus = load_corpus(flags.data or "auto", flags.valid, flags.stories, text_column=flags.text_column)
    if corpus.task is not None:
        raise BadInput(f"--data task:{corpus.task}: baselines predict every token of a text; a task has its own floors")
    explicit = flags.vocab_size is not None
    tokenizer = train_tokenizer(flags.tokenizer or "bpe", corpus, flags.vocab_size or 4096, explicit=explicit)
    tokens = tokenize_corpus(corpus, tokenizer)
    counted, predicted = len(tokens.train) - 1, len(tokens.valid) - 1
    print(f"vocabulary of {tokenizer.vocab_size:,}; {counted:,} tokens to count, {predicted:,} to predict")
    print(f"{'model':<15}{'nats/token':>12}{'bits/byte':>12}")
    for name, nats, bits in table(tokens, tokenizer.vocab_size, flags.order or 5):
        print(f"{name:<15}{nats:>12.4f}{'-' if bits is None else format(bits, '.4f'):>12}")
