"""Value embeddings: what a token says to those that attend to it, looked up."""

from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.context import Ctx


class ValueEmbedding(Attention):
    """v + E[token]: a table of the layer's own, as wide as its values, joins them (modded-nanogpt, Jordan et al. 2024).

    After the value residual of Zhou et al. 2024 (arXiv 2410.17897, eq. 5), where the first layer's values join. A
    look-up: parameters, and next to no arithmetic.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        self.value_embedding = nn.Embedding(config.vocab_size, self.v_proj.weight.shape[0])

    def project(self, x: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = super().project(x, ctx)
        return q, k, v + self.split(self.value_embedding(ctx.tokens))
