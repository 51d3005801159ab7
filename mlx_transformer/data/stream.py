"""Batches: the token array cut into sequences, shuffled per epoch and drawn ahead; and the validation sequences.

The same seed gives the same batches on every machine and with every NumPy: only raw Philox output is used, which
NumPy promises to keep (its shuffling methods it may change).
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlx_transformer.utils.errors import BadInput


class Batches(Iterator[np.ndarray]):
    """An endless stream of batches (batch_size, seq_len + 1) int32 from tokens (T,); from (T, C), with C rows each.

    Sequence i holds tokens i * seq_len ... (i + 1) * seq_len: the last of one sequence is the first of the next, so
    that with inputs [:, :-1] and targets [:, 1:] an epoch predicts each token once (except fewer than seq_len at the
    end of the text). The order of the sequences is drawn from (seed, epoch); a batch may hold the end of one epoch and
    the start of the next. `batch_size` may be a function of the number of tokens that the batches before predict.

    Raises BadInput if the tokens do not fill one sequence.
    """

    divided = False

    def __init__(self, tokens: np.ndarray, batch_size: int | Callable[[int], int], seq_len: int, seed: int = 0):
        if len(tokens) < seq_len + 1:
            raise BadInput(
                f"the training text has {len(tokens):,} tokens, fewer than one sequence of {seq_len + 1:,}; "
                "give a longer text or a smaller --seq-len"
            )
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.sequences_per_epoch = (len(tokens) - 1) // seq_len
        self._tokens = tokens
        self._columns = np.arange(seq_len + 1)
        self._seek(0, 0)

    def _seek(self, epoch: int, sequence: int) -> None:
        self._epoch, self._sequence = epoch, sequence
        self._order = permutation(self.sequences_per_epoch, self.seed, epoch)

    def __next__(self) -> np.ndarray:
        chosen: list[np.ndarray] = []
        missing = self.batch_size(self._predicted()) if callable(self.batch_size) else self.batch_size
        while missing:
            if self._sequence == self.sequences_per_epoch:
                self._seek(self._epoch + 1, 0)
            taken = self._order[self._sequence : self._sequence + missing]
            chosen.append(taken)
            self._sequence += len(taken)
            missing -= len(taken)
        starts = np.concatenate(chosen) * self.seq_len
        batch = self._tokens[starts[:, None] + self._columns].astype(np.int32)
        return batch if batch.ndim == 2 else np.moveaxis(batch, -1, 1)

    def _predicted(self) -> int:
        """Number of tokens that the batches so far predict."""
        return (self._epoch * self.sequences_per_epoch + self._sequence) * self.seq_len

    def state(self) -> dict[str, int]:
        """Return the position after the last batch; `batch_size` is not part of it."""
        return {"epoch": self._epoch, "row": self._sequence, "seed": self.seed, "seq_len": self.seq_len}

    def restore(self, state: dict[str, int]) -> None:
        """Go to a position that `state` returned. Raises BadInput if it belongs to another stream."""
        same_stream = (state["seed"], state["seq_len"]) == (self.seed, self.seq_len)
        if not same_stream or not 0 <= state["row"] <= self.sequences_per_epoch:
            raise BadInput(
                f"the data position {state} does not belong to this text, --seed {self.seed}, --seq-len {self.seq_len}"
            )
        self._seek(state["epoch"], state["row"])


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return a random order of range(n): the ranks of random 64-bit keys (equal keys keep their order)."""
    keys = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(n)
    return np.argsort(keys, kind="stable")


def validation_sequences(valid: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut valid (V,) into sequences in which every token but its first is a target once, and return them with a mask.

    sequences (N, seq_len + 1) int32: the last one is padded with EOS, which is the first token of `valid`.
    mask (N, seq_len) bool: True for the V - 1 targets sequences[:, 1:] that count.
    """
    n = -(-(len(valid) - 1) // seq_len)
    padded = np.full(n * seq_len + 1, valid[0], np.int32)
    padded[: len(valid)] = valid
    sequences = padded[np.arange(n)[:, None] * seq_len + np.arange(seq_len + 1)]
    mask = np.arange(n * seq_len).reshape(n, seq_len) < len(valid) - 1
    return sequences, mask


def validation_batches(valid: np.ndarray, seq_len: int, tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the validation sequences and their mask in batches of one shape, each of about so many tokens.

    The last batch is filled with sequences that do not count.
    """
    sequences, mask = validation_sequences(valid, seq_len)
    size = min(len(sequences), max(1, tokens // seq_len))
    short = -len(sequences) % size
    sequences = np.concatenate([sequences, np.repeat(sequences[:1], short, 0)])
    mask = np.concatenate([mask, np.zeros((short, seq_len), bool)])
    return [(sequences[i : i + size], mask[i : i + size]) for i in range(0, len(sequences), size)]


def predicted_tokens(batch: np.ndarray) -> int:
    """Count the targets of a batch (B, L + 1) or of pairs (B, 2, n): the last rows without the first and padding."""
    return int((batch.reshape(len(batch), -1, batch.shape[-1])[:, -1, 1:] >= 0).sum())


@dataclass(frozen=True)
class _Drawn:
    """A batch and the position after it, or the error that drawing it raised."""

    batch: np.ndarray | None
    state: dict[str, Any]
    error: BaseException | None = None


class Stream(Protocol):
    """An endless stream of batches that can tell and restore its position. divided: each rank gets its share only."""

    divided: bool

    def __next__(self) -> np.ndarray: ...

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position that `state` returned."""


class Prefetch(Iterator[np.ndarray]):
    """Batches drawn ahead by a thread, at most `depth` of them.

    `state` is the position after the last batch handed out, not the last one drawn. `next` raises what the thread
    raised. `close` ends the thread and may be called twice.
    """

    def __init__(self, batches: Stream, depth: int = 2):
        self._batches, self._position = batches, batches.state()
        self._queue: queue.Queue[_Drawn] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="prefetch", daemon=True)
        self._thread.start()

    def _draw(self) -> None:
        error: BaseException | None = None
        while error is None and not self._closed.is_set():
            batch = None
            try:
                batch = next(self._batches)
            except BaseException as raised:  # raised by the `next` that wants this batch
                error = raised
            self._put(_Drawn(batch, self._batches.state(), error))

    def _put(self, drawn: _Drawn) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(drawn, timeout=0.05)
                return
            except queue.Full:
                continue

    def __next__(self) -> np.ndarray:
        if self._closed.is_set():
            raise StopIteration
        drawn = self._queue.get()
        if drawn.batch is None:
            self.close()
            raise drawn.error or StopIteration
        self._position = drawn.state
        return drawn.batch

    def state(self) -> dict[str, Any]:
        return dict(self._position)

    def close(self) -> None:
        """End the thread and set the batches to the position after the last one handed out."""
        self._closed.set()
        self._thread.join()
        self._batches.restore(self._position)
