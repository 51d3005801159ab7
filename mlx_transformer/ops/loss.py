"""Cross-entropy of a linear head: the logits are made and used a chunk of rows at a time, never whole.

For a row with logits l = h W^T + bias, or with a soft cap c: l = c tanh((h W^T + bias) / c), and target y

    loss = lse - (1 - s) l_y - s mean(l) + z lse^2,      lse = log(sum(exp(l)))

s is `label_smoothing` (Szegedy et al., "Rethinking the Inception Architecture", section 7: the target distribution is
(1 - s) onehot(y) + s / V), z is `z_loss` (Chowdhery et al., "PaLM", section 5), c is `softcap` ("Gemma 2", section 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_transformer.backend.runtime import is_plain
from mlx_transformer.ops.fastmath import exp_nonpositive, fence, on_linux_cpu, row_max, row_sum, tanh, with_gradient

CHUNK_ELEMENTS = 1 << 22  # logits in one chunk: 16 MB of float32


@dataclass(frozen=True)
class _Options:
    label_smoothing: float
    z_loss: float
    softcap: float | None
    chunk: int | None

    def rows(self, vocab_size: int) -> int:
        """Rows in a chunk."""
        return self.chunk or max(1, CHUNK_ELEMENTS // vocab_size)


def cross_entropy(
    h: mx.array,
    weight: mx.array,
    targets: mx.array,
    *,
    bias: mx.array | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> mx.array:
    """Loss of each row, float32, of the shape of `targets` (...), ints in [0, V); h (..., D), weight (V, D), bias (V,).

    `chunk` is the number of rows whose logits are in memory at once (default: 4M logits). The gradient makes the
    logits again; where the mean is what is wanted, `mean_cross_entropy` does not have to.
    """
    options = _Options(label_smoothing, z_loss, softcap, chunk)
    if is_plain():
        return _plain(h, weight, bias, targets, options)
    y = targets.reshape(-1)

    def losses(*parameters: mx.array) -> mx.array:
        return _in_chunks(parameters, y, options)[0]

    def gradients(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        _, parts = _in_chunks(primals, y, options, cotangent)
        return tuple(part.astype(primal.dtype) for part, primal in zip(parts, primals, strict=True))

    return with_gradient(losses, gradients)(*_flat(h, weight, bias)).reshape(targets.shape)


def mean_cross_entropy(
    h: mx.array,
    weight: mx.array,
    targets: mx.array,
    weights: mx.array | None = None,
    *,
    bias: mx.array | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> mx.array:
    """sum(weights * loss) / sum(weights), scalar float32 (0 if all weights are 0); `weights` (...) without gradient.

    A row that is not to count has weight 0, and a target in [0, V) all the same.
    For training: while a chunk's logits are there, its part of the gradient is made from them too, whether or not it
    is asked for (a chunk waits for the one before). For evaluation use `cross_entropy`, which makes none.
    """
    options = _Options(label_smoothing, z_loss, softcap, chunk)
    y = targets.reshape(-1)
    w = mx.ones(y.shape) if weights is None else mx.stop_gradient(weights.reshape(-1).astype(mx.float32))
    inverse = 1 / mx.maximum(mx.sum(w), 1e-30)
    if is_plain():
        return mx.sum(_plain(h, weight, bias, targets, options).reshape(-1) * w) * inverse
    kept: list[mx.array] = []

    def mean(*parameters: mx.array) -> mx.array:
        losses, parts = _in_chunks(parameters, y, options, w)
        kept[:] = parts
        return mx.sum(losses * w) * inverse

    def gradients(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        scale = cotangent * inverse
        return tuple((part * scale).astype(primal.dtype) for part, primal in zip(kept, primals, strict=True))

    return with_gradient(mean, gradients)(*_flat(h, weight, bias))


def _flat(h: mx.array, weight: mx.array, bias: mx.array | None) -> tuple[mx.array, ...]:
    h = h.reshape(-1, h.shape[-1])
    return (h, weight) if bias is None else (h, weight, bias)


def _plain(h: mx.array, weight: mx.array, bias: mx.array | None, y: mx.array, options: _Options) -> mx.array:
    logits = (h @ weight.T).astype(mx.float32)
    if bias is not None:
        logits = logits + bias
    if options.softcap is not None:
        logits = options.softcap * mx.tanh(logits / options.softcap)
    return _losses(logits, mx.logsumexp(logits, axis=-1, keepdims=True), y, options)


def _losses(logits: mx.array, lse: mx.array, y: mx.array, options: _Options) -> mx.array:
    s, z = options.label_smoothing, options.z_loss
    loss = lse - (1 - s) * mx.take_along_axis(logits, y[..., None], axis=-1)
    if s:
        loss = loss - s / logits.shape[-1] * row_sum(logits)
    if z:
        loss = loss + z * mx.square(lse)
    return mx.squeeze(loss, -1)


def _in_chunks(
    parameters: Sequence[mx.array], y: mx.array, options: _Options, w: mx.array | None = None
) -> tuple[mx.array, list[mx.array]]:
    """Losses (N,) and, if there are `w` (N,), the float32 gradient of sum(w * losses) to each of `parameters`.

    A chunk waits for the one before: else MLX, which goes through a graph breadth first, would have all in memory.
    """
    h, weight, *bias = parameters
    n = options.rows(weight.shape[0])
    losses, dh, at_targets = [], [], []
    sums: list[mx.array] = []  # the gradient of what all rows share
    done: list[mx.array] = []
    for i in range(0, h.shape[0], n):
        rows = slice(i, i + n)
        here = mx.depends([h[rows]], done)[0] if done else h[rows]
        chunk = _Chunk(here, weight, bias[0] if bias else None, y[rows], options)
        losses.append(chunk.losses())
        done = [losses[-1]]
        if w is not None:
            dh_here, at_target, *parts = chunk.gradients(w[rows])
            dh.append(dh_here)
            at_targets.append(at_target)
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
            done += [dh_here, *sums]
    if w is None:
        return mx.concatenate(losses), []
    at_target = mx.concatenate(at_targets)
    sums[0] = sums[0].at[y].add(-h * at_target)
    if bias:
        sums[1] = sums[1].at[y].add(-at_target[:, 0])
    return mx.concatenate(losses), [mx.concatenate(dh), *sums]


class _Chunk:
    """Some rows' logits and what follows from them."""

    def __init__(self, h: mx.array, weight: mx.array, bias: mx.array | None, y: mx.array, options: _Options):
        self.h, self.weight, self.bias, self.y, self.options = h, weight, bias, y, options
        logits = h @ weight.T
        self.dtype = logits.dtype
        logits = logits.astype(mx.float32)
        if bias is not None:
            logits = logits + bias
        self.slope = None  # of the soft cap
        if options.softcap is not None:
            u = tanh(logits / options.softcap)
            logits, self.slope = options.softcap * u, 1 - u * u
        self.logits = logits
        # exp(logits) = e * exp(lse) / total; in float32 it saves a pass over e to let `total` be other than 1
        if on_linux_cpu() and self.dtype == mx.float32:
            top = row_max(logits)
            self.e = exp_nonpositive(logits - top)
            self.total = row_sum(self.e)
            self.lse = fence(mx.log(self.total) + top)  # nan comes in by `top`: exp_nonpositive does not see it
        else:
            self.lse = mx.logsumexp(logits, axis=-1, keepdims=True)
            self.e = mx.exp(logits - self.lse)
            self.total = mx.ones_like(self.lse)

    def losses(self) -> mx.array:
        return _losses(self.logits, self.lse, self.y, self.options)

    def gradients(self, w: mx.array) -> list[mx.array]:
        """Of sum(w * losses): to h; to the target's logit, negated (n, 1); without its share, to weight and bias."""
        s, z = self.options.label_smoothing, self.options.z_loss
        w = w[:, None]
        rise = (1 + 2 * z * self.lse) / self.total  # of the loss with exp(logits), but for w and the target
        g, scale = self.e, fence(w * rise)
        if s:
            g, scale = self.e * fence(rise) - s / self.weight.shape[0], w
        at_target = (1 - s) * w
        if self.slope is not None:
            g = g * self.slope
            at_target = at_target * mx.take_along_axis(self.slope, self.y[:, None], axis=-1)
        g = g.astype(self.dtype)
        dh = (g @ self.weight).astype(mx.float32) * scale - self.weight[self.y] * at_target
        dweight = (g.T @ (self.h * scale).astype(self.dtype)).astype(mx.float32)
        dbias = [] if self.bias is None else [mx.sum(g * scale, axis=0)]
        return [dh, at_target, dweight, *dbias]
