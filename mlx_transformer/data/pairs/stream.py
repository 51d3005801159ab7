"""Pairs as token ids, in batches of similar lengths, padded: (B, 2, n), of which row 0 is the source, row 1 the target.

source   tokens EOS padding
target   BOS tokens EOS padding      inputs [:-1], targets [1:]
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_transformer.data.corpus import Corpus, Say
from mlx_transformer.data.pairs.corpus import TESTS, Pair, read_pairs
from mlx_transformer.data.stream import permutation
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.nn.translator import PAD
from mlx_transformer.utils.errors import BadInput

WIDTH = 8  # pairs are padded to a multiple of this: few shapes, each of which is compiled


class Sentences(Sequence[np.ndarray]):
    """Token ids of many sentences, in one array."""

    def __init__(self, sentences: Sequence[Sequence[int]]) -> None:
        self.lengths = np.array([len(one) for one in sentences], np.int64)
        self.ends = np.cumsum(self.lengths)
        self.ids = np.fromiter((token for one in sentences for token in one), np.int32, int(self.lengths.sum()))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: Any) -> Any:
        return self.ids[self.ends[i] - self.lengths[i] : self.ends[i]]


@dataclass(frozen=True)
class Side:
    """The sources and the targets of a split, as rows of a batch are before padding."""

    sources: Sentences
    targets: Sentences

    @property
    def widths(self) -> np.ndarray:
        """Return the padded length of each pair, (N,)."""
        longest = np.maximum(self.sources.lengths, self.targets.lengths)
        return -(-longest // WIDTH) * WIDTH

    @property
    def predicted(self) -> int:
        """Number of target tokens, EOS included."""
        return int((self.targets.lengths - 1).sum())

    def batch(self, chosen: Sequence[int] | np.ndarray, width: int) -> np.ndarray:
        """Return pairs as an array (B, 2, width) int32."""
        padded = np.full((len(chosen), 2, width), PAD, np.int32)
        for row, i in enumerate(chosen):
            for column, sentences in enumerate((self.sources, self.targets)):
                tokens = sentences[i]
                padded[row, column, : len(tokens)] = tokens
        return padded

    def in_order(self, tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return all pairs in batches (B, 2, n) of about so many tokens, with the masks (B, n - 1) of what counts.

        The last batch of a width is filled with pairs that do not count, so that each width has one shape.
        """
        widths, found = self.widths, []
        for width in np.unique(widths).tolist():
            own = np.flatnonzero(widths == width)
            size = min(len(own), max(1, tokens // width))
            for start in range(0, len(own), size):
                chosen = own[start : start + size]
                batch = self.batch(np.resize(chosen, size), width)
                mask = batch[:, 1, 1:] != PAD
                mask[len(chosen) :] = False
                found.append((batch, mask))
        return found


@dataclass(frozen=True)
class PairTokens:
    """A tokenized parallel corpus: what `Tokens` is of a text."""

    train: Side
    valid: Side
    eos_id: int
    valid_bytes: int  # UTF-8, of the validation targets: the denominator of bits per byte
    valid_documents: int
    unknown_rate: float  # share of unknown tokens in the validation targets
    lossless: bool  # every validation target is decoded unchanged
    tests: dict[str, list[Pair]]  # name -> pairs to translate: "held out", and "longer" where there are any
    tokenizer: Tokenizer
    floor_bits: float | None  # -log2 of the probability of the validation targets; 0: sources determine them

    @property
    def epoch_tokens(self) -> int:
        """Target tokens of an epoch."""
        return self.train.predicted

    @property
    def valid_tokens(self) -> int:
        """Target tokens that evaluation predicts."""
        return self.valid.predicted

    def batches(self, batch_size: int | Callable[[int], int], seq_len: int, seed: int) -> "PairBatches":
        """Return the training stream; batch_size: in sequences of seq_len tokens."""
        return PairBatches(self.train, batch_size, seq_len, seed)

    def validation(self, seq_len: int, tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the validation pairs as `Side.in_order`."""
        return self.valid.in_order(tokens)


class PairBatches(Iterator[np.ndarray]):
    """An endless stream of batches (B, 2, n) int32, each of pairs of one width n, of about as many tokens each.

    The pairs of a width are shuffled for each pass over them, from (seed, pass, width); the next batch is of the width
    of which the smallest part has been drawn, so that after an epoch each pair has been drawn once, up to a batch.
    """

    divided = False

    def __init__(self, side: Side, batch_size: int | Callable[[int], int], seq_len: int, seed: int = 0) -> None:
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self._side, widths = side, side.widths
        self._pairs = {width: np.flatnonzero(widths == width) for width in np.unique(widths).tolist()}
        self._drawn, self._predicted = dict.fromkeys(self._pairs, 0), 0
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __next__(self) -> np.ndarray:
        width = min(self._pairs, key=lambda width: self._drawn[width] / len(self._pairs[width]))
        sequences = self.batch_size(self._predicted) if callable(self.batch_size) else self.batch_size
        missing, chosen = max(1, sequences * self.seq_len // width), []
        while missing:
            epoch, row = divmod(self._drawn[width], len(self._pairs[width]))
            taken = self._order(width, epoch)[row : row + missing]
            chosen.append(taken)
            missing -= len(taken)
            self._drawn[width] += len(taken)
        batch = self._side.batch(np.concatenate(chosen).tolist(), width)
        self._predicted += int((batch[:, 1, 1:] != PAD).sum())
        return batch

    def _order(self, width: int, epoch: int) -> np.ndarray:
        if (width, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != width}
            pairs = self._pairs[width]
            self._orders[width, epoch] = pairs[permutation(len(pairs), self.seed + (width << 32), epoch)]
        return self._orders[width, epoch]

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch; `batch_size` is not part of it."""
        drawn = {str(width): count for width, count in self._drawn.items()}
        return {"drawn": drawn, "predicted": self._predicted, "seed": self.seed, "seq_len": self.seq_len}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position that `state` returned. Raises BadInput if it belongs to another stream."""
        drawn = {int(width): count for width, count in state.get("drawn", {}).items()}
        same = (state["seed"], state["seq_len"]) == (self.seed, self.seq_len) and drawn.keys() == self._pairs.keys()
        if not same:
            raise BadInput(
                f"the data position {state} does not belong to these pairs, --seed {self.seed}, "
                f"--seq-len {self.seq_len}"
            )
        self._drawn, self._predicted = drawn, state["predicted"]


def tokenize_pairs(corpus: Corpus, tokenizer: Tokenizer, seq_len: int, say: Say = print) -> PairTokens:
    """Tokenize a parallel corpus; pairs of which a side has more than seq_len tokens, EOS included, are left out.

    Says how many. Raises BadInput if none is left.
    """
    train, _ = encode_pairs(read_pairs(corpus, "train"), tokenizer, seq_len, say, "training ")
    valid, pairs = encode_pairs(read_pairs(corpus, "valid"), tokenizer, seq_len, say, "validation ")
    targets = [target for _, target in pairs]
    ids = [token for i in range(len(pairs)) for token in valid.targets[i][1:-1].tolist()]
    tests = {name: read_pairs(corpus, split) for name, split in TESTS.items()}
    tests["held out"] = tests["held out"] or pairs
    return PairTokens(
        train=train,
        valid=valid,
        eos_id=tokenizer.eos_id,
        valid_bytes=sum(len(target.encode()) for target in targets),
        valid_documents=len(pairs),
        unknown_rate=sum(token == tokenizer.unk_id for token in ids) / max(1, len(ids)),
        lossless=tokenizer.lossless
        and all(tokenizer.decode(valid.targets[i].tolist()) == target for i, target in enumerate(targets)),
        tests={name: found for name, found in tests.items() if found},
        tokenizer=tokenizer,
        floor_bits=corpus.floor_bits if len(pairs) == corpus.valid_documents else None,
    )


def encode_sources(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the rows of sources, before padding."""
    return [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: Tokenizer, seq_len: int, say: Say, what: str = ""
) -> tuple[Side, list[Pair]]:
    """Return the rows of pairs, and the pairs, without those that are too long. Raises BadInput if none is left."""
    sources = encode_sources(tokenizer, [source for source, _ in pairs])
    targets = [
        [tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch([target for _, target in pairs])
    ]
    fitting = [i for i in range(len(pairs)) if max(len(sources[i]), len(targets[i]) - 1) <= seq_len]
    if over := len(pairs) - len(fitting):
        say(f"{over:,} of {len(pairs):,} {what}pairs have more than {seq_len} tokens on a side and are left out")
    if not fitting:
        raise BadInput(f"no {what}pair has at most {seq_len} tokens on each side; give a larger --seq-len")
    return Side(Sentences([sources[i] for i in fitting]), Sentences([targets[i] for i in fitting])), [
        pairs[i] for i in fitting
    ]
