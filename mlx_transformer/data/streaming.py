"""Batches of a text that is read while a model trains: each rank reads files of its own, through a buffer.

The files of an epoch come in an order drawn from the seed and are dealt out among lanes, one for each rank. A lane
reads its files one after another into buffers of BUFFER_TOKENS, of which the sequences are shuffled. In memory are the
buffer that is trained on and the next one, which a thread fills. A position is that of the buffer's first document and
the number of its sequences so far, so that a resumed run reads the same buffer again and has the same batches.
"""

import functools
import hashlib
import threading
from array import array
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlx_transformer.data.chunks import Chunk, chunks, encode_chunks
from mlx_transformer.data.documents import Part, digests
from mlx_transformer.data.shards import Ahead, Shards, check_count
from mlx_transformer.data.stream import permutation
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.utils.errors import BadInput, RunFailed

BUFFER_TOKENS = 2 << 20  # 8 MB of text or so: of several thousand documents
_CHARACTERS = 1 << 20  # per call of the tokenizer

Files = tuple[tuple[int, int], ...]  # of the rest of an epoch: number of the file, chunks of it to leave out


class Position(NamedTuple):
    """A place in a lane's text, between two chunks of a document."""

    epoch: int
    done: int  # chunks of the first file that have been read
    files: Files  # of this epoch, that one included


class Buffer(NamedTuple):
    """Token ids between two positions, and the order in which their sequences are drawn."""

    tokens: np.ndarray
    order: np.ndarray
    start: Position
    end: Position


@dataclass(frozen=True)
class Text:
    """What is streamed. banned: digests of validation documents, which are left out."""

    shards: Shards
    tokenizer: Tokenizer
    banned: Set[bytes]

    def deal(self, seed: int, epoch: int, lane: int, lanes: int) -> Files:
        """Return a lane's files of an epoch."""
        return tuple((file, 0) for file in permutation(len(self.shards), seed, epoch)[lane::lanes].tolist())

    def chunks(self, file: int) -> Iterator[Chunk]:
        """Yield the chunks of a file's documents."""
        return chunks(without(self.shards.open(file).parts(), self.banned), self.tokenizer)


def without(parts: Iterator[Part], banned: Set[bytes]) -> Iterator[Part]:
    """Leave out documents with a banned digest; of a long one in several parts the digest is not known in time."""
    begins = True
    for text, ends in parts:
        if not (begins and ends and digests([(text, True)])[0] in banned):
            yield text, ends
        begins = ends


class _Lane:
    """The reader of one share of the files."""

    def __init__(self, text: Text, seq_len: int, deal: Callable[[int], Files], seed: int, turn: threading.Lock) -> None:
        self._text, self._seq_len, self._deal, self._seed, self._turn = text, seq_len, deal, seed, turn
        self.seek(Position(0, 0, deal(0)), 0)

    def seek(self, start: Position, row: int) -> None:
        """Go to a sequence of the buffer that begins at a position; it is read when it is wanted."""
        self.start, self.row = start, row
        self._buffer: Buffer | None = None
        self._next: Ahead[Buffer] | None = None
        self._chunks = self._read(start)

    def take(self, count: int) -> Iterator[np.ndarray]:
        """Yield the next sequences (n, seq_len + 1), count in total."""
        columns = np.arange(self._seq_len + 1)
        while count:
            buffer = self._current()
            chosen = buffer.order[self.row : self.row + count]
            self.row += len(chosen)
            count -= len(chosen)
            yield buffer.tokens[chosen[:, None] * self._seq_len + columns].astype(np.int32)

    def held_tokens(self) -> int:
        """Return the tokens in memory."""
        buffers = [self._buffer, self._next.result() if self._next is not None else None]
        return sum(len(buffer.tokens) for buffer in buffers if buffer is not None)

    def _current(self) -> Buffer:
        while self._buffer is None or self.row >= len(self._buffer.order):
            coming = self._next or self._ahead(self.start)
            if self._buffer is not None:
                self.row = 0
            self._buffer = coming.result()
            self.start = self._buffer.start
            self._next = self._ahead(self._buffer.end)
        return self._buffer

    def _ahead(self, start: Position) -> Ahead[Buffer]:
        return Ahead(functools.partial(self._fill, start, self._chunks))

    def _fill(self, start: Position, found: Iterator[tuple[Chunk, bool, Position]]) -> Buffer:
        """Read documents until a buffer is full, or its epoch ends."""
        eos, bos = self._text.tokenizer.eos_id, self._text.tokenizer.bos_id
        tokens, end = array("I", [eos]), start
        with self._turn:  # one lane of a process at a time, since tokens as Python lists take much memory
            while len(tokens) <= BUFFER_TOKENS and (end.epoch == start.epoch or len(tokens) <= self._seq_len):
                batch, size, begun = [], 0, []
                while size < _CHARACTERS and (end.epoch == start.epoch or not size):
                    chunk, begins, end = next(found)
                    batch.append(chunk)
                    begun.append(begins and bos != eos)
                    size += len(chunk.text) + 1
                for chunk, begins, encoded in zip(
                    batch, begun, encode_chunks(batch, self._text.tokenizer), strict=True
                ):
                    tokens.extend([bos] * begins + encoded + [eos] * chunk.ends)
        sequences = (len(tokens) - 1) // self._seq_len
        place = repr((start.epoch, start.done, start.files[:1]))
        key = hashlib.blake2b(place.encode(), digest_size=8).digest()
        dtype = np.uint16 if self._text.tokenizer.vocab_size <= 65_536 else np.uint32
        order = permutation(sequences, self._seed, int.from_bytes(key, "little"))
        return Buffer(np.array(tokens, dtype), order, start, end)

    def _read(self, start: Position) -> Iterator[tuple[Chunk, bool, Position]]:
        """Yield chunks without end: each with whether it begins a document, and the position after it."""
        epoch, skip, files = start
        found = True
        while True:
            if not files:
                if not found:
                    raise RunFailed(f"{self._text.shards.label} holds nothing but documents of the validation text")
                epoch, found = epoch + 1, False
                files = self._deal(epoch)
                continue
            file, more = files[0]
            skip, begins = skip + more, True
            if len(files) > 1:
                self._text.shards.expect(files[1][0])
            following = Position(epoch, 0, files[1:]) if files[1:] else Position(epoch + 1, 0, self._deal(epoch + 1))
            held: tuple[Chunk, bool] | None = None
            for count, chunk in enumerate(self._text.chunks(file)):
                if held is not None:
                    yield *held, Position(epoch, count, ((file, 0), *files[1:]))
                    held = None
                if count >= skip:
                    held, found = (chunk, begins), True
                begins = chunk.ends
            if held is not None:
                yield *held, following
            skip, files = 0, files[1:]


class ShardBatches(Iterator[np.ndarray]):
    """An endless stream of a rank's share of batches: (batch_size / ranks, seq_len + 1) int32.

    batch_size: of all ranks, or a function of the number of tokens that the batches before predict.

    Raises BadInput for more ranks than files; `next` raises RunFailed where a file cannot be read.
    """

    divided = True

    def __init__(
        self,
        text: Text,
        batch_size: int | Callable[[int], int],
        seq_len: int,
        seed: int = 0,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        check_count(text.shards, ranks)
        self.text, self.batch_size, self.seq_len, self.seed, self.rank, self.ranks = (
            *(text, batch_size, seq_len, seed, rank, ranks),
        )
        self._turn = threading.Lock()
        self._predicted = 0
        self._make_lanes(ranks)

    def _make_lanes(self, count: int) -> None:
        """Make this rank's share of so many lanes, at their beginning."""
        share = count // self.ranks
        self._count = count
        self._lanes = [
            _Lane(
                self.text,
                self.seq_len,
                functools.partial(self.text.deal, self.seed, lane=lane, lanes=count),
                self.seed,
                self._turn,
            )
            for lane in range(self.rank * share, (self.rank + 1) * share)
        ]

    def __next__(self) -> np.ndarray:
        size = self.batch_size(self._predicted) if callable(self.batch_size) else self.batch_size
        try:
            sequences = [part for lane in self._lanes for part in lane.take(size // self._count)]
        except (BadInput, RunFailed) as error:
            raise RunFailed(f"{error}; the last checkpoint is whole, --resume reads on from there") from error
        self._predicted += size * self.seq_len
        return np.concatenate(sequences)

    def held_tokens(self) -> int:
        """Return the tokens in memory."""
        return sum(lane.held_tokens() for lane in self._lanes)

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch, with those of this rank's lanes."""
        lanes = [{**lane.start._asdict(), "row": lane.row} for lane in self._lanes]
        facts = {"predicted": self._predicted, "seed": self.seed, "seq_len": self.seq_len}
        return {**facts, "lanes": lanes, "rank": self.rank}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position that `state` returned, or to one with the lanes of all ranks, in order, and no rank.

        If the ranks are as many as before, or a divisor, the batches are the same. Otherwise the rest of the epoch is
        dealt out anew, each lane's buffer from its beginning. Raises BadInput for a position in another text.
        """
        same = (state.get("seed"), state.get("seq_len")) == (self.seed, self.seq_len) and state.get("lanes")
        if not same or any(file >= len(self.text.shards) for lane in state["lanes"] for file, _ in lane["files"]):
            raise BadInput(
                f"the data position does not belong to this text, --seed {self.seed}, --seq-len {self.seq_len}"
            )
        self._predicted = state["predicted"]
        lanes = [(_position(lane), lane["row"]) for lane in state["lanes"]]
        if "rank" not in state:
            if len(lanes) % self.ranks:
                lanes = _deal_anew([place for place, _ in lanes], self.ranks)
            self._make_lanes(len(lanes))
            lanes = lanes[self.rank * len(self._lanes) :][: len(self._lanes)]
        for lane, place in zip(self._lanes, lanes, strict=True):
            lane.seek(*place)


def _position(lane: dict[str, Any]) -> Position:
    return Position(lane["epoch"], lane["done"], tuple((file, skip) for file, skip in lane["files"]))


def _deal_anew(places: list[Position], lanes: int) -> list[tuple[Position, int]]:
    """Deal what is left of an epoch out among another number of lanes, begun files first."""
    epoch = min(place.epoch for place in places)
    begun = [(place.files[0][0], place.files[0][1] + place.done) for place in places if place.epoch == epoch]
    rest = [file for place in places if place.epoch == epoch for file in place.files[1:]]
    left = sorted(begun, key=lambda file: -file[1]) + rest
    return [(Position(epoch, 0, tuple(left[lane::lanes])), 0) for lane in range(lanes)]
