"""Processes that share out work and leave nothing behind, and a lock on their output folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

from m2f2cli.errors import M2F2Error
from m2f2cli.runtime import processors

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def worker_pool(
    workers: int | None, work: Callable[[Task], Result], *, at_most: int
) -> Iterator[Callable[[Sequence[Task]], Iterator[Result]]]:
    """Give a function that works off tasks in processes and yields results as they come.

    Args:
        workers: How many processes; None for one a processor; 1 works in this process, in order.
        work: A function of a module's top level.
        at_most: There is no work for more than this many.

    Raises:
        M2F2Error: A worker died. Other errors are those of ``work``.
    """
    workers = min(workers or processors(), at_most)
    if workers <= 1:
        yield lambda tasks: map(work, tasks)
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start)

    def run_all(tasks: Sequence[Task]) -> Iterator[Result]:
        for future in as_completed([pool.submit(work, task) for task in tasks]):
            yield future.result()

    try:
        yield run_all
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise M2F2Error(
                "A worker process died, perhaps for lack of memory.",
                "Run the command again, with fewer --workers; it goes on where it stopped.",
            ) from error
        raise
    pool.shutdown()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working into a folder, where the system has such locks.

    Raises:
        M2F2Error: One is at it.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise M2F2Error(
            f"Another process is preparing into '{folder}'.",
            "Wait for it, or choose another --output.",
        ) from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def _start() -> None:
    """In a worker: an interrupt is the parent's business, and its death the worker's own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
