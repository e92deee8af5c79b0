"""The restricted reader of foreign ``.pth``, ``.pt`` and ``.bin`` files (and of safetensors).

A pickle is a program. Here it can only build tensors, numbers, strings and plain containers; every
other class or function it names becomes an inert ``Placeholder``, so nothing in it runs and a
training scheduler inside a checkpoint does no harm. No module named by the file is imported.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2f2cli.checkpoints.tensorfile import StoredTensor, open_tensor_file
from m2f2cli.checkpoints.torchfile import Region, Storage, ZipRecords, legacy_regions, map_file
from m2f2cli.checkpoints.unpickler import Placeholder, Reader, damaged, scan
from m2f2cli.errors import CheckpointError

__all__ = ["LoadedFile", "Placeholder", "load_tensors_file"]

_WRAPPERS = ("model_state_dict", "state_dict", "model", "module", "net", "network", "weights")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_POINTER = b"version https://"  # of the Git LFS specification


@dataclass(frozen=True)
class LoadedFile:
    """What a weights file holds.

    Args:
        path: The file.
        layout: ``zip``, ``legacy`` or ``safetensors``.
        content: The outermost object; tensors in it are ``StoredTensor``.
        foreign: Classes and functions the file names that were made inert.
    """

    path: Path
    layout: str
    content: Any
    foreign: tuple[str, ...] = ()
    _found: list[tuple[str, dict[str, StoredTensor]]] = field(default_factory=list, repr=False)

    @property
    def where(self) -> str:
        """The key under which the state dict lies; empty when the file is the state dict."""
        return self._state_dict()[0]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """The state dict, tensors still on disk.

        Raises:
            CheckpointError: The file holds no state dict, or several.
        """
        return self._state_dict()[1]

    @property
    def rest(self) -> tuple[str, ...]:
        """The other top-level keys, when the state dict is wrapped, or its non-tensor entries."""
        if not isinstance(self.content, dict):
            return ()
        where, tensors = self._state_dict()
        return tuple(str(k) for k in self.content if k != where and (where or k not in tensors))

    def _state_dict(self) -> tuple[str, dict[str, StoredTensor]]:
        if not self._found:
            self._found.append(_find_state_dict(self.path, self.content))
        return self._found[0]


def load_tensors_file(path: Path) -> LoadedFile:
    """Open a weights file of any of the common layouts; nothing in it runs.

    Args:
        path: A ``.pth``, ``.pt``, ``.bin`` (torch's zip or older layout) or ``.safetensors`` file;
            the layout is read from the content, not the name. Tensors are mapped, not copied.

    Raises:
        CheckpointError: The file is missing, truncated or something else.
    """
    head = _head(path)
    if head[:4] == b"PK\x03\x04":
        return _load_zip(path)
    # A header's length may begin with any byte, a pickle's first one too; it is never this large.
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and (head[:1] != b"\x80" or length < path.stat().st_size):
        return LoadedFile(path, "safetensors", dict(open_tensor_file(path)))
    if head[:1] == b"\x80":
        return _load_legacy(path)
    if head.startswith(_POINTER):
        raise CheckpointError(
            f"'{path}' is a Git LFS pointer, not the file it stands for.",
            "Fetch the files with: git lfs pull",
        )
    raise CheckpointError(
        f"'{path}' is no PyTorch or safetensors file.",
        "Give a .pth, .pt, .bin or .safetensors file that holds model weights.",
    )


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file '{path}'.", "Check the path.") from error
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    if not head:
        raise CheckpointError(f"'{path}' is empty.", "Copy or download it again.")
    return head


def _load_zip(path: Path) -> LoadedFile:
    records = ZipRecords(path)
    program = records.read("data.pkl")
    storages: dict[str, Storage] = {}

    def storage(key: str, dtype: str, count: int) -> Storage:
        if key not in storages:
            storages[key] = Storage(key, dtype, count, records.region(f"data/{key}"))
        return storages[key]

    reader = Reader(io.BytesIO(program), path, storage)
    content = reader.run()
    return LoadedFile(path, "zip", content, reader.foreign)


def _load_legacy(path: Path) -> LoadedFile:
    """Read the layout before torch 1.6: four pickles, a list of storage keys, the raw storages."""
    view = map_file(path)
    stream = io.BytesIO(bytes(view[: _pickles_end(path, view)]))
    sizes: dict[str, tuple[str, int]] = {}

    def note(key: str, dtype: str, count: int) -> Storage:
        sizes.setdefault(key, (dtype, count))
        return Storage(key, dtype, count, Region(path, view, 0, 0))

    heading = [Reader(stream, path, note).run() for _ in range(3)]
    if heading[:2] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
        raise CheckpointError(
            f"'{path}' is a pickle, but not one that torch.save wrote.",
            "Give the file that holds the model's weights.",
        )
    begin = stream.tell()
    Reader(stream, path, note).run()  # the first pass learns the storages' types
    keys = Reader(stream, path, note).run()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise damaged(path)
    regions = legacy_regions(
        path, view, stream.tell(), [(key, *sizes[key]) for key in keys if key in sizes]
    )

    def storage(key: str, dtype: str, count: int) -> Storage:
        return Storage(key, dtype, count, regions[key])

    stream.seek(begin)
    reader = Reader(stream, path, storage)
    return LoadedFile(path, "legacy", reader.run(), reader.foreign)


def _pickles_end(path: Path, view: memoryview) -> int:
    """Where the fifth pickle of a legacy file ends."""
    stream = _ViewReader(view)
    for number in range(5):
        scan(path, stream)
        if number == 0 and stream.tell() > 64:
            raise CheckpointError(
                f"'{path}' is a pickle, but not one that torch.save wrote.",
                "Give the file that holds the model's weights.",
            )
    return stream.tell()


class _ViewReader(io.RawIOBase):
    """The few reading methods pickletools needs, over a mapped file."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        end = len(self._view) if size < 0 else min(self._at + size, len(self._view))
        data = bytes(self._view[self._at : end])
        self._at = end
        return data

    def readline(self, size: int | None = -1) -> bytes:
        start = self._at
        window = bytes(self._view[start : start + 65536])
        end = window.find(b"\n")
        self._at = start + (end + 1 if end >= 0 else len(window))
        return window[: self._at - start]

    def tell(self) -> int:
        return self._at


def _find_state_dict(path: Path, content: Any) -> tuple[str, dict[str, StoredTensor]]:
    """The state dict in a file: the outermost mapping, or the one wrapped in it."""
    if isinstance(content, dict):
        tensors = _tensors_of(content)
        if tensors:
            return "", tensors
        inside = {k: _tensors_of(v) for k, v in content.items() if isinstance(v, dict)}
        inside = {k: v for k, v in inside.items() if v and isinstance(k, str)}
        known = [name for name in _WRAPPERS if name in inside]
        if known or len(inside) == 1:
            where = known[0] if known else next(iter(inside))
            return where, inside[where]
        if inside:
            raise CheckpointError(
                f"'{path}' holds several sets of weights: {', '.join(inside)}.",
                "Save the wanted one alone.",
            )
    raise CheckpointError(
        f"'{path}' holds no model weights.",
        "Give a file with a state dict; optimizer states and whole pickled models do not help.",
    )


def _tensors_of(mapping: Mapping[Any, Any]) -> dict[str, StoredTensor]:
    return {
        key: value
        for key, value in mapping.items()
        if isinstance(key, str) and isinstance(value, StoredTensor)
    }
