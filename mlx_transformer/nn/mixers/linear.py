"""Linear attention: the softmax of the scores replaced by a product of features, hence a state of constant size."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_transformer import ops
from mlx_transformer.nn.attention import GroupedAttention
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.mixers.base import RecurrentMixer
from mlx_transformer.nn.mixers.recurrence import linear_recurrence, n_scores

_EPS = 1e-6  # added to the normalizer, as in the paper's code


class LinearAttention(RecurrentMixer, GroupedAttention):
    """o_i = phi(q_i)^T S_i / phi(q_i)^T z_i, S_i = sum_(j <= i) phi(k_j) v_j^T, z_i = sum_(j <= i) phi(k_j).

    Katharopoulos et al. 2020, arXiv 2006.16236, eq. 9-12 and 16-20, with phi(x) = elu(x) + 1 (eq. 7). Decoding keeps S
    and z (B, n_kv_heads, head_dim, head_dim + 1), whatever the length. Queries that share a head of keys share its
    state. A rotation by the Position comes before phi.
    """

    feature_map: Callable[[mx.array], mx.array] = staticmethod(ops.elu_plus_one)  # slot: elementwise and >= 0

    def build(self, config: Any) -> None:
        GroupedAttention.build(self, config)
        self.n_kv_heads = config.n_kv_heads

    def initial_state(self, batch: int) -> dict[str, mx.array]:
        return {"sums": mx.zeros((batch, self.n_kv_heads, 1, self.head_dim, self.head_dim + 1))}

    def n_kept(self, length: int, keeps_scores: bool) -> int:
        return 8 * self.n_heads * self.head_dim * length + 4 * n_scores(self.n_heads, length)

    def advance(self, x: mx.array, ctx: Ctx, state: dict[str, mx.array] | None) -> tuple[mx.array, dict[str, mx.array]]:
        q, k, v = self.project(x, ctx)
        q, k = self.condition(q, k, ctx)
        q, k = self.feature_map(q), self.feature_map(k)
        q = mx.unflatten(q, 1, (k.shape[1], -1))  # (B, n_kv_heads, group, L, head_dim)
        v = mx.concatenate([v, mx.ones_like(v[..., :1])], axis=-1)  # the last column sums the keys
        sums = None if state is None else state["sums"]
        o, sums = linear_recurrence(q, k[:, :, None], v[:, :, None].astype(mx.float32), state=sums)
        o = (o[..., :-1] / (o[..., -1:] + _EPS)).astype(x.dtype)
        return self.merge(o.flatten(1, 2)), {"sums": sums}


class SquaredReLUAttention(LinearAttention):
    """Linear attention with phi(x) = max(0, x)^2: sparse features, as of the activation of "Primer" (2109.08668).

    A token none of whose keys shares a feature with its query yields 0.
    """

    feature_map = staticmethod(ops.relu_squared)
