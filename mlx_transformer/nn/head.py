"""Output heads: last hidden states to logits."""

from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.config import Config


class Head(nn.Module):
    """h W^T, W not tied to the embedding, no bias: h (..., D) -> logits (..., V); weight (V, D)."""

    softcap: float | None = None  # c of CappedHead

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.build(config)

    def build(self, config: Config) -> None:
        """Make the parameters; subclasses override this."""
        self.weight = mx.zeros((config.vocab_size, config.d_model))

    def matrix(self, embedding: nn.Embedding) -> mx.array:
        """Return the output matrix W (V, D)."""
        return self.weight

    def __call__(self, h: mx.array, embedding: nn.Embedding) -> mx.array:
        logits = h @ self.matrix(embedding).T
        return logits if self.softcap is None else self.softcap * mx.tanh(logits / self.softcap)


class TiedHead(Head):
    """W is the matrix of the input embedding (Press & Wolf 2017, arXiv 1608.05859; Vaswani et al. 2017, sec. 3.4)."""

    def build(self, config: Config) -> None:
        """Make nothing: the head has no parameters."""

    def matrix(self, embedding: nn.Embedding) -> mx.array:
        return embedding.weight


class CappedHead(Head):
    """Logits with a soft cap: c tanh(h W^T / c), c = config.softcap (Gemma 2, arXiv 2408.00118, sec. 2)."""

    def build(self, config: Any) -> None:
        super().build(config)
        self.softcap = config.softcap
