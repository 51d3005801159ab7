"""Evaluation: the loss of a model over a whole text."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_transformer.backend import divided_blas, split
from mlx_transformer.data.sources import check_column, open_source
from mlx_transformer.data.stream import validation_batches
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.data.tokens import encode_text
from mlx_transformer.nn.model import Model
from mlx_transformer.train.parallel import ALONE, Ranks
from mlx_transformer.utils.errors import BadInput

_BATCH_TOKENS = {"cpu": 8192, "gpu": 32_768}  # of an evaluation batch; a training step at base has 32,768


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `evaluate`."""

    tokens: int  # predicted: all of the text, document separators included
    nats_per_token: float
    perplexity: float  # exp(nats_per_token)
    bits_per_byte: float | None  # over the UTF-8 bytes without separators; None: the tokenizer is not lossless
    context_used: float  # mean share of the model's seq_len that precedes a predicted token


def evaluate(model: Model, tokenizer: Tokenizer, text: str | Path, *, text_column: str | None = None) -> Evaluation:
    """Evaluate a model on a text: the loss over every token, each predicted once.

    text: path of UTF-8 text with `<|endoftext|>` between documents, of .jsonl or .csv, also as .gz, or of a folder of
        them; or OWNER/NAME of a data set of the hub. It is encoded as a validation split is, then cut into sequences of
        the model's seq_len.
    text_column: key or column of .jsonl and .csv that holds the text; None: "text".

    The logits are computed in chunks, without dropout; the model's weights and mode do not change. Raises BadInput if
    the text is missing, not UTF-8, or empty, and for a translator.
    """
    if model.parallel:
        raise BadInput("this model translates and has no loss over a text: use python -m mlx_transformer evaluate")
    source = open_source(str(text), text_column, say=lambda message: None)
    check_column(text_column, source)
    tokens, facts = encode_text(source.parts(), tokenizer)
    evaluator = Evaluator(model, validation_batches(tokens, model.config.seq_len, batch_tokens()))
    with divided_blas():
        nats = evaluator()
    bits = nats * evaluator.tokens / math.log(2)
    return Evaluation(
        tokens=evaluator.tokens,
        nats_per_token=nats,
        perplexity=math.exp(nats) if nats < 700 else math.inf,
        bits_per_byte=bits / facts["valid_bytes"] if facts["lossless"] else None,
        context_used=evaluator.context_used(),
    )


def batch_tokens() -> int:
    """Return the tokens of an evaluation batch on this device."""
    return _BATCH_TOKENS["gpu" if on_gpu() else "cpu"]


def on_gpu() -> bool:
    """Whether MLX computes on a GPU by default."""
    return mx.default_device().type == mx.DeviceType.gpu


@contextmanager
def without_dropout(model: Model) -> Iterator[None]:
    """Put the model in evaluation mode inside a `with` block; then it is in its own mode again."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Evaluator:
    """The loss of a model over batches of sequences, each with the mask of the targets that count.

    ranks: those among which the batches are dealt out.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[tuple[np.ndarray, np.ndarray]],
        *,
        compiled: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.batches, self.ranks = model, batches, ranks
        self.tokens = sum(int(mask.sum()) for _, mask in batches)
        self._function = mx.compile(self._total, inputs=[model.state]) if compiled else self._total

    def __call__(self) -> float:
        """Compute nats per token of the model's present weights, without dropout."""
        # A GPU works through a queue of batches and is waited for once; on a CPU all would be in memory at once.
        compute = mx.async_eval if on_gpu() else mx.eval
        totals = []
        with without_dropout(self.model):
            for sequences, mask in self.batches[self.ranks.share :: self.ranks.shares]:
                self.ranks.advance("evaluating")
                totals.append(self._totals(mx.array(sequences), mx.array(mask)))
                compute(totals[-1])
        total = 0.0
        for parts in totals:
            nats: list[float] = [part.item() for part in parts]  # type: ignore[misc]
            total += sum(nats)
        return sum(self.ranks.gather(total)[: self.ranks.shares]) / self.tokens

    def context_used(self) -> float:
        """Compute the mean share of seq_len that precedes a predicted token, of sequences of one length."""
        counted = sum(mask.sum(axis=0) for _, mask in self.batches)
        before = np.arange(1, len(counted) + 1)  # the inputs that a sequence's target j follows
        return float((counted * before).sum() / self.tokens / len(counted))

    def _total(self, sequences: mx.array, mask: mx.array) -> mx.array:
        ctx, targets = self.model.inputs(sequences)
        return (self.model.evaluation_loss(self.model.hidden(ctx), targets, ctx) * mask).sum()

    def _totals(self, sequences: mx.array, mask: mx.array) -> list[mx.array]:
        """Sum the losses, in nats, of each stream's part of the sequences, lazily."""
        if self.model.in_parts:  # whose messages are to keep one order
            return [self._function(sequences, mask)]
        totals = []
        for (stream, part, _), (_, counted, _) in zip(split(sequences), split(mask), strict=True):
            with mx.stream(stream):
                totals.append(self._function(part, counted))
        return totals
