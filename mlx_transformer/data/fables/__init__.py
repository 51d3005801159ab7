"""Fables: the built-in corpus of short stories with an exactly known entropy, and the parser that scores stories.

generate(seed)      a Story: text, exact log2 probability, derivation
parse(text)         the Story a text is, or None
score(text)         is it grammatical, is it consistent, how far does it make sense
write_corpus(...)   train.txt and valid.txt, with the entropy floor of the validation text
"""

from mlx_transformer.data.fables.corpus import FablesInfo, generate, write_corpus
from mlx_transformer.data.fables.parse import Score, derivations, parse, score
from mlx_transformer.data.fables.plots import PLOTS
from mlx_transformer.data.fables.teller import Story

__all__ = ["PLOTS", "FablesInfo", "Score", "Story", "derivations", "generate", "parse", "score", "write_corpus"]
