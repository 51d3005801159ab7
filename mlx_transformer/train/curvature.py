"""The loss from which an optimizer estimates the curvature: targets are sampled from the model."""

import mlx.core as mx

from mlx_transformer.nn.model import Model
from mlx_transformer.ops.loss import CHUNK_ELEMENTS


def sampled_loss(model: Model, batch: mx.array) -> mx.array:
    """Compute the mean nats of targets sampled from the model's predictions for a batch (B, L + 1): a scalar.

    The squares of its gradient, times B L, estimate the diagonal of the Gauss-Newton matrix (Liu et al. 2023, Sophia,
    arXiv 2305.14342, alg. 2). Auxiliary losses are left out, since they are no likelihood.
    """
    ctx, _ = model.inputs(batch)
    h = model.hidden(ctx)
    return model.token_loss(h, sample_targets(model, h)).mean()


def sample_targets(model: Model, h: mx.array) -> mx.array:
    """Sample a token for each hidden state (B, L, D) by its probability: (B, L) int, computed in chunks."""
    rows = mx.stop_gradient(h).reshape(-1, h.shape[-1])
    size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    sampled: list[mx.array] = []
    for start in range(0, rows.shape[0], size):
        chunk = rows[start : start + size]
        chunk = mx.depends([chunk], sampled[-1:])[0] if sampled else chunk  # one chunk's logits at a time
        sampled.append(mx.random.categorical(mx.stop_gradient(model.unembed(chunk)).astype(mx.float32)))
    return mx.concatenate(sampled).reshape(h.shape[:-1])
