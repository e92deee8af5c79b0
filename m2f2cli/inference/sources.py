"""From what the user typed to a list of items: files, folders, globs, lists, standard input."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from m2f2cli.data.images import (
    IMAGE_SUFFIXES,
    Picture,
    looks_like_picture,
    picture_of,
    read_picture,
)
from m2f2cli.data.samples import other_files
from m2f2cli.data.video import VIDEO_SUFFIXES, looks_like_video
from m2f2cli.errors import InputError, UsageError

Item = str | os.PathLike[str] | Image.Image | np.ndarray
Items = Item | Iterable[Item]
# The comment inside a drawing, and the end of its name.
DRAWING = b"drawn by m2f2"
_DRAWN = re.compile(r"\.[0-9a-f]{12}\.(heatmap|annotated)(-\d+)?\.jpg$")
_MAGIC = frozenset("*?[")
_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
_HEAD = 64  # bytes of a file that tell what it is


@dataclass(frozen=True)
class Source:
    """One item to judge.

    Attributes:
        path: As the record names it.
        kind: ``image`` or ``video``.
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


class Sources(list[Source]):
    """Items to judge.

    Attributes:
        left_out: How many files of the folders are none, by suffix; drawings of m2f2 under
            ``drawings``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: Counter[str] = Counter()

    @property
    def remark(self) -> str | None:
        """What was left out, in a sentence; None for nothing."""
        drawings = self.left_out["drawings"]
        others = self.left_out - Counter(drawings=drawings)
        drawn = f"{drawings} {'drawing' if drawings == 1 else 'drawings'} of m2f2"
        parts = [other_files(others, "the folders"), drawn if drawings else None]
        named = " and ".join(filter(None, parts))
        return f"Left out: {named}." if named else None


def expand(items: Items, *, recursive: bool = False) -> Sources:
    """List the items, in the given order, each file once.

    Args:
        items: One or several of: files; folders (their pictures and videos, by name or content,
            sorted); globs, for shells that do not expand them (``**`` enters sub-folders);
            ``@FILE`` and ``-`` for a list of files and folders, one a line; Pillow images; arrays
            (see ``images.picture_of``). A file that does not exist is an item: its record says so.
        recursive: Enter the sub-folders of folders.

    Raises:
        UsageError: No items at all, one of another type, or no such list file.
        InputError: A folder without a supported file, or nothing but globs that match nothing.
    """
    single = isinstance(items, (str, os.PathLike, Image.Image, np.ndarray))
    several: Iterable[Any] = [items] if single else items  # type: ignore[assignment]
    named: list[str] = []
    sources = Sources()
    for number, item in enumerate(several, start=1):
        if isinstance(item, (Image.Image, np.ndarray)):
            path = getattr(item, "filename", "") or f"picture {number}"
            name = PurePosixPath(Path(path).name)
            sources.append(Source(path, "image", name, partial(picture_of, item)))
        elif isinstance(item, (str, os.PathLike)) and isinstance(os.fspath(item), str):
            named.append(os.fspath(item))
        else:
            raise UsageError(
                f"'{type(item).__name__}' cannot be judged.",
                "Give names of files, Pillow images or arrays.",
            )
    if not named and not sources:
        raise UsageError("There is nothing to judge.", "Give a file, a folder or a glob.")
    given = [found for path in named for found in _literal(path)]
    globs = [path for path in named if _is_glob(path)]
    if globs and not sources and not any(os.path.lexists(path) for path in given):
        raise InputError(f"Nothing matches '{globs[0]}'.", "missing")
    folders = sum(os.path.isdir(path) for path in given)
    seen: set[str] = set()
    taken = {str(source.name).casefold() for source in sources}
    for path in given:
        for file, kind, name in _files(path, sources.left_out, recursive, prefix=folders > 1):
            key = os.path.abspath(file)
            if key not in seen:
                seen.add(key)
                sources.append(Source(file, kind, _free_name(name, taken)))
    return sources


def _is_glob(path: str) -> bool:
    return bool(_MAGIC & set(path)) and "\0" not in path and not os.path.lexists(path)


def _literal(path: str) -> Iterator[str]:
    """Resolve list files, standard input and globs to files and folders."""
    if path == "-":
        yield from _lines(sys.stdin.buffer.read())
    elif path.startswith("@"):
        try:
            yield from _lines(Path(path[1:]).read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The list file '{path[1:]}' cannot be read: "
                f"{getattr(error, 'strerror', None) or error}.",
                f"For a picture whose name starts with @, type './{path}'.",
            ) from error
    elif _is_glob(path):
        yield from sorted(glob.glob(path, recursive=True)) or [path]
    else:
        yield path


def _lines(content: bytes) -> Iterator[str]:
    if b"\0" in content:
        raise UsageError(
            "The list has NUL bytes in it: it is a picture, a text in UTF-16, or of find -print0.",
            "Give a text in UTF-8 with one file a line; in PowerShell: … | Out-File -Encoding utf8",
        )
    for line in os.fsdecode(content.removeprefix(b"\xef\xbb\xbf")).split("\n"):
        if line.strip():
            yield line.rstrip("\r")


def _files(
    path: str, left_out: Counter[str], recursive: bool, *, prefix: bool
) -> Iterator[tuple[str, str, PurePosixPath]]:
    """The files of a path, each with its kind and its name below an output folder."""
    if not os.path.isdir(path):
        yield path, _kind(path) or "image", PurePosixPath(Path(path).name or "item")
        return
    root = Path(path)
    top = PurePosixPath(root.resolve().name) if prefix else PurePosixPath()
    count = 0
    for file, kind in _walk(root, recursive, left_out):
        count += 1
        parts = file.relative_to(root).parts or (root.resolve().name,)
        place = os.path.join(path, *file.relative_to(root).parts)
        yield place, kind, top / PurePosixPath(*parts)
    if not count:
        hint = f"Supported: {', '.join(sorted(_SUFFIXES))}."
        if not recursive and any(_is_folder(entry) for entry in os.scandir(path)):
            hint = "It has sub-folders: add --recursive to enter them. " + hint
        raise InputError(f"The folder '{path}' holds no picture or video.", "missing", hint)


def _walk(root: Path, recursive: bool, left_out: Counter[str]) -> Iterator[tuple[Path, str]]:
    """Pictures and videos of a folder with their kind, sorted; hidden names are skipped.

    A sub-folder that cannot be listed is yielded itself, so that it becomes a record.
    """
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:
        yield root, "image"
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            if recursive and not entry.is_symlink():
                yield from _walk(root / entry.name, recursive, left_out)
        elif _is_drawing(entry.path):
            left_out["drawings"] += 1
        elif kind := _kind(entry.path):
            yield root / entry.name, kind
        else:
            left_out[_suffix(entry.name)] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _kind(path: str) -> str | None:
    """``image`` or ``video``, by the suffix or else by how the file begins."""
    suffix = _suffix(path)
    if suffix in _SUFFIXES:
        return "video" if suffix in VIDEO_SUFFIXES else "image"
    head = _head(path)
    if looks_like_picture(head):
        return "image"
    return "video" if looks_like_video(head) else None


def _is_drawing(path: str) -> bool:
    """Whether an earlier run drew it: such a picture is no evidence."""
    return _DRAWN.search(path) is not None and DRAWING in _head(path)


def _head(path: str) -> bytes:
    if not os.path.isfile(path):
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _free_name(name: PurePosixPath, taken: set[str]) -> PurePosixPath:
    candidate, number = name, 1
    while str(candidate).casefold() in taken:
        number += 1
        candidate = name.with_name(f"{name.stem}-{number}{name.suffix}")
    taken.add(str(candidate).casefold())
    return candidate
