"""The loss by which an optimizer sees the curvature: of targets that the model itself draws."""

import mlx.core as mx

from mlx_transformer.nn.model import Model
from mlx_transformer.ops.loss import CHUNK_ELEMENTS


def drawn_loss(model: Model, batch: mx.array) -> mx.array:
    """Mean nats of targets drawn from the model's own predictions for a batch (B, L + 1): a scalar.

    The squares of its gradient, times B L, estimate the diagonal of the Gauss-Newton matrix (Liu et al. 2023, Sophia,
    arXiv 2305.14342, alg. 2). Without the ledger's losses, which are no likelihood.
    """
    ctx, _ = model.inputs(batch)
    h = model.hidden(ctx)
    return model.token_loss(h, draw(model, h)).mean()


def draw(model: Model, h: mx.array) -> mx.array:
    """A piece for each hidden state (B, L, D), by its probability: (B, L) int. Few logits are in memory at a time."""
    rows = mx.stop_gradient(h).reshape(-1, h.shape[-1])
    size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    drawn: list[mx.array] = []
    for start in range(0, rows.shape[0], size):
        here = rows[start : start + size]
        here = mx.depends([here], drawn[-1:])[0] if drawn else here
        drawn.append(mx.random.categorical(mx.stop_gradient(model.unembed(here)).astype(mx.float32)))
    return mx.concatenate(drawn).reshape(h.shape[:-1])
