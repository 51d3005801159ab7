"""One thread that computes for all readers of the page, a step of each in rotation."""

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")
MOST_JOBS = 32  # at once; more readers than that are told to come back
_END = object()


class Busy(Exception):
    """More jobs than MOST_JOBS."""


class Job:
    """Steps that yield events, and where these go."""

    def __init__(self, steps: Generator[Any, None, None], deliver: Callable[[Any], object]) -> None:
        self.steps, self.deliver = steps, deliver
        self.cancelled = threading.Event()

    def advance(self) -> bool:
        """Take a step and deliver its event, _END behind the last one, or the exception; return whether more follow."""
        if self.cancelled.is_set():
            self.steps.close()
            return False
        event: Any
        try:
            event = next(self.steps, _END)
        except Exception as error:
            event = error
        with contextlib.suppress(RuntimeError):  # the event loop has closed
            self.deliver(event)
            return not (event is _END or isinstance(event, Exception))
        return False

    def end(self) -> None:
        """End before the next step."""
        self.steps.close()
        with contextlib.suppress(RuntimeError):
            self.deliver(_END)


class Worker:
    """A thread that owns the model: MLX's streams belong to the thread that made them, and jobs never overlap."""

    def __init__(self) -> None:
        self.jobs = 0  # of readers, unfinished
        self._new: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        """Return function(), computed on the thread; raise what it raises."""

        def once() -> Generator[T, None, None]:
            yield function()

        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._new.put(Job(once(), done.put))
        if isinstance(result := done.get(), Exception):
            raise result
        return result

    def end(self) -> None:
        """End every job, and the thread, after the step that it is in."""
        self._new.put(None)

    def close(self) -> None:
        """Do as `end`, and wait for it."""
        self.end()
        self._thread.join(timeout=5)

    async def events(self, steps: Generator[Any, None, None]) -> AsyncGenerator[Any, None]:
        """Yield what the steps yield, computed on the thread. Raises what they raise, and Busy.

        Closing this iterator, or cancelling the task that waits for it, ends the job.
        """
        if self.jobs >= MOST_JOBS:
            raise Busy(f"{MOST_JOBS} requests are being computed: try again in a moment")
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()  # holds at most MOST_TOKENS small events
        job = Job(steps, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        self.jobs += 1
        self._new.put(job)
        try:
            while (event := await events.get()) is not _END:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            job.cancelled.set()
            self.jobs -= 1

    def _run(self) -> None:
        turns: deque[Job] = deque()
        while True:
            while not turns or not self._new.empty():
                if (job := self._new.get()) is None:
                    for job in turns:
                        job.end()
                    return
                turns.append(job)
            job = turns.popleft()
            if job.advance():
                turns.append(job)
