"""A CPU's cores, each with a stream of its own.

MLX computes the elementwise work of one CPU stream on one thread; only the BLAS uses more. So a batch is split over as
many streams as there are cores, four at most, which share the BLAS's threads out among their matmuls.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import mlx.core as mx

from mlx_transformer.backend.runtime import prepare

Rows = TypeVar("Rows", mx.array, list)
_OWN = threading.local()  # MLX knows a stream in the thread alone that made it
_MOST = 4  # streams; more cores than that go to the BLAS. Measured on 2 cores: docs/PERFORMANCE.md


def streams() -> list[mx.Stream]:
    """The streams that a batch is split over: several on a Linux CPU with a BLAS whose threads are ours, else one."""
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
    """While here, each stream's BLAS has its share of the threads: evaluate here what is computed on them."""
    library, count = prepare().blas, len(streams())
    if library is None or count == 1:
        yield
        return
    library.set_threads(max(1, prepare().threads // count))
    try:
        yield
    finally:
        library.set_threads(prepare().threads)


def split(batch: Rows) -> list[tuple[mx.Stream, Rows, float]]:
    """Rows (B, ...) -> (stream, its rows, its share of all rows)."""
    used = streams()
    parts = in_parts(batch, len(used))
    return [(stream, rows, share) for stream, (rows, share) in zip(used, parts, strict=False)]


def in_parts(batch: Rows, count: int) -> list[tuple[Rows, float]]:
    """Rows (B, ...) -> so many parts, B at most, as equal as can be: their rows, and their share of all."""
    rows = len(batch)
    ends = [i * rows // min(count, rows) for i in range(min(count, rows) + 1)]
    return [(batch[start:end], (end - start) / rows) for start, end in pairwise(ends)]


def divide(sizes: dict[str, int]) -> list[tuple[mx.Stream, list[str]]]:
    """Names, each with the size of its work -> every stream and its share of them, the sums as equal as can be."""
    shares: list[tuple[mx.Stream, list[str]]] = [(stream, []) for stream in streams()]
    loads = [0] * len(shares)
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        lightest = loads.index(min(loads))
        shares[lightest][1].append(name)
        loads[lightest] += sizes[name]
    return [share for share in shares if share[1]]
