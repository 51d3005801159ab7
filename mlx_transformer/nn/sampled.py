"""Sampled softmax: a training loss over a part of the vocabulary."""

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transformer import ops
from mlx_transformer.nn.config import Hyperparameters
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.model import Model
from mlx_transformer.utils.errors import BadInput

LEAST = 512  # tokens in a sample


class SampledSoftmaxConfig(Hyperparameters):
    sample_ratio: float = 1.15  # tokens in a sample per distinct token among as many independent ones; 0: full softmax

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_ratio < 0:
            raise BadInput(f"sample_ratio = {self.sample_ratio}: expected at least 0")


class SampledSoftmax(Model):
    """Model whose training loss is over a random part S of a large vocabulary, drawn for each step.

        loss(y) = log(sum_(j in S) exp(z_j - log q_j)) - (z_y - log q_y)

    After Bengio & Senecal 2008 and Jean et al. 2015 (arXiv 1412.2007, sec. 3). S has the batch's own N targets, which
    are negatives for each other, and further tokens, together n: those with the largest log u_j + G_j, u the unigram
    distribution of the training text and G Gumbel noise, so drawn without replacement. With k the largest value that
    is not in S, j is in S with probability q_j = 1 - exp(-u_j (N + exp(-k))), all but exactly. Differs from Jean et
    al.: S is drawn anew for each step, by frequency, and n is sample_ratio times the number of distinct tokens among N
    independent ones, 512 at least. A batch has fewer, since a story repeats its words; of more than n the rest is not
    counted in this step. Where n would be half of the vocabulary or more, or logits have a bound, it is the full loss.

    Evaluation and decoding use the full softmax. To be combined with a phase's Model, before it.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        self._set_frequency(np.full(config.vocab_size, 1 / config.vocab_size))

    def prepare(self, train: np.ndarray, eos_id: int) -> np.ndarray:
        counts = np.bincount(np.asarray(train), minlength=self.config.vocab_size) + 1.0
        self._set_frequency(counts / counts.sum())
        return super().prepare(train, eos_id)

    def _set_frequency(self, u: np.ndarray) -> None:
        self._frequency, self._absent = mx.array(u.astype(np.float32)), np.log1p(-np.minimum(u, 1 - 1e-12))

    def sample_size(self, n_targets: int) -> int:
        """Return the number of tokens that the loss of so many targets is over; V: it is the full loss."""
        config: Any = self.config
        distinct = -np.expm1(n_targets * self._absent).sum()
        n = max(LEAST, math.ceil(config.sample_ratio * distinct))
        return n if config.sample_ratio and 2 * n < config.vocab_size else config.vocab_size

    def training_losses(self, h: mx.array, targets: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array]:
        """Return the mean loss over the sample, and an estimate of each target's full loss, without a gradient."""
        vocab_size, n = self.config.vocab_size, self.sample_size(targets.size)
        if n == vocab_size or self.head.softcap is not None:
            return super().training_losses(h, targets, ctx)
        sample, log_q = self.draw(targets, n)
        place = mx.full((vocab_size,), -1).at[sample].add(mx.arange(n) + 1)[targets]
        scored = (place >= 0) if ctx.scored is None else (place >= 0) & ctx.scored
        # One more column has the corrections: the logits are computed where the loss is.
        rows = mx.concatenate([self.head.matrix(self.embedding)[sample].astype(mx.float32), -log_q[:, None]], axis=1)
        h = mx.concatenate([h.astype(mx.float32), mx.ones((*h.shape[:-1], 1))], axis=-1)
        mean, losses = ops.mean_and_token_losses(h, rows, mx.maximum(place, 0), scored)
        share, q = mx.exp(-losses), mx.exp(log_q)[mx.maximum(place, 0)]
        own = share * q  # the sum over S has the target itself once, without a correction
        return mean, -mx.log(mx.maximum(own / mx.maximum(1 - share + own, 1e-20), 1e-20))

    def draw(self, targets: mx.array, n: int) -> tuple[mx.array, mx.array]:
        """Draw the n tokens of a step's sample, its targets first: their ids, and ln q of each, both (n,)."""
        u, y = self._frequency, targets.reshape(-1)
        noise = -mx.log(-mx.log(mx.random.uniform(low=1e-7, high=1 - 1e-7, shape=u.shape)))
        is_target = mx.zeros(u.shape).at[y].maximum(mx.ones(y.shape)) > 0
        value = mx.where(is_target, mx.inf, mx.log(u) + noise)
        order = mx.argsort(-value)
        sample, largest = order[:n], value[order[n]]
        q = -mx.expm1(-u[sample] * (y.size + mx.exp(-largest)))
        return sample, mx.log(q)
