"""Where the bytes lie in the files torch.save writes: a zip of records, or the older layout."""

from __future__ import annotations

import math
import mmap
import zipfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from m2f2cli.checkpoints.tensorfile import Place, StoredTensor
from m2f2cli.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_LOCAL_HEADER = 30


@dataclass(frozen=True)
class Region:
    """A stretch of a mapped file.

    Args:
        path: The file.
        view: All of its bytes.
        begin: First byte.
        end: Byte after the last.
    """

    path: Path
    view: memoryview
    begin: int
    end: int


@dataclass(frozen=True)
class Storage:
    """The flat values several tensors may share, still on disk.

    Args:
        key: Its name in the file.
        dtype: Its torch dtype's name.
        count: How many values.
        region: Its bytes.
        start: Index of its first value within the region, for a part of a larger storage.
    """

    key: str
    dtype: str
    count: int
    region: Region
    start: int = 0

    def __setstate__(self, state: object) -> None:
        """Ignore it: a pickle cannot change a storage."""

    def part(self, offset: int, size: int) -> Storage:
        """A part of it, as the layout before torch 1.6 shares memory."""
        if offset < 0 or size < 0 or offset + size > self.count:
            raise ValueError("a view outside its storage")
        return replace(self, start=self.start + offset, count=size)

    def cast(self, dtype: str) -> Storage:
        """The same bytes as values of another type; only whole untyped storages are cast."""
        return replace(self, dtype=dtype, count=self.count // _width(dtype))

    def tensor(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> StoredTensor:
        """Describe a tensor in it.

        Raises:
            ValueError: The sizes or strides reach outside the storage.
        """
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or any(not isinstance(n, int) or n < 0 for n in numbers):
            raise ValueError("malformed sizes")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) and (last >= self.count or math.prod(size) > self.count):
            raise ValueError("a tensor outside its storage")
        place = None
        if stride == _contiguous(size):
            begin = self.region.begin + (self.start + offset) * _width(self.dtype)
            if begin + math.prod(size) * _width(self.dtype) <= self.region.end:
                place = Place(self.region.path, begin)
        return StoredTensor(size, self.dtype, lambda: self._load(offset, size, stride), place)

    def _load(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        import torch

        dtype = getattr(torch, self.dtype)
        if not math.prod(size):
            return torch.empty(size, dtype=dtype)
        width = _width(self.dtype)
        begin = self.region.begin + self.start * width
        if begin + self.count * width > self.region.end:
            raise CheckpointError(f"The storage '{self.key}' is shorter than its tensors.")
        if begin % width:
            data = bytearray(self.region.view[begin : begin + self.count * width])
            flat = torch.frombuffer(data, dtype=dtype)
        else:
            flat = torch.frombuffer(self.region.view, dtype=dtype, count=self.count, offset=begin)
        return flat.as_strided(size, stride, offset)


class ZipRecords:
    """The records of a torch zip file, found without decompressing anything.

    Args:
        path: The file.

    Raises:
        CheckpointError: The archive is truncated, or not one that torch.save wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._view = map_file(path)
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise CheckpointError(
                f"'{path}' is a truncated or damaged archive.", "Copy or download it again."
            ) from error
        self._entries = {entry.filename: entry for entry in entries}
        self._root = next(
            (n.removesuffix("data.pkl") for n in self._entries if n.endswith("/data.pkl")), None
        )
        if self._root is None:
            raise CheckpointError(
                f"'{path}' is a zip archive, but not one that torch.save wrote.",
                "Give the .pth or .bin file with the weights; unpack other archives first.",
            )
        if f"{self._root}byteorder" in self._entries and self.read("byteorder") != b"little":
            raise CheckpointError(f"'{path}' was written on a big-endian machine.")

    def read(self, name: str) -> bytes:
        """One record's bytes."""
        region = self.region(name)
        return bytes(region.view[region.begin : region.end])

    def region(self, name: str) -> Region:
        """Where a record lies.

        Raises:
            CheckpointError: It is missing, compressed or outside the file.
        """
        entry = self._entries.get(f"{self._root}{name}")
        if entry is None:
            raise CheckpointError(
                f"'{self._path}' lacks its record '{name}'.", "Copy or download it again."
            )
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"'{self._path}' is a compressed archive, which torch.save never writes.",
                "Save the weights again with torch.save.",
            )
        head = self._view[entry.header_offset : entry.header_offset + _LOCAL_HEADER]
        names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        begin = entry.header_offset + _LOCAL_HEADER + names
        end = begin + entry.file_size
        if len(head) < _LOCAL_HEADER or end > len(self._view):
            raise CheckpointError(f"'{self._path}' is truncated.", "Copy or download it again.")
        return Region(self._path, self._view, begin, end)


def legacy_regions(
    path: Path, view: memoryview, begin: int, storages: list[tuple[str, str, int]]
) -> dict[str, Region]:
    """Lay out the storages that follow the pickles of a file from before torch 1.6.

    Args:
        path: The file, for messages.
        view: Its bytes.
        begin: Where the storages begin.
        storages: Key, dtype and count of each, in the file's order.

    Raises:
        CheckpointError: The file ends too early or a count differs.
    """
    regions = {}
    for key, dtype, count in storages:
        found = int.from_bytes(view[begin : begin + 8], "little")
        end = begin + 8 + count * _width(dtype)
        if found != count or end > len(view):
            raise CheckpointError(f"'{path}' is truncated.", "Copy or download it again.")
        regions[key] = Region(path, view, begin + 8, end)
        begin = end
    return regions


def map_file(path: Path) -> memoryview:
    """Map a file copy-on-write: pages are read when touched, and the file is never changed."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}.") from error


def _contiguous(size: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose values lie in order."""
    return tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


@cache
def _width(dtype: str) -> int:
    import torch

    return int(getattr(torch, dtype).itemsize)
