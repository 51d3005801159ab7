"""Sampled softmax: a training loss over a part of the vocabulary."""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transformer import ops
from mlx_transformer.nn.config import Hyperparameters
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.model import Model
from mlx_transformer.utils.errors import BadInput

LEAST = 768  # tokens of the vocabulary in a sample, by default


class SampledSoftmaxConfig(Hyperparameters):
    n_sampled: int = 0  # tokens of the vocabulary that a step's loss is over; 0: 3/16 of vocab_size, at least 768

    def __post_init__(self) -> None:
        self.derive("n_sampled", max(3 * self.vocab_size // 16, min(LEAST, self.vocab_size)))  # type: ignore[attr-defined]
        super().__post_init__()
        if self.n_sampled < 1:
            raise BadInput(f"n_sampled = {self.n_sampled}: expected a number of tokens, at least 1")


class SampledSoftmax(Model):
    """Model whose training loss is over a random part S of the vocabulary, drawn for each step.

        loss(y) = log(sum_(j in S) exp(z_j - log q_j)) - (z_y - log q_y)

    After Bengio & Senecal 2008 and Jean et al. 2015 (arXiv 1412.2007, sec. 3). S has the batch's own N targets, which
    are negatives for each other, and further tokens, together n_sampled: those with the largest log u_j + G_j, u the
    unigram distribution of the training text and G Gumbel noise, so drawn without replacement. With k the largest
    value that is not in S, j is in S with probability q_j = 1 - exp(-u_j (N + exp(-k))), all but exactly. Differs from
    Jean et al.: S is drawn anew for each step, and by frequency. If more than n_sampled tokens are targets, the rest is
    not counted in this step. If n_sampled is the whole vocabulary, it is the full loss.

    Evaluation and decoding use the full softmax. To be combined with a phase's Model, before it.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        self._frequency = mx.full((config.vocab_size,), 1 / config.vocab_size)

    def prepare(self, train: np.ndarray, eos_id: int) -> np.ndarray:
        counts = np.bincount(np.asarray(train), minlength=self.config.vocab_size) + 1.0
        self._frequency = mx.array((counts / counts.sum()).astype(np.float32))
        return super().prepare(train, eos_id)

    def training_losses(self, h: mx.array, targets: mx.array, ctx: Ctx) -> tuple[mx.array, mx.array]:
        """Return the mean loss over the sample, and an estimate of each target's full loss, without a gradient."""
        config: Any = self.config
        if config.n_sampled >= config.vocab_size:
            return super().training_losses(h, targets, ctx)
        sample, log_q = self.draw(targets, config.n_sampled)
        place = mx.full((config.vocab_size,), -1).at[sample].add(mx.arange(config.n_sampled) + 1)[targets]
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
