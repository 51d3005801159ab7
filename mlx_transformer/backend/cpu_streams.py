"""Work split over the cores of a CPU, one MLX stream each.

MLX computes the elementwise work of one CPU stream on one thread; only the BLAS uses more. A batch is therefore split
over as many streams as there are cores, at most four, and their matmuls share the BLAS's threads.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import mlx.core as mx

from mlx_transformer.backend.runtime import prepare

Batch = TypeVar("Batch", mx.array, list)
_OWN = threading.local()  # an MLX stream belongs to the thread that made it
_MOST = 4  # streams; further cores serve the BLAS. Measured on 2 cores: docs/PERFORMANCE.md


def streams() -> list[mx.Stream]:
    """The streams that a batch is split over: several on a Linux CPU where we set the BLAS's threads, else one."""
    device = mx.default_device()
    if device.type == mx.DeviceType.cpu and prepare().blas is not None:
        return _cpu_streams(min(_MOST, prepare().threads))
    return [mx.default_stream(device)]


def _cpu_streams(count: int) -> list[mx.Stream]:
    if not hasattr(_OWN, "streams"):
        _OWN.streams = [mx.default_stream(mx.cpu)]
    _OWN.streams += [mx.new_stream(mx.cpu) for _ in range(count - len(_OWN.streams))]
    return _OWN.streams[:count]


@contextmanager
def divided_blas() -> Iterator[None]:
    """Give each stream's BLAS its share of the threads; work on several streams must be evaluated inside."""
    library, count = prepare().blas, len(streams())
    if library is None or count == 1:
        yield
        return
    library.set_threads(max(1, prepare().threads // count))
    try:
        yield
    finally:
        library.set_threads(prepare().threads)


def split(batch: Batch) -> list[tuple[mx.Stream, Batch, float]]:
    """Split a batch (B, ...) over the streams: (stream, its sequences, their share of B)."""
    used = streams()
    parts = in_parts(batch, len(used))
    return [(stream, part, share) for stream, (part, share) in zip(used, parts, strict=False)]


def in_parts(batch: Batch, count: int) -> list[tuple[Batch, float]]:
    """Split a batch (B, ...) into min(count, B) parts of nearly equal size: (part, its share of B)."""
    size = len(batch)
    ends = [i * size // min(count, size) for i in range(min(count, size) + 1)]
    return [(batch[start:end], (end - start) / size) for start, end in pairwise(ends)]


def divide(sizes: dict[str, int]) -> list[tuple[mx.Stream, list[str]]]:
    """Divide named work of these sizes over the streams so that the sums are nearly equal; no stream gets nothing."""
    shares: list[tuple[mx.Stream, list[str]]] = [(stream, []) for stream in streams()]
    loads = [0] * len(shares)
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        lightest = loads.index(min(loads))
        shares[lightest][1].append(name)
        loads[lightest] += sizes[name]
    return [share for share in shares if share[1]]
