"""Text from a trained model: cached decoding, sampling, beam search, and quality figures of what was generated."""

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
from mlx_transformer.generate.translation import Translation, translate

__all__ = [
    "Completion",
    "Decoder",
    "Sampling",
    "Translation",
    "complete",
    "decode",
    "encode_prompt",
    "generate",
    "generate_unconditional",
    "stream_completion",
    "translate",
]
