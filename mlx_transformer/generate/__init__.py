"""Text from a trained model: decoding, sampling, beam search, tools, quality figures of texts and scores of tasks."""

from mlx_transformer.generate.completion import (
    Completion,
    complete,
    encode_prompt,
    generate,
    generate_unconditional,
    stream_completion,
)
from mlx_transformer.generate.decoding import Decoder, decode
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
    "decode",
    "encode_prompt",
    "generate",
    "generate_unconditional",
    "score",
    "stream_completion",
    "translate",
]
