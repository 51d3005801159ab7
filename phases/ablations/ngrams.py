"""Branches of phase 6 that look up n-grams: hashed tables in the residual stream, and an expert that counts."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transformer import nn
from mlx_transformer.data.ngrams import Level, kneser_ney_held_out
from mlx_transformer.utils.errors import BadInput

MAX_ORDER = 16  # each further order counts about as many n-grams as the text has tokens
FOLDS = 4  # a training token's probability is counted on the three quarters of the text without it
MAX_TOKENS = 50_000_000  # of the training text; looking its n-grams up takes some 50 bytes for each


class TablesConfig(nn.Hyperparameters):
    ngram_rows: int = 0  # rows of the table of bigrams, and of that of trigrams; 0: five times vocab_size

    def __post_init__(self) -> None:
        self.derive("ngram_rows", 5 * self.vocab_size)  # type: ignore[attr-defined]
        super().__post_init__()


class ExpertConfig(nn.Hyperparameters):
    ngram_order: int = 5  # tokens of the longest n-gram that is counted
    ngram_tokens: int = 2_000_000  # tokens at the start of the training text that are counted

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.ngram_order <= MAX_ORDER:
            raise BadInput(f"ngram_order = {self.ngram_order}: expected 2 to {MAX_ORDER}")


class Tables(nn.Model):
    """A model that adds vectors of the last two and three tokens before every block and before the head."""

    n_recent = 3

    def build(self, config: Any) -> None:
        super().build(config)
        self.ngrams = [nn.NGramTable(config, n) for n in (2, 3)]

    def run_blocks(self, x: mx.array, ctx: nn.Ctx) -> mx.array:
        assert ctx.recent is not None, "set by Model.context"
        grams = [table(ctx.recent) for table in self.ngrams]
        stack = self.stack()
        for depth in range(len(stack) + 1):
            for table, gram in zip(self.ngrams, grams, strict=True):
                x = table.add(x, gram, depth)
            if depth < len(stack):
                x = self.run_block(stack[depth], x, ctx.at(depth))
        return x


class Expert(nn.Model):
    """A model mixed with an n-gram model of the training text.

    The network learns by its own cross-entropy, the gate by the mixture's; the mixture predicts.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        self.n_recent = max(self.n_recent, config.ngram_order - 1)
        self.expert = nn.NGramExpert(config)

    def prepare(self, train: np.ndarray, eos_id: int) -> np.ndarray:
        train = super().prepare(train, eos_id)
        if len(train) > MAX_TOKENS:
            raise BadInput(
                f"the training text has {len(train):,} tokens: the n-gram expert looks up at most {MAX_TOKENS:,}; "
                "give fewer --stories"
            )
        config: Any = self.config
        vocab_size, order = config.vocab_size, config.ngram_order
        text, further = np.split(train, [config.ngram_tokens])
        counted, log_prob = kneser_ney_held_out(text, vocab_size, eos_id, order, FOLDS)
        self.expert.set_counts(
            mx.array(counted.unigram.astype(np.float32)), [_arrays(level, vocab_size) for level in counted.levels]
        )
        if len(further):  # is held out anyway
            log_prob = np.concatenate([log_prob, counted.log_prob(np.concatenate([[eos_id], further]))])
        return np.stack([log_prob.astype(np.float32).view(np.int32), np.asarray(train, np.int32)], axis=1)

    def tables(self) -> dict[str, mx.array]:
        unigram, levels = self.expert.counts()
        orders = ({f"order_{n}.{name}": array for name, array in arrays.items()} for n, arrays in enumerate(levels, 2))
        return {"unigram": unigram, **{name: array for arrays in orders for name, array in arrays.items()}}

    def load_tables(self, arrays: dict[str, mx.array]) -> None:
        if arrays.get("unigram", mx.zeros(0)).size != self.config.vocab_size:
            raise BadInput("the counts of the n-gram expert are missing or of another vocabulary")
        levels: dict[int, dict[str, mx.array]] = {}
        for name, array in arrays.items():
            if name != "unigram":
                order, _, what = name.removeprefix("order_").partition(".")
                levels.setdefault(int(order), {})[what] = array
        self.expert.set_counts(arrays["unigram"], [levels[n] for n in sorted(levels)])

    def inputs(self, batch: mx.array) -> tuple[nn.Ctx, mx.array]:
        if batch.ndim == 2:
            return super().inputs(batch)
        ctx, targets = super().inputs(batch[:, 1])
        return replace(ctx, target_log_prob=mx.view(batch[:, 0, 1:], mx.float32)), targets

    def objective(self, h: mx.array, targets: mx.array, ctx: nn.Ctx) -> mx.array:
        loss, nats = self.training_losses(h, targets, ctx)
        assert ctx.recent is not None, "set by Model.context"
        known, h = ctx.target_log_prob, mx.stop_gradient(h)
        p = self.expert.probability(ctx.recent, targets) if known is None else mx.exp(known)
        mixed = -self.expert.mix(h, -nats, p, ctx.recent, targets)
        scored = ctx.scored
        mean = mixed.mean() if scored is None else (mixed * scored).sum() / mx.maximum(scored.sum(), 1)
        ctx.record("mixture_loss", mean, weight=1.0)
        ctx.record("gate", self.expert.network_share(h, ctx.recent).mean())
        return super().objective(h, targets, ctx) if self.label_smoothing else loss

    def predict(self, h: mx.array, ctx: nn.Ctx) -> mx.array:
        assert ctx.recent is not None, "set by Model.context"
        logits = super().predict(h, ctx).astype(mx.float32)
        log_network = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return self.expert.mix(h, log_network, self.expert.distribution(ctx.recent), ctx.recent).astype(h.dtype)

    def evaluation_loss(self, h: mx.array, targets: mx.array, ctx: nn.Ctx) -> mx.array:
        assert ctx.recent is not None, "set by Model.context"
        nats = super().evaluation_loss(h, targets, ctx)
        return -self.expert.mix(h, -nats, self.expert.probability(ctx.recent, targets), ctx.recent, targets)


class CachedExpert(Expert):
    """Expert whose mixture also counts the sequence itself: its last `seq_len` tokens."""

    def build(self, config: Any) -> None:
        super().build(config)
        self.n_recent = max(self.n_recent, config.seq_len)
        self.expert = nn.CachedNGramExpert(config)


def _arrays(level: Level, vocab_size: int) -> dict[str, mx.array]:
    """Return the arrays of an order as `nn.CountedLevel` has them."""
    contexts, tokens = np.divmod(level.keys, vocab_size)
    starts = np.searchsorted(contexts, np.arange(len(level.backoffs) + 1))
    return {
        "starts": mx.array(starts.astype(np.int32)),
        "tokens": mx.array(tokens.astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)),
        "gains": mx.array(level.gains.astype(np.float32)),
        "backoffs": mx.array(level.backoffs.astype(np.float32)),
    }
