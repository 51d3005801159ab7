"""Cross-entropy of a linear head, computed in chunks of tokens so that the logits are never all in memory.

For a token with logits l = h W^T, or with a soft cap c: l = c tanh(h W^T / c), and target y

    loss = lse - (1 - s) l_y - s mean(l),      lse = log(sum(exp(l)))

s is `label_smoothing` (Szegedy et al. 2015, arXiv 1512.00567, sec. 7: the target distribution is
(1 - s) onehot(y) + s / V), c is `softcap` (Gemma 2, arXiv 2408.00118, sec. 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_transformer.backend import is_plain
from mlx_transformer.ops.fastmath import custom_ops, keeps_scores, on_linux_cpu, row_sum, tanh, with_gradient

CHUNK_ELEMENTS = 1 << 22  # logits in one chunk: 16 MB of float32
GPU_CHUNK_ELEMENTS = 1 << 25  # the chunks run one after the other, and a GPU has more to share out


@dataclass(frozen=True)
class _Options:
    label_smoothing: float
    softcap: float | None
    chunk: int | None

    def chunk_tokens(self, vocab_size: int) -> int:
        """Tokens in a chunk."""
        return self.chunk or max(1, (CHUNK_ELEMENTS if on_linux_cpu() else GPU_CHUNK_ELEMENTS) // vocab_size)


def cross_entropy(
    h: mx.array,
    weight: mx.array,
    targets: mx.array,
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> mx.array:
    """Return the loss of each token, float32 (...), from h (..., D), weight (V, D) and targets (...) int in [0, V).

    `chunk` is the number of tokens whose logits are in memory at once (default: 4M logits, 32M off a Linux CPU). The
    backward pass recomputes the logits; `mean_cross_entropy` does not.
    """
    options = _Options(label_smoothing, softcap, chunk)
    if is_plain():
        return _plain(h, weight, targets, options)
    y = targets.reshape(-1)

    def losses(*parameters: mx.array) -> mx.array:
        return _in_chunks(parameters, y, options)[0]

    def gradients(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        _, parts = _in_chunks(primals, y, options, cotangent)
        return tuple(part.astype(primal.dtype) for part, primal in zip(parts, primals, strict=True))

    return with_gradient(losses, gradients)(h.reshape(-1, h.shape[-1]), weight).reshape(targets.shape)


def mean_cross_entropy(
    h: mx.array,
    weight: mx.array,
    targets: mx.array,
    weights: mx.array | None = None,
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> mx.array:
    """Return sum(weights * loss) / sum(weights), float32 scalar, 0 if all weights are 0.

    `weights` (...) have no gradient; a masked token has weight 0 and any target in [0, V). For training: each chunk's
    part of the gradient is computed in the forward pass, while its logits are in memory, whether or not a gradient
    is needed. For evaluation use `cross_entropy`.
    """
    options = _Options(label_smoothing, softcap, chunk)
    return _mean_and_losses(h, weight, targets, weights, options)[0]


def mean_and_token_losses(
    h: mx.array,
    weight: mx.array,
    targets: mx.array,
    weights: mx.array | None = None,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[mx.array, mx.array]:
    """Return `mean_cross_entropy`, and the losses of the tokens (...), which have no gradient."""
    mean, losses = _mean_and_losses(h, weight, targets, weights, _Options(0.0, softcap, chunk))
    return mean, mx.stop_gradient(losses).reshape(targets.shape)


def n_logits(tokens: int, vocab_size: int, dtype: mx.Dtype) -> int:
    """Return how many numbers, of logits and of their gradients, the mean of so many losses has in memory at once."""
    if is_plain():
        return 3 * tokens * vocab_size
    chunk = min(tokens, _Options(0.0, None, None).chunk_tokens(vocab_size))
    return (3 if keeps_scores(dtype) else 1) * chunk * vocab_size


def _mean_and_losses(
    h: mx.array, weight: mx.array, targets: mx.array, weights: mx.array | None, options: _Options
) -> tuple[mx.array, mx.array]:
    """Return the mean loss, and the losses (N,) of all tokens, whose gradient is not defined."""
    y = targets.reshape(-1)
    w = mx.ones(y.shape) if weights is None else mx.stop_gradient(weights.reshape(-1).astype(mx.float32))
    inverse = 1 / mx.maximum(mx.sum(w), 1e-30)
    if is_plain():
        losses = _plain(h, weight, targets, options).reshape(-1)
        return mx.sum(losses * w) * inverse, losses
    kept: list[mx.array] = []

    def mean(*parameters: mx.array) -> list[mx.array]:
        losses, parts = _in_chunks(parameters, y, options, w)
        kept[:] = parts
        return [mx.sum(losses * w) * inverse, losses]

    def gradients(primals: Sequence[mx.array], cotangents: Sequence[mx.array], _: object) -> tuple[mx.array, ...]:
        scale = cotangents[0] * inverse
        return tuple((part * scale).astype(primal.dtype) for part, primal in zip(kept, primals, strict=True))

    custom = mx.custom_function(mean)
    custom.vjp(gradients)
    result: Any = custom(h.reshape(-1, h.shape[-1]), weight)
    return result[0], result[1]


def _plain(h: mx.array, weight: mx.array, y: mx.array, options: _Options) -> mx.array:
    logits = (h @ weight.T).astype(mx.float32)
    if options.softcap is not None:
        logits = options.softcap * mx.tanh(logits / options.softcap)
    return _losses(logits, mx.logsumexp(logits, axis=-1, keepdims=True), y, options)


def _losses(logits: mx.array, lse: mx.array, y: mx.array, options: _Options) -> mx.array:
    s = options.label_smoothing
    loss = lse - (1 - s) * mx.take_along_axis(logits, y[..., None], axis=-1)
    if s:
        loss = loss - s / logits.shape[-1] * row_sum(logits)
    return mx.squeeze(loss, -1)


def _in_chunks(
    parameters: Sequence[mx.array], y: mx.array, options: _Options, w: mx.array | None = None
) -> tuple[mx.array, list[mx.array]]:
    """Return the losses (N,) and, given w (N,), the float32 gradients of sum(w * losses) for h (N, D) and weight.

    In float32 on a Linux CPU one operation (loss.cpp). Elsewhere each chunk depends on the one before: MLX evaluates a
    graph breadth first and would else hold all chunks at once.
    """
    h, weight = parameters
    n = options.chunk_tokens(weight.shape[0])
    if ours := custom_ops(h, weight):
        cap = options.softcap or 0.0
        losses, *parts = ours.cross_entropy(h, weight, y.astype(mx.int32), w, options.label_smoothing, cap, n)
        return losses, parts
    columns = mx.arange(weight.shape[0], dtype=y.dtype)
    losses, dh = [], []
    dweight: mx.array | None = None
    done: list[mx.array] = []
    for i in range(0, h.shape[0], n):
        part = slice(i, i + n)
        h_part = mx.depends([h[part]], done)[0] if done else h[part]
        chunk = _Chunk(h_part, weight, y[part], columns, options)
        losses.append(chunk.losses())
        done = [losses[-1]]
        if w is not None:
            dh_part, dweight = chunk.gradients(w[part], dweight)
            dh.append(dh_part)
            done += [dh_part, dweight]
    if dweight is None:
        return mx.concatenate(losses), []
    return mx.concatenate(losses), [mx.concatenate(dh), dweight]


class _Chunk:
    """Logits of some tokens, their losses and gradients: h (n, D), weight (V, D), targets y (n,), columns 0 ... V - 1.

    Without gathers or scatters over the vocabulary: a GPU adds atomically, in an order that differs from run to run.
    """

    def __init__(self, h: mx.array, weight: mx.array, y: mx.array, columns: mx.array, options: _Options) -> None:
        self.h, self.weight, self.y, self.columns, self.options = h, weight, y, columns, options
        logits = h @ weight.T
        self.dtype = logits.dtype
        logits, cap = logits.astype(mx.float32), options.softcap
        self.logits = logits if cap is None else cap * tanh(logits / cap)
        self.lse = mx.logsumexp(self.logits, axis=-1, keepdims=True)

    def losses(self) -> mx.array:
        return _losses(self.logits, self.lse, self.y, self.options)

    def gradients(self, w: mx.array, dweight: mx.array | None) -> list[mx.array]:
        """Return the gradients of sum(w * losses), w (n,): dh (n, D), and that of the weight (V, D) plus `dweight`."""
        s, cap = self.options.label_smoothing, self.options.softcap
        other = s / self.weight.shape[0]
        target = mx.where(self.columns == self.y[:, None], 1 - s + other, other)
        g = (mx.exp(self.logits - self.lse) - target) * w[:, None]
        if cap is not None:
            g = g * (1 - (self.logits / cap).square())
        g = g.astype(self.dtype)
        if dweight is not None and self.dtype == mx.float32:
            dweight = mx.addmm(dweight, g.T, self.h)
        else:
            part = (g.T @ self.h).astype(mx.float32)
            dweight = part if dweight is None else dweight + part
        return [(g @ self.weight).astype(mx.float32), dweight]
