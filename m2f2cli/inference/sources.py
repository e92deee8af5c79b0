"""From what the user typed to a list of items: files, folders, globs, lists, standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from m2f2cli.data.images import IMAGE_SUFFIXES, Picture, read_picture
from m2f2cli.data.video import VIDEO_SUFFIXES
from m2f2cli.errors import InputError, UsageError

_MAGIC = frozenset("*?[")
_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES


@dataclass(frozen=True)
class Source:
    """One item to judge.

    Attributes:
        path: As the record names it.
        kind: ``image`` or ``video``, by the suffix.
        name: Where files about this item go below an output folder: the sub-folders of a given
            folder are kept, and no two items of a run share a name, whatever the file system.
        read: Gives the picture where it is no file of its own, such as a frame in an HDF5 file;
            None reads the file ``path``. Called in a decoding thread; raises ``InputError``.
    """

    path: str
    kind: str
    name: PurePosixPath
    read: Callable[[], Picture] | None = None

    def picture(self) -> Picture:
        """Decode it; raises ``InputError`` where that cannot be done."""
        return self.read() if self.read else read_picture(Path(self.path))


def expand(paths: Sequence[str], *, recursive: bool = False) -> list[Source]:
    """List the items behind the paths, in the given order, each file once.

    Args:
        paths: Files; folders (their pictures and videos, sorted); globs, for shells that do not
            expand them (``**`` enters sub-folders); ``@FILE`` and ``-`` for a list of files and
            folders, one a line. A file that does not exist is an item: its record says so.
        recursive: Enter the sub-folders of folders.

    Raises:
        UsageError: No paths at all, or no such list file.
        InputError: A folder without a supported file, or a glob that matches nothing.
    """
    if not paths:
        raise UsageError("There is nothing to judge.", "Give a file, a folder or a glob.")
    given = [found for path in paths for found in _literal(path)]
    folders = sum(os.path.isdir(path) for path in given)
    sources: list[Source] = []
    seen: set[str] = set()
    taken: set[str] = set()
    for path in given:
        for file, name in _files(path, recursive=recursive, prefix=folders > 1):
            key = os.path.abspath(file)
            if key not in seen:
                seen.add(key)
                kind = "video" if _suffix(file) in VIDEO_SUFFIXES else "image"
                sources.append(Source(file, kind, _free_name(name, taken)))
    return sources


def _literal(path: str) -> Iterator[str]:
    """Resolve list files, standard input and globs to files and folders."""
    if path == "-":
        yield from _lines(sys.stdin.buffer.read())
    elif path.startswith("@"):
        try:
            yield from _lines(Path(path[1:]).read_bytes())
        except OSError as error:
            raise UsageError(
                f"The list file '{path[1:]}' cannot be read: {error.strerror}.",
                f"For a picture whose name starts with @, type './{path}'.",
            ) from error
    elif not os.path.lexists(path) and _MAGIC & set(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise InputError(f"Nothing matches '{path}'.", "missing")
        yield from matches
    else:
        yield path


def _lines(content: bytes) -> Iterator[str]:
    for line in os.fsdecode(content.removeprefix(b"\xef\xbb\xbf")).split("\n"):
        if line.strip():
            yield line.rstrip("\r")


def _files(path: str, *, recursive: bool, prefix: bool) -> Iterator[tuple[str, PurePosixPath]]:
    """The files of a path, each with its name below an output folder."""
    if not os.path.isdir(path):
        yield str(Path(path)), PurePosixPath(Path(path).name or "item")
        return
    root = Path(path)
    top = PurePosixPath(root.resolve().name) if prefix else PurePosixPath()
    count = 0
    for file in _walk(root, recursive):
        count += 1
        parts = file.relative_to(root).parts or (root.resolve().name,)
        yield str(file), top / PurePosixPath(*parts)
    if not count:
        hint = f"Supported: {', '.join(sorted(_SUFFIXES))}."
        if not recursive and any(entry.is_dir() for entry in os.scandir(path)):
            hint = "It has sub-folders: add --recursive to enter them. " + hint
        raise InputError(f"The folder '{path}' holds no picture or video.", "missing", hint)


def _walk(root: Path, recursive: bool) -> Iterator[Path]:
    """Pictures and videos of a folder in sorted order; hidden names are skipped.

    A sub-folder that cannot be listed is yielded itself, so that it becomes a record.
    """
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:
        yield root
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if recursive and not entry.is_symlink():
                yield from _walk(root / entry.name, recursive)
        elif _suffix(entry.name) in _SUFFIXES:
            yield root / entry.name


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _free_name(name: PurePosixPath, taken: set[str]) -> PurePosixPath:
    candidate, number = name, 1
    while str(candidate).casefold() in taken:
        number += 1
        candidate = name.with_name(f"{name.stem}-{number}{name.suffix}")
    taken.add(str(candidate).casefold())
    return candidate
