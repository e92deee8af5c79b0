"""Files and folders that appear whole or not at all: temporary sibling, fsync, rename.

Also what they are filled with: JSON, and large files that several threads write at once.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import mmap
import os
import platform
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from m2f2cli.errors import CheckpointError, M2F2Error, UsageError

MARK = "stage.json"
_PAGE = 4096
_BUFFER = 1 << 20
_WORTH_RESERVING = 1 << 24
_DEEPEST = 100  # of JSON; what is written here nests to a dozen
# Of half-written files: the process, four digits for its machine, and four at random.
_PARTIAL = re.compile(r"^\..+\.(\d+)-([0-9a-f]{4})[0-9a-f]{4}\.partial$")
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:4]


def atomic_write(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step; on failure the old file, or none, remains.

    Raises:
        CheckpointError: The file cannot be written, for example because the disk is full.
    """
    refuse_special(path)
    partial = _partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # where even the folder could not be made
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling to fill; when the block ends well it takes the place of ``path``.

    The sibling's files are flushed to disk before the rename, which on Linux exchanges the old and
    the new folder in one step. A killed process leaves the old folder, or none, and a hidden
    ``.NAME.PID-….partial`` sibling that the next call for the same path removes.

    Args:
        path: The folder to make.
        overwrite: Replace an existing checkpoint folder. A folder that is not empty and holds
            neither ``config.json`` nor ``stage.json`` is never replaced.

    Raises:
        CheckpointError: The folder exists, or cannot be written.
    """
    path = path.resolve()
    refuse_existing(path, overwrite)
    remove_stale(path)
    partial = _partial_name(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        sync_folder(partial)
        _put_in_place(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_special(path: Path) -> None:
    """Refuse to write to a device, a pipe or a socket, which is no file that can be kept.

    Raises:
        UsageError: It is one, or a link to one.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UsageError(f"'{path}' is not a regular file.", "Choose another place for it.")


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Keep other processes from working into a folder, where the system has such locks.

    Args:
        folder: An existing one.
        doing: What is done there, as the words "is … another process" need it.

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
            f"Another process is {doing} '{folder}'.", "Wait for it, or choose another --output."
        ) from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def write_error(path: Path, error: OSError) -> CheckpointError:
    """The one sentence for a failed write."""
    hint = "Check the path and its permissions."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = "Free some disk space or choose another folder; nothing half-written was left."
    return CheckpointError(f"Cannot write '{path}': {error.strerror or error}.", hint)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk where the system allows it."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _partial_name(path: Path) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}-{_HOST}{secrets.token_hex(2)}.partial"


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse a folder that is not empty, unless it is a checkpoint and may be replaced.

    Raises:
        CheckpointError: The folder is to be kept.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"'{path}' is a file, not a folder.", "Choose another --output.")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"The folder '{path}' exists and is not empty.",
            "Add --overwrite or choose another --output.",
        )
    if not ((path / "config.json").is_file() or (path / MARK).is_file()):
        raise CheckpointError(
            f"The folder '{path}' holds no checkpoint, so it is not replaced.",
            "Choose another --output.",
        )


def remove_stale(path: Path) -> None:
    """Remove what killed runs left beside ``path``; partial folders of live processes stay."""
    path = path.resolve()
    if not path.parent.is_dir():
        return
    for sibling in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        match = _PARTIAL.match(sibling.name)
        if match and not is_alive(int(match[1])):
            shutil.rmtree(sibling, ignore_errors=True)


def remove_stale_below(folder: Path) -> None:
    """Remove files that killed runs of this machine left half-written in a folder and below."""
    for where, _, files in os.walk(folder):
        for match in filter(None, map(_PARTIAL.match, files)):
            if match[2] == _HOST and not is_alive(int(match[1])):
                with suppress(OSError):
                    os.unlink(os.path.join(where, match[0]))


def is_alive(pid: int) -> bool:
    """Whether a process runs; taken for granted where the system cannot tell."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _put_in_place(partial: Path, path: Path) -> None:
    if not path.exists():
        os.rename(partial, path)
    elif not any(path.iterdir()):
        path.rmdir()
        os.rename(partial, path)
    elif not _exchange(partial, path):
        old = _partial_name(path)
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except OSError:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux ``renameat2``); False where the system has no such call."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Indented UTF-8 JSON that ends in a newline; keys keep their order."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def parse_json(text: str | bytes, *, strict: bool = False) -> Any:
    """What a JSON text says.

    Args:
        text: The text; bytes are UTF-8, -16 or -32.
        strict: Refuse NaN and the infinities, which are no JSON.

    Raises:
        ValueError: It is no JSON, or nests deeper than ``_DEEPEST`` levels.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant if strict else None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if _depth(value) > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    return value


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _depth(value: Any) -> int:
    """How deep lists and mappings nest, found level by level."""
    depth, level = 0, [value]
    while level:
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        depth += 1
    return depth


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, unreadable or something else.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"'{path}' is not a regular file.")
        value = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"'{path.parent}' has no {path.name}, so it is no complete checkpoint.",
            f"m2f2 info '{path.parent}' says what it is.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not readable JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' holds no JSON object.")
    return value


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class ParallelFile:
    """A file of known size that threads fill side by side, each its own parts.

    Whole pages go to the disk directly where the file system can do that (``O_DIRECT``): copying
    them through the system's page cache can cost more time than hashing them. A context manager:
    when it is left without an exception, everything is in the file.

    Args:
        path: The file to make.
        size: Its bytes. A large file's room is reserved at once: faster, and a full disk shows
            before anything is written.

    Raises:
        OSError: The disk refuses.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        # Pieces of pages: written last, since one page must not be written both ways at once.
        self.edges: list[tuple[int, bytes]] = []
        with path.open("wb") as file:
            file.truncate(size)
            if size >= _WORTH_RESERVING and hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise

    def __enter__(self) -> ParallelFile:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write the pieces of pages."""
        if kind is None:
            with self.path.open("r+b") as file:
                for place, data in self.edges:
                    file.seek(place)
                    file.write(data)

    def part(self, begin: int) -> FilePart:
        """A part of the file that one thread writes from front to back; a context manager.

        Args:
            begin: Its first byte. No other part may hold a byte of it.
        """
        return FilePart(self, begin)


class FilePart:
    """See ``ParallelFile.part``."""

    def __init__(self, whole: ParallelFile, begin: int) -> None:
        self._whole = whole
        self._direct = getattr(os, "O_DIRECT", 0)
        self._file: FileIO | None = None
        # The buffer lies on whole pages, in memory as in the file; from first to end it is filled.
        self._first = self._end = begin % _PAGE
        self._start = begin - self._first
        self._buffer = np.frombuffer(mmap.mmap(-1, _BUFFER), np.uint8)

    def __enter__(self) -> FilePart:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write what is left."""
        try:
            if kind is None:
                self._flush()
        finally:
            self._close()

    def write(self, data: np.ndarray) -> None:
        """Write flat uint8 values behind those before."""
        while len(data):
            taken = data[: _BUFFER - self._end]
            self._buffer[self._end : self._end + len(taken)] = taken
            self._end += len(taken)
            data = data[len(taken) :]
            if self._end == _BUFFER:
                self._flush()

    def _flush(self) -> None:
        """Write the whole pages of the buffer; begin again behind it."""
        low = min(-(-self._first // _PAGE) * _PAGE, self._end)
        high = max(self._end // _PAGE * _PAGE, low)
        for first, end in ((self._first, low), (high, self._end)):
            if first < end:
                edge = self._buffer[first:end].tobytes()
                self._whole.edges.append((self._start + first, edge))
        while low < high:
            low += self._write_pages(self._start + low, self._buffer[low:high])
        self._start += _BUFFER
        self._first = self._end = 0

    def _write_pages(self, place: int, data: np.ndarray) -> int:
        """Write directly, or through the page cache where the file system does not have that."""
        while True:
            try:
                if self._file is None:
                    self._file = FileIO(self._whole.path, "r+", opener=self._open)
                self._file.seek(place)
                return self._file.write(data.data)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
            self._close()
            self._direct = 0

    def _open(self, path: str, flags: int) -> int:
        return os.open(path, flags | self._direct)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
