"""One thread that runs the model: its answers never overlap, and it never keeps the program up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

R = TypeVar("R")
T = TypeVar("T")


class GoneError(Exception):
    """Whoever asked has left; raised inside the work to end it."""


class Worker:
    """Runs pieces of work one after another, in the order they came."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._work, name="m2f2-model", daemon=True).start()

    def _work(self) -> None:
        while True:
            future, work = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                future.set_exception(error)
            del future, work  # a result is not to be kept until the next one

    async def run(self, work: Callable[[], R]) -> R:
        """Wait for the result of some work. Cancelled before its turn, it is never begun."""
        future: Future[R] = Future()
        self._jobs.put((future, work))
        return await asyncio.wrap_future(future)

    async def stream(self, work: Callable[[Callable[[T], None]], object]) -> AsyncIterator[T]:
        """Give what work tells while it goes on.

        Args:
            work: Is called with a function to tell things with, which raises ``GoneError`` once the
                reader has left.

        Yields:
            What it told, in order.
        """
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[T | None] = asyncio.Queue()
        gone = threading.Event()

        def tell(thing: T) -> None:
            if gone.is_set():
                raise GoneError
            loop.call_soon_threadsafe(told.put_nowait, thing)

        done = asyncio.ensure_future(self.run(lambda: work(tell)))
        done.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (thing := await told.get()) is not None:
                yield thing
            await done
        finally:
            gone.set()
            done.cancel()
            with suppress(asyncio.CancelledError, GoneError):
                if done.done():
                    done.exception()
