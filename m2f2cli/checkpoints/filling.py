"""Many tensors at once, each by one thread, written to their places in one file.

The threads share nothing but the file: what a thread reads, changes, hashes and writes next stays
in its core's cache. Whole pages go to the disk without a detour through the system's page cache
where it can do that (``O_DIRECT``): copying them there can cost more time than hashing them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

_MOST_WORKERS = 8
_PAGE = 4096
_BUFFER = 1 << 20
_WORTH_RESERVING = 1 << 24
_DIRECT = getattr(os, "O_DIRECT", 0)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def workers() -> int:
    """How many threads ``spread`` uses: one more than torch does, for while one waits for disk."""
    import torch

    return min(torch.get_num_threads() + 1, _MOST_WORKERS)


def spread(job: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Do a job for many items at once, in threads for each of which torch uses one core.

    Args:
        job: What to do; the first exception ends the others and is raised.
        items: What to do it for.

    Returns:
        The results, in the order of the items.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers(), "m2f2-tensor", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(job, items))
    finally:
        torch.set_num_threads(threads)  # a worker's setting is that of all threads to come


class FileOfPieces:
    """A file of known size that threads fill piece by piece.

    Used as a context manager: on leaving it without an exception, everything is in the file.

    Args:
        path: The file to make.
        size: Its bytes. A large file's room is taken at once: faster, and a full disk shows before
            anything is written.

    Raises:
        OSError: The disk refuses.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        # Parts of pages. They are written last, since one page must not be written both ways.
        self.rest: list[tuple[int, bytes]] = []
        with path.open("wb") as file:
            file.truncate(size)
            if size >= _WORTH_RESERVING and hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise

    def __enter__(self) -> FileOfPieces:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write what is left."""
        if kind is None:
            with self.path.open("r+b") as file:
                for place, data in self.rest:
                    file.seek(place)
                    file.write(data)

    def piece(self, begin: int) -> Piece:
        """A part of the file that one thread writes from front to back.

        Args:
            begin: Its first byte. No other piece may hold a byte of it.
        """
        return Piece(self, begin)


class Piece:
    """See ``FileOfPieces.piece``; a context manager as well."""

    def __init__(self, whole: FileOfPieces, begin: int) -> None:
        import torch

        self._whole, self._direct = whole, bool(_DIRECT)
        self._file = self._open()
        # What is filled of a buffer that lies on whole pages, in memory as in the file.
        self._first = self._end = begin % _PAGE
        self._start = begin - self._first
        room = torch.empty(_BUFFER + _PAGE, dtype=torch.uint8)
        self._buffer = room[-room.data_ptr() % _PAGE :][:_BUFFER]
        self._bytes = self._buffer.numpy().data

    def __enter__(self) -> Piece:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write what is left."""
        try:
            if kind is None:
                self._flush()
        finally:
            self._file.close()

    def write(self, data: torch.Tensor) -> None:
        """Write flat uint8 values behind those before."""
        while data.numel():
            taken = data[: _BUFFER - self._end]
            self._buffer[self._end : self._end + taken.numel()] = taken
            self._end += taken.numel()
            data = data[taken.numel() :]
            if self._end == _BUFFER:
                self._flush()

    def _flush(self) -> None:
        """Write the whole pages of the buffer; begin again behind it."""
        low = min(-(-self._first // _PAGE) * _PAGE, self._end)
        high = max(self._end // _PAGE * _PAGE, low)
        for first, end in ((self._first, low), (high, self._end)):
            if first < end:
                self._whole.rest.append((self._start + first, bytes(self._bytes[first:end])))
        while low < high:
            low += self._write(self._start + low, self._bytes[low:high])
        self._start += _BUFFER
        self._first = self._end = 0

    def _write(self, place: int, data: memoryview) -> int:
        try:
            self._file.seek(place)
            return self._file.write(data)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        self._file.close()
        self._direct = False
        self._file = self._open()
        return 0

    def _open(self) -> FileIO:
        """Open the file for direct writing where its file system has that."""
        extra = _DIRECT if self._direct else 0
        try:
            return FileIO(self._whole.path, "r+", opener=lambda p, flags: os.open(p, flags | extra))
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        self._direct = False
        return self._open()
