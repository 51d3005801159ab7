"""Batches: the token stream cut into rows, shuffled per epoch, prefetched; and the validation rows.

The same seed gives the same batches on every machine and with every NumPy: only raw Philox output is used, which
NumPy promises to keep (its shuffling methods it may change).
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mlx_transformer.utils.errors import BadInput


class Batches(Iterator[np.ndarray]):
    """An endless stream of batches (rows, seq_len + 1) int32 from tokens (T,).

    Row i holds pieces i * seq_len ... (i + 1) * seq_len: the last of one row is the first of the next, so that with
    inputs row[:-1] and targets row[1:] each piece is predicted once an epoch (but for fewer than seq_len at the end of
    the text). Rows come in an order drawn from (seed, epoch); a batch may hold the end of one epoch and the start of
    the next. `rows` may depend on how many pieces the batches before predict. Raises BadInput if the tokens do not
    fill one row.
    """

    def __init__(self, tokens: np.ndarray, rows: int | Callable[[int], int], seq_len: int, seed: int = 0):
        if len(tokens) < seq_len + 1:
            raise BadInput(
                f"the training text has {len(tokens):,} pieces, fewer than one row of {seq_len + 1:,}; "
                "give a longer text or a smaller --seq-len"
            )
        self.rows, self.seq_len, self.seed = rows, seq_len, seed
        self.rows_per_epoch = (len(tokens) - 1) // seq_len
        self._tokens = tokens
        self._columns = np.arange(seq_len + 1)
        self._start(0, 0)

    def _start(self, epoch: int, row: int) -> None:
        self._epoch, self._row = epoch, row
        self._order = _permutation(self.rows_per_epoch, self.seed, epoch)

    def __next__(self) -> np.ndarray:
        chosen: list[np.ndarray] = []
        missing = self.rows(self._predicted()) if callable(self.rows) else self.rows
        while missing:
            if self._row == self.rows_per_epoch:
                self._start(self._epoch + 1, 0)
            taken = self._order[self._row : self._row + missing]
            chosen.append(taken)
            self._row += len(taken)
            missing -= len(taken)
        starts = np.concatenate(chosen) * self.seq_len
        return self._tokens[starts[:, None] + self._columns].astype(np.int32)

    def _predicted(self) -> int:
        """Pieces that the batches so far predict."""
        return (self._epoch * self.rows_per_epoch + self._row) * self.seq_len

    def state(self) -> dict[str, int]:
        """The position behind the last batch; `rows` is not part of it."""
        return {"epoch": self._epoch, "row": self._row, "seed": self.seed, "seq_len": self.seq_len}

    def restore(self, state: dict[str, int]) -> None:
        """Go to a position that `state` gave. Raises BadInput if it is one of another stream."""
        if (state["seed"], state["seq_len"]) != (self.seed, self.seq_len) or not 0 <= state[
            "row"
        ] <= self.rows_per_epoch:
            raise BadInput(
                f"the data position {state} does not belong to this text, --seed {self.seed}, --seq-len {self.seq_len}"
            )
        self._start(state["epoch"], state["row"])


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A random order of range(n): the ranks of random 64-bit keys (equal keys, were there any, keep their order)."""
    keys = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(n)
    return np.argsort(keys, kind="stable")


def validation_rows(valid: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, seq_len + 1) int32 in which every piece of valid (V,) but its first is a target once, and a mask.

    The mask (N, seq_len) bool is True for the V - 1 targets row[1:] that count; the last row is filled up with the
    boundary, which is the first piece of `valid`.
    """
    n = -(-(len(valid) - 1) // seq_len)
    padded = np.full(n * seq_len + 1, valid[0], np.int32)
    padded[: len(valid)] = valid
    rows = padded[np.arange(n)[:, None] * seq_len + np.arange(seq_len + 1)]
    mask = np.arange(n * seq_len).reshape(n, seq_len) < len(valid) - 1
    return rows, mask


@dataclass(frozen=True)
class _Drawn:
    """A batch and the position behind it, or the error that came in its place."""

    batch: np.ndarray | None
    state: dict[str, int]
    error: BaseException | None = None


class Prefetch(Iterator[np.ndarray]):
    """Batches drawn ahead by a thread. `state` is that of the batches handed out, not of those drawn.

    `close` ends the thread and may be called twice. What the thread raises is raised by `next`.
    """

    def __init__(self, batches: Batches, depth: int = 2):
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
            except BaseException as raised:  # handed over to whoever asks for the batch
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

    def state(self) -> dict[str, int]:
        return dict(self._position)

    def close(self) -> None:
        """End the thread; the batches stand behind the last one handed out."""
        self._closed.set()
        self._thread.join()
        self._batches.restore(self._position)
