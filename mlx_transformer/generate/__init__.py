"""Text from a trained model: decoding, sampling, beam search, tools, quality figures of texts and scores of tasks."""

from mlx_transformer.generate.completion import (
    Completion,
    complete,
    continuation,
    encode_prompt,
    generate,
    generate_unconditional,
    stream_completion,
    stream_tokens,
)
from mlx_transformer.generate.decoding import Decoder, decode, first_read
from mlx_transformer.generate.sampling import Sampling
from mlx_transformer.generate.scoring import Score, Scorer, score
from mlx_transformer.generate.translation import Translation, translate

__all__ = [
    "Completion",
    "Decoder",
    "Sampling",
    "Score",
    "Scorer",
    "Translation",
    "complete",
    "continuation",
    "decode",
    "encode_prompt",
    "first_read",
    "generate",
    "generate_unconditional",
    "score",
    "stream_completion",
    "stream_tokens",
    "translate",
]
