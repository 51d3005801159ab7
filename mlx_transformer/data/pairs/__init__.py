"""Parallel text: sentences with their translations, built in (`pairs`) or somebody's own."""

from mlx_transformer.data.pairs.corpus import NAME, TESTS, is_built_in, kind_of, load_pairs, read_pairs, read_parallel
from mlx_transformer.data.pairs.stream import PairBatches, PairTokens, encode_pairs, encode_sources, tokenize_pairs

__all__ = [
    "NAME",
    "TESTS",
    "PairBatches",
    "PairTokens",
    "encode_pairs",
    "encode_sources",
    "is_built_in",
    "kind_of",
    "load_pairs",
    "read_pairs",
    "read_parallel",
    "tokenize_pairs",
]
