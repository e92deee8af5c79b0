"""One piece of work at a time, whoever waits; and none for those who have left."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from m2f2cli.serving.worker import GoneError, Worker


def test_work_never_overlaps_and_everybody_gets_their_own():
    worker, running, most = Worker(), 0, 0

    def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.002)
        running -= 1
        return number * number

    async def ask() -> list[int]:
        return await asyncio.gather(*(worker.run(lambda n=n: work(n)) for n in range(30)))

    assert asyncio.run(ask()) == [n * n for n in range(30)]
    assert most == 1


def test_an_error_reaches_whoever_asked_and_the_next_is_answered():
    worker = Worker()

    def fail() -> None:
        raise ValueError("no")

    async def ask() -> int:
        with pytest.raises(ValueError, match="no"):
            await worker.run(fail)
        return await worker.run(lambda: 7)

    assert asyncio.run(ask()) == 7


def test_a_stream_gives_what_is_told_and_then_the_error():
    worker = Worker()

    def work(tell) -> None:
        tell(1)
        tell(2)
        raise ValueError("broken")

    async def read() -> list[int]:
        stream = worker.stream(work)
        seen = [await anext(stream), await anext(stream)]
        with pytest.raises(ValueError, match="broken"):
            await anext(stream)
        return seen

    assert asyncio.run(read()) == [1, 2]


def test_work_ends_when_its_reader_leaves():
    worker, ended = Worker(), threading.Event()

    def endless(tell) -> None:
        try:
            while True:
                tell(1)
                time.sleep(0.001)
        except GoneError:
            ended.set()
            raise

    async def leave() -> int:
        stream = worker.stream(endless)
        await anext(stream)
        await stream.aclose()
        return await asyncio.wait_for(worker.run(lambda: 5), 5)

    assert asyncio.run(leave()) == 5
    assert ended.is_set()


def test_work_that_nobody_waits_for_any_more_is_not_begun():
    worker, begun = Worker(), []
    gate = threading.Event()

    async def leave() -> None:
        first = asyncio.ensure_future(worker.run(gate.wait))
        second = asyncio.ensure_future(worker.run(lambda: begun.append(1)))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0.01)
        gate.set()
        await first
        await worker.run(lambda: None)

    asyncio.run(leave())
    assert begun == []
