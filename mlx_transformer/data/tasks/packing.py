"""Token arrays of a task: answers marked by the sign, examples packed into whole sequences.

A token t that no loss counts is stored as ~t = -1 - t, so that one int32 array holds tokens and mask.
"""

from collections.abc import Iterable

import numpy as np

from mlx_transformer.data.tasks.base import Example
from mlx_transformer.data.tokenizers.symbols import SymbolTokenizer
from mlx_transformer.utils.errors import BadInput


def encode_examples(texts: Iterable[str], tokenizer: SymbolTokenizer) -> np.ndarray:
    """Return ~EOS, example, ~EOS, example, ..., ~EOS as int32, every word outside of the brackets marked."""
    tokens = [~tokenizer.eos_id]
    for text in texts:
        example = Example.read(text)
        ids = tokenizer.encode(" ".join(example.words))
        tokens += [i if scored else ~i for i, scored in zip(ids, example.scored, strict=True)]
        tokens.append(~tokenizer.eos_id)
    return np.array(tokens, np.int32)


def unmarked(tokens: np.ndarray) -> np.ndarray:
    """Return the tokens themselves: ~t for a marked one."""
    return np.maximum(tokens, ~tokens)


def pack(tokens: np.ndarray, eos_id: int, seq_len: int, name: str) -> np.ndarray:
    """Place examples so that none is cut when the array is cut every seq_len tokens, with ~EOS in the gaps.

    Each example keeps the EOS before it. An array that was packed for another length is packed anew. Raises BadInput
    for a seq_len shorter than an example.
    """
    ends = np.flatnonzero(tokens == ~eos_id)
    lengths = np.diff(ends)
    starts, lengths = ends[:-1][lengths > 1], lengths[lengths > 1]  # the others are gaps
    if len(lengths) and (longest := int(lengths.max())) > seq_len:
        raise BadInput(f"--seq-len {seq_len} is too short for an example of task:{name}: give at least {longest}")
    places, end = [], 0
    for length in lengths.tolist():
        room = -end % seq_len
        end += room if length > room else 0
        places.append(end)
        end += length
    packed = np.full(-(-end // seq_len) * seq_len + 1, ~eos_id, np.int32)
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    packed[np.repeat(places, lengths) + inside] = tokens[np.repeat(starts, lengths) + inside]
    return packed
