"""Training by several processes (ranks) over mlx.distributed: each computes its share of the same batch.

The one place that communicates. What a batch computes is the same as in one process: every rank has all weights, reads
the sequences of its share, and the mean of the gradients over all ranks updates the weights of each. Models, recipes
and phases know nothing of it.
"""

import copy
import hashlib
import itertools
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, TypeVar

import mlx.core as mx
import numpy as np

from mlx_transformer.backend import Launch, launched
from mlx_transformer.train import watch
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.watch import Watch
from mlx_transformer.utils.errors import BadInput, RunFailed, exit_code

Arrays = dict[str, mx.array]
Keep = Callable[[str, mx.array], mx.array | None]
T = TypeVar("T")
BUCKET_BYTES = 8 << 20  # of one all-reduce: few messages, of which the first begins while gradients are computed
PROBE_EVERY = 20  # steps between two of which the communication is timed, which must wait for the gradients
_BROKEN = "a collective operation returned what no rank has sent"
_SECOND_SEED = 0x9E3779B97F4A7C15  # of the ranks after the first: 2^64 over the golden ratio


class Signals(NamedTuple):
    """What the ranks tell each other with the gradients of a step, so that all act alike after it."""

    stop: float = 0.0  # a rank is to stop
    save: float = 0.0  # rank 0: a checkpoint is due by the clock
    seconds: float = 0.0  # rank 0: of training so far


class Ranks:
    """The ranks that train one model, and this one's place among them. `ALONE` is a process by itself."""

    def __init__(self, group: mx.distributed.Group | None = None, backend: str = "", own: Watch | None = None) -> None:
        self.group, self.backend, self.watch = group, backend, own
        self.rank, self.size = (group.rank(), group.size()) if group is not None else (0, 1)
        self.shares = self.size  # of a batch: one for each rank, unless each has a part of the model instead
        self.communication_seconds = 0.0  # of the last step, if it was timed
        self.probe_every = PROBE_EVERY
        self.messages = self.message_bytes = 0  # of the last mean
        self._steps = 0
        self._gathers = itertools.count(1)  # of this rank, its copies included
        # A ring sends from a thread of the CPU; with a stream of its own it does not wait for the rest of the step.
        self._stream = mx.new_stream(mx.cpu) if self.size > 1 and backend != "nccl" else None

    def part(self, batch: np.ndarray) -> np.ndarray:
        """Return this rank's share of a batch (B, ...)."""
        size = len(batch) // self.shares
        return batch[self.share * size : (self.share + 1) * size]

    @property
    def share(self) -> int:
        """The number of this rank's share of a batch."""
        return self.rank % self.shares

    def on_whole_batches(self) -> "Ranks":
        """Return the same ranks, each of which reads every batch whole."""
        result = copy.copy(self)
        result.shares = 1
        return result

    def advance(self, stage: str) -> None:
        """Tell the watch what this rank does now."""
        if self.watch is not None:
            self.watch.advance(stage)

    def mean(self, arrays: Arrays) -> Arrays:
        """Average float32 arrays of equal names and shapes over the ranks, in few large messages, lazily.

        Those of the last layers come first, as the backward pass computes them first.
        """
        result: Arrays = {}
        previous: list[mx.array] = []
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        groups = buckets({path: value.nbytes for path, value in arrays.items()})
        self.messages, self.message_bytes = len(groups), sum(value.nbytes for value in arrays.values())
        for paths in groups:
            with mx.stream(self._stream if on_cpu and self._stream else mx.default_stream(mx.default_device())):
                flat = mx.concatenate([arrays[path].reshape(-1).astype(mx.float32) for path in paths])
                if previous:
                    flat = mx.depends([flat], previous)[0]  # the same order on every rank
                total = mx.distributed.all_sum(flat, group=self.group, stream=self._stream)
                previous, start = [total], 0
                total = total * (1 / self.size)
                for path in paths:
                    value, end = arrays[path], start + arrays[path].size
                    result[path] = total[start:end].reshape(value.shape).astype(value.dtype)
                    start = end
        return {path: result[path] for path in arrays}

    def average(
        self, metrics: Arrays, gradients: list[Arrays], signals: Signals
    ) -> tuple[Arrays, list[Arrays], mx.array]:
        """Average metrics and gradients over the ranks, and add up the signals (3,).

        Every `probe_every`-th step waits for the gradients first and times the rest: `communication_seconds`.
        """
        arrays = {f"{i}/{path}": value for i, part in enumerate(gradients) for path, value in part.items()}
        arrays |= {f"metrics/{name}": value for name, value in metrics.items()}
        arrays["signals"] = mx.array(signals, mx.float32)
        probes = self._steps % self.probe_every == self.probe_every // 2
        self._steps += 1
        if probes:
            mx.eval(arrays)
        started = time.perf_counter()
        means = self.mean(arrays)
        if probes:
            mx.eval(means)
        self.communication_seconds = time.perf_counter() - started if probes else 0.0
        return (
            {name: mx.contiguous(means[f"metrics/{name}"]) for name in metrics},  # a copy, not a part of a message
            [{path: means[f"{i}/{path}"] for path in part} for i, part in enumerate(gradients)],
            mx.contiguous(means["signals"]) * self.size,
        )

    def sum(self, array: mx.array) -> mx.array:
        """Add up an array over the ranks, lazily; in the same order on every rank."""
        return mx.distributed.all_sum(array, group=self.group, stream=self._stream)

    def sum_all(self, arrays: Arrays) -> Arrays:
        """Add up small float32 arrays of equal names and shapes over the ranks in one message, lazily."""
        total = self.sum(mx.concatenate([value.reshape(-1).astype(mx.float32) for value in arrays.values()]))
        ends = np.cumsum([value.size for value in arrays.values()]).tolist()
        parts = mx.split(total, ends[:-1])
        named = zip(arrays.items(), parts, strict=True)
        return {path: part.reshape(value.shape).astype(value.dtype) for (path, value), part in named}

    def join_slices(self, arrays: Arrays, axes: dict[str, int]) -> Arrays:
        """Join the slices that the ranks have of arrays of one dtype, along an axis of each, in one message, lazily."""
        flat = mx.concatenate([value.reshape(-1) for value in arrays.values()])
        everyone = mx.distributed.all_gather(flat, group=self.group, stream=self._stream).reshape(self.size, -1)
        result, start = {}, 0
        for path, value in arrays.items():
            slices = everyone[:, start : start + value.size].reshape(self.size, *value.shape)
            result[path] = mx.moveaxis(slices, 0, axes[path]).flatten(axes[path], axes[path] + 1)
            start += value.size
        return result

    def spread(self, array: mx.array | None, shape: list[int], dtype: str) -> mx.array:
        """Return the array of the one rank that has it on every rank, bit for bit; the others give None."""
        kind = getattr(mx, {"bool": "bool_"}.get(name := dtype.removeprefix("mlx.core."), name))
        raw = mx.zeros(_bytes(shape, kind), mx.uint8) if array is None else mx.view(array.reshape(-1), mx.uint8)
        return mx.view(self.sum(raw), kind).reshape(shape)

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON value that each rank gives, by rank.

        Raises RuntimeError where a rank is lost: the collective operations of a broken ring return whatever is in
        memory, so that each message carries its rank and number. A gather before a checkpoint keeps it from a step
        that such an operation has spoiled.
        """
        if self.group is None:
            return [value]
        number = next(self._gathers) % 2**31
        marks = [[rank, number] for rank in range(self.size)]
        data = np.frombuffer(json.dumps([*marks[self.rank], value]).encode(), np.uint8)
        headers = self._gathered(np.array([*marks[self.rank], len(data)], np.int32)).reshape(self.size, 3)
        if headers[:, :2].tolist() != marks:
            raise RuntimeError(_BROKEN)
        width = int(headers[:, 2].max())
        rows = self._gathered(np.pad(data, (0, width - len(data)))).reshape(self.size, width)
        try:
            messages = [json.loads(row[:length].tobytes()) for row, length in zip(rows, headers[:, 2], strict=True)]
        except ValueError as error:
            raise RuntimeError(_BROKEN) from error
        if [message[:2] for message in messages] != marks:
            raise RuntimeError(_BROKEN)
        return [message[2] for message in messages]

    def _gathered(self, values: np.ndarray) -> np.ndarray:
        return np.array(mx.distributed.all_gather(mx.array(values), group=self.group, stream=self._stream))

    def gather_arrays(self, array: mx.array) -> mx.array:
        """Join the arrays of all ranks, of one shape, along the first axis, lazily."""
        return mx.distributed.all_gather(array, group=self.group, stream=self._stream)

    def send_arrays(self, arrays: Arrays | None, keep: Keep = lambda name, array: array) -> Arrays:
        """Return rank 0's arrays on every rank, which keeps what `keep` returns of each; the others give None.

        Rank 0's are removed one by one, so that those that are read lazily are never in memory together.
        """
        if self.group is None:
            return arrays or {}
        described = {path: [list(value.shape), str(value.dtype)] for path, value in (arrays or {}).items()}
        result: Arrays = {}
        for path, (shape, dtype) in self.gather(described)[0].items():
            array = self.spread(None if arrays is None else arrays.pop(path), shape, dtype)
            kept = keep(path, array)
            mx.eval(array)
            if kept is not None:
                result[path] = kept
                mx.eval(kept)
        return result

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raise BadInput, the same on every rank, where a rank has another value than rank 0 under a name."""
        hashes = {name: hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest() for name, v in facts.items()}
        everyone = self.gather(hashes)
        for rank, theirs in enumerate(everyone):
            if other := [name for name in everyone[0] if theirs.get(name) != everyone[0][name]]:
                sentence = f"rank {rank} has another {' and another '.join(other)} than rank 0"
                self._raise(BadInput(f"{sentence}: start the same command, files and versions on every rank"))

    def in_turn(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0, then on the others, which find in the caches what rank 0 has put there.

        Raises BadInput or RunFailed on every rank if one of them raises it.
        """
        result: T | None = None
        errors: list[tuple[str, str] | None] = [None]
        for turn in range(min(2, self.size)):
            error: BadInput | RunFailed | None = None
            if turn == (self.rank > 0):
                try:
                    result = function()
                except (BadInput, RunFailed) as raised:
                    if self.group is None:
                        raise
                    error = raised
            errors = self.gather(error and (type(error).__name__, str(error)))
            for rank, found in enumerate(errors):
                if found:
                    kind = BadInput if found[0] == "BadInput" else RunFailed
                    self._raise(kind(found[1] if rank == 0 else f"rank {rank}: {found[1]}"))
        return result  # type: ignore[return-value]

    def _raise(self, error: Exception) -> NoReturn:
        """Raise an error that every rank has; the ranks but 0 end without a word."""
        if self.rank:
            self.leave(exit_code(error))
        raise error

    def leave(self, code: int) -> NoReturn:
        """End this rank, silently, once rank 0 has said why: `mlx.launch` stops all when one ends with an error."""
        if self.watch is not None:
            self.watch.wait_for_first()
        sys.exit(code)

    def own_seed(self, seed: int) -> int:
        """Return the seed of this rank's dropout; rank 0 has that of a process by itself."""
        return (seed + self.share * _SECOND_SEED) % 2**64

    @contextmanager
    def running(self) -> Iterator[None]:
        """End the watch on leaving, and say which rank is lost where a collective operation fails."""
        if self.watch is None:
            yield
            return
        failed = True
        try:
            yield
            failed = False
        except SystemExit:  # every rank ends
            failed = False
            raise
        except (BadInput, RunFailed) as error:
            raise type(error)(f"rank {self.rank}: {error}" if self.rank else str(error)) from error
        except RuntimeError as error:
            lost = self.watch.failure(wait=5 * watch.BEAT_SECONDS)
            if lost is None:
                raise
            raise (RunFailed(lost) if self.watch.reports else SystemExit(1)) from error
        finally:
            self.watch.close(failed=failed)


ALONE = Ranks()


def join() -> Ranks:
    """Join the other ranks, if a launcher such as `mlx.launch` started several; else return ALONE.

    Raises RunFailed where the others do not come.
    """
    launch = launched()
    if launch is None:
        return ALONE
    seconds = watch.timeout()
    try:
        with _interrupted_after(2 * seconds):
            group = mx.distributed.init(strict=True, backend=launch.backend)
        ranks = Ranks(group, launch.backend)
        ranks.watch = _meet(ranks, launch) if ranks.size > 1 else None
        return ranks
    except (OSError, RuntimeError, ValueError) as error:
        raise RunFailed(f"the ranks did not find each other over {launch.backend} ({error})") from error


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Interrupt a system call of MLX that waits without end, such as that for a neighbour that never connects."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _meet(ranks: Ranks, launch: Launch) -> Watch:
    """Connect every rank to rank 0 by a socket of its own. Raises OSError."""
    if ranks.rank == 0:
        address = launch.addresses[0] if launch.addresses else ""
        server, invitation = watch.listen(address)
        ranks.gather(invitation)
        return Watch(0, watch.accept_all(server, invitation["token"], ranks.size))
    invitation = ranks.gather(None)[0]
    places = [*launch.addresses, invitation["host"]]
    for place in places[:-1]:
        try:
            return Watch(ranks.rank, watch.connect(place, invitation, ranks.rank))
        except OSError:
            continue
    return Watch(ranks.rank, watch.connect(places[-1], invitation, ranks.rank))


def check_batches(recipe: Recipe, seq_len: int, shares: int) -> None:
    """Raise BadInput where a batch of the recipe cannot be divided equally among the ranks."""
    full, warmup = recipe.batch_size(seq_len), recipe.batch_warmup
    for size in {full, *(max(1, full >> n) for n in range(1, warmup.doublings + 1) if warmup)} if warmup else {full}:
        if size % shares:
            raise BadInput(
                f"a batch of {size} sequences cannot be divided among {shares} ranks: "
                f"give a --batch-size that is a multiple of {shares}"
                + ("" if size == full else f", also over the recipe's warm-up of batches, which begins at {size}")
            )


def buckets(sizes: dict[str, int], most: int = BUCKET_BYTES) -> list[list[str]]:
    """Group paths, those of the last layers first, up to so many bytes each."""
    groups: list[list[str]] = [[]]
    filled = 0
    for path in sorted(sizes, key=_layer, reverse=True):
        if groups[-1] and filled + sizes[path] > most:
            groups.append([])
            filled = 0
        groups[-1].append(path)
        filled += sizes[path]
    return groups


def _layer(path: str) -> int:
    """Return the number of the layer in a path, "0/blocks.3.ffn.up_proj.weight" -> 3; -1 without one."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found[1]) if found else -1


def _bytes(shape: list[int], dtype: mx.Dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.size
