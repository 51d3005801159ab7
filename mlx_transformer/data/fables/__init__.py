"""Fables: the built-in corpus of generated short stories with an exactly known entropy, and its parser.

generate(seed)      -> Story: text, exact log2 probability, derivation
parse(text)         -> the Story with this text, or None
score(text)         -> Score: whether the text is grammatical and consistent, and the share of its sentences that are
bound_words(text)   -> the words that the story itself determines, each with the others of its kind
write_corpus(...)   write train.txt and valid.txt, with the entropy floor of the validation text
"""

from mlx_transformer.data.fables.corpus import FablesInfo, generate, write_corpus
from mlx_transformer.data.fables.parse import GROUPS, Bound, Score, bound_words, derivations, parse, score
from mlx_transformer.data.fables.plots import PLOTS
from mlx_transformer.data.fables.teller import Story

__all__ = [
    "GROUPS",
    "PLOTS",
    "Bound",
    "FablesInfo",
    "Score",
    "Story",
    "bound_words",
    "derivations",
    "generate",
    "parse",
    "score",
    "write_corpus",
]
