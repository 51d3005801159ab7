"""The watch over the ranks of a run: when one ends or hangs, all end, with one sentence that names it.

A collective operation waits for ever where a rank hangs, so that a thread of each rank talks to rank 0 over a socket of
its own. Every second each says that it lives, and how far it is.
"""

import contextlib
import json
import os
import secrets
import select
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from mlx_transformer.utils.errors import BadInput

TIMEOUT = "MLX_TRANSFORMER_RANK_TIMEOUT"
SILENT_SECONDS = 30.0  # after which a rank that says nothing hangs: its process is stopped, or its machine is away
_PATIENCE = 20  # times as long without a finished step, or while a rank prepares its text
BEAT_SECONDS = 1.0
_GRACE_SECONDS = 3.0  # for a rank to end by itself once another one is lost
PREPARING = "preparing"  # a tokenizer that is trained may keep the thread from speaking
PATIENT_STAGES = (PREPARING, "saving")  # may last, on rank 0, while the others wait


@dataclass
class _Peer:
    """Another rank, as it is heard."""

    rank: int
    host: str
    socket: socket.socket
    heard: float  # when it last spoke
    moved: float  # when it last advanced
    count: int = 0
    stage: str = PREPARING
    buffer: bytes = b""


class Watch:
    """The thread that watches the other ranks (of rank 0) or rank 0 (of the others)."""

    def __init__(self, rank: int, sockets: dict[int, tuple[str, socket.socket]]) -> None:
        now = time.monotonic()
        self.rank, self.silent_seconds = rank, timeout()
        self.stage, self.count, self.moved = PREPARING, 0, now
        self.ends = "; all ranks end, and the last checkpoint is whole: resume with --resume"  # of the sentence
        self.reports = False  # this rank prints the sentence
        self.sentence: str | None = None  # once a rank is lost; "": it has said itself what is wrong
        self._peers = {other: _Peer(other, host, own, now, now) for other, (host, own) in sockets.items()}
        self._lost, self._closed = threading.Event(), threading.Event()
        self._lock, self._sending = threading.Lock(), threading.RLock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def advance(self, stage: str) -> None:
        """Say what this rank does now; called at each step, so that a rank that stands still is noticed.

        The first stage after PREPARING is sent at once: a rank that hangs soon after it is not granted the patience
        of one that prepares.
        """
        prepared = self.stage == PREPARING != stage
        self.stage, self.count, self.moved = stage, self.count + 1, time.monotonic()
        if prepared:
            self._tell_stage()

    def failure(self, wait: float = 0.0) -> str | None:
        """Wait for the sentence about a lost rank; "" where another rank has said it, None where none is lost."""
        return self.sentence if self._lost.wait(wait) else None

    def wait_for_first(self) -> None:
        """Wait until rank 0 has ended."""
        while 0 in self._peers and not self._lost.is_set():
            time.sleep(BEAT_SECONDS / 20)

    def close(self, *, failed: bool = False) -> None:
        """End the watch; failed: this rank has said what is wrong, and the others are to end as well."""
        if not self._closed.is_set():
            self._closed.set()
            self._tell({"failed" if failed else "bye": True})
            self._thread.join(_GRACE_SECONDS)
            for peer in self._peers.values():
                peer.socket.close()

    def _run(self) -> None:
        told = 0.0
        while not self._closed.is_set():
            if time.monotonic() - told >= BEAT_SECONDS:
                told = time.monotonic()
                self._tell_stage()
            for peer in self._readable():
                self._hear(peer)
            self._look_for_hanging()
            if self._lost.is_set() and not self._closed.wait(_GRACE_SECONDS):
                self._end()

    def _readable(self) -> list[_Peer]:
        by_socket = {peer.socket: peer for peer in self._peers.values()}
        if not by_socket:
            self._closed.wait(BEAT_SECONDS / 4)
            return []
        return [by_socket[ready] for ready in select.select(list(by_socket), [], [], BEAT_SECONDS / 4)[0]]

    def _hear(self, peer: _Peer) -> None:
        try:
            data = peer.socket.recv(1 << 16)
        except OSError:
            data = b""
        peer.heard = time.monotonic()
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        for line in lines:
            self._take(peer, json.loads(line))
        if not data and peer.rank in self._peers:
            self._lose(peer.rank, f"rank {peer.rank} ({peer.host}) has ended")

    def _take(self, peer: _Peer, message: dict[str, Any]) -> None:
        if "count" in message:
            peer.moved = peer.heard if message["count"] != peer.count else peer.moved
            peer.count, peer.stage = message["count"], message["stage"]
        elif "bye" in message:
            del self._peers[peer.rank]
        elif "failed" in message:
            self._lose(peer.rank, "")
        elif "lost" in message:
            self._lose(message["rank"], message["lost"])

    def _look_for_hanging(self) -> None:
        """Lose a rank that does not speak, or, as rank 0, one behind which no rank has advanced."""
        now, patience = time.monotonic(), _PATIENCE * self.silent_seconds
        for peer in list(self._peers.values()):
            allowed = patience if peer.stage == PREPARING else self.silent_seconds
            if now - peer.heard > allowed:
                self._lose(peer.rank, f"rank {peer.rank} ({peer.host}) has not answered for {allowed:.0f} s")
        if self.rank or not self._peers:
            return
        counts = {0: (self.count, self.stage, self.moved)}
        counts |= {peer.rank: (peer.count, peer.stage, peer.moved) for peer in self._peers.values()}
        busy = any(stage in PATIENT_STAGES for _, stage, _ in counts.values())
        if not busy and now - max(moved for _, _, moved in counts.values()) > patience:
            last = min(counts, key=lambda rank: counts[rank][0])
            self._lose(last, f"rank {last} has not advanced for {patience:.0f} s (it was {counts[last][1]})")

    def _lose(self, rank: int, sentence: str) -> None:
        with self._lock:
            if self._lost.is_set():
                return
            told = not sentence or sentence.endswith(self.ends)
            self.sentence = sentence if told else sentence + self.ends
            self._peers.pop(rank, None)
            if self.rank == 0:
                self._tell({"rank": rank, "lost": self.sentence})
            self.reports = bool(sentence) and self.rank == (1 if rank == 0 else 0)
            self._lost.set()

    def _end(self) -> None:
        """End a process whose main thread waits for the lost rank."""
        if self.reports:
            print(f"error: {self.sentence}", file=sys.stderr, flush=True)
        os._exit(1)

    def _tell_stage(self) -> None:
        with self._sending:  # two threads tell it: the newest comes last
            self._tell({"stage": self.stage, "count": self.count})

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in list(self._peers.values()):
            with self._sending, contextlib.suppress(OSError):  # of a rank that has ended: seen when it is read
                peer.socket.sendall(json.dumps(message).encode() + b"\n")


def timeout() -> float:
    """Return the seconds of silence after which a rank hangs. Raises BadInput for a bad value of the variable."""
    given = os.environ.get(TIMEOUT, str(SILENT_SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise BadInput(f"{TIMEOUT}={given}: expected seconds above 0")
    return seconds


def listen(address: str) -> tuple[socket.socket, dict[str, Any]]:
    """Open the socket of rank 0; return it with the invitation that the other ranks need."""
    server = socket.create_server((address, 0))
    server.settimeout(timeout())
    return server, {"port": server.getsockname()[1], "token": secrets.token_hex(8), "host": socket.gethostname()}


def accept_all(server: socket.socket, token: str, size: int) -> dict[int, tuple[str, socket.socket]]:
    """Accept the connection of every other rank. Raises OSError where one does not come."""
    found: dict[int, tuple[str, socket.socket]] = {}
    with server:
        while len(found) < size - 1:
            connection, _ = server.accept()
            connection.settimeout(timeout())
            try:
                hello = json.loads(_first_line(connection))
                if secrets.compare_digest(hello["token"], token):
                    found[int(hello["rank"])] = hello["host"], connection
            except (OSError, ValueError, KeyError, TypeError):  # not one of ours
                connection.close()
    return found


def _first_line(connection: socket.socket) -> bytes:
    """Read one line, and nothing beyond it."""
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)) and len(line) < 4096:
        line += byte
    return line


def connect(address: str, invitation: dict[str, Any], rank: int) -> dict[int, tuple[str, socket.socket]]:
    """Connect to rank 0. Raises OSError where it is not reached."""
    connection = socket.create_connection((address, invitation["port"]), timeout())
    hello = {"token": invitation["token"], "rank": rank, "host": socket.gethostname()}
    connection.sendall(json.dumps(hello).encode() + b"\n")
    return {0: (invitation["host"], connection)}
