"""From the last hidden state to logits."""

from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.config import Config


class Head(nn.Module):
    """An own matrix, untied from the embedding, without a bias: h (..., D) -> logits (..., V)."""

    softcap: float | None = None  # a variant's bound on the logits: cap * tanh(logits / cap)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.build(config)

    def build(self, config: Config) -> None:
        """Make the matrix; variants override this."""
        self.weight = mx.zeros((config.vocab_size, config.d_model))

    def matrix(self, embedding: nn.Embedding) -> mx.array:
        """The (V, D) matrix that hidden states are compared with."""
        return self.weight

    def __call__(self, h: mx.array, embedding: nn.Embedding) -> mx.array:
        logits = h @ self.matrix(embedding).T
        return logits if self.softcap is None else self.softcap * mx.tanh(logits / self.softcap)


class TiedHead(Head):
    """The embedding's matrix (Press & Wolf 2017, arXiv 1608.05859; Vaswani et al. 2017, sec. 3.4)."""

    def build(self, config: Config) -> None:
        """No matrix of its own."""

    def matrix(self, embedding: nn.Embedding) -> mx.array:
        return embedding.weight


class CappedHead(Head):
    """Logits softly bounded by config.softcap = c: c tanh(logits / c) (Gemma 2, arXiv 2408.00118, sec. 2)."""

    def build(self, config: Any) -> None:
        super().build(config)
        self.softcap = config.softcap
