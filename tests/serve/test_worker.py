"""The thread that computes: readers take turns, and one who leaves frees the rest."""

import asyncio
import threading

import pytest

from mlx_transformer.serve.worker import MOST_JOBS, Busy, Worker


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def steps(name, count, done):
    """Yield `count` events, which are listed too, and at the end the thread."""
    try:
        for i in range(count):
            done.append((name, i))
            yield name, i
    finally:
        done.append((name, "closed", threading.current_thread().name))


async def collect(worker, generator):
    return [event async for event in worker.events(generator)]


def test_readers_take_turns_on_one_thread(worker):
    done, go = [], threading.Event()

    async def both():
        blocked = asyncio.create_task(collect(worker, iter_after(go)))
        await asyncio.sleep(0.01)
        readers = [asyncio.create_task(collect(worker, steps(name, 5, done))) for name in "ab"]
        await asyncio.sleep(0.01)
        go.set()
        return await asyncio.gather(blocked, *readers)

    def iter_after(event):
        yield event.wait()

    _, a, b = asyncio.run(both())
    assert (a, b) == ([("a", i) for i in range(5)], [("b", i) for i in range(5)])
    assert [one[:2] for one in done] == [(name, i) for i in (*range(5), "closed") for name in "ab"]
    assert {one[2] for one in done if one[1] == "closed"} == {"model"}
    assert worker.jobs == 0


def test_a_reader_who_leaves_ends_the_job(worker):
    done = []

    async def leave():
        task = asyncio.create_task(collect(worker, steps("a", 10**9, done)))
        while len(done) < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await collect(worker, steps("b", 2, done))

    assert asyncio.run(leave()) == [("b", 0), ("b", 1)]
    assert ("a", "closed", "model") in done
    assert worker.jobs == 0


def test_an_exception_ends_its_own_job_alone(worker):
    def fails():
        yield 1
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(collect(worker, fails()))
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0)
    assert worker.call(threading.current_thread).name == "model"
    assert asyncio.run(collect(worker, steps("a", 1, []))) == [("a", 0)]


def test_too_many_readers_are_told(worker):
    async def crowd():
        waiting = threading.Event()
        tasks = [asyncio.create_task(collect(worker, iter_after(waiting))) for _ in range(MOST_JOBS)]
        await asyncio.sleep(0.01)
        with pytest.raises(Busy, match="try again"):
            await collect(worker, iter_after(waiting))
        waiting.set()
        await asyncio.gather(*tasks)

    def iter_after(event):
        yield event.wait()

    asyncio.run(crowd())
    assert worker.jobs == 0
