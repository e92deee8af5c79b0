"""Tensors on their way from file to file, block by block, so that memory does not grow with them.

A ``Stream`` knows its shape and type and gives its values when asked, as often as asked. Streams
are made from tensors, in memory or on disk, and from other streams.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m2f2cli.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from m2f2cli.checkpoints.tensorfile import StoredTensor

BLOCK = 1 << 20
"""How many values every block of a stream holds, but the last."""


@dataclass(frozen=True)
class Stream:
    """A tensor that is given piece by piece.

    Args:
        shape: Its sizes.
        dtype: Its torch dtype's name, for example ``float32``.
        blocks: Gives its values in order, as flat CPU tensors of ``BLOCK`` values (the last may
            be shorter). A block is not changed afterwards.
    """

    shape: tuple[int, ...]
    dtype: str
    blocks: Callable[[], Iterator[torch.Tensor]]

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of one value."""
        return width_of(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.size * self.width


def width_of(dtype: str) -> int:
    """Bytes of one value of a torch dtype given by name."""
    import torch

    return int(getattr(torch, dtype).itemsize)


def from_tensor(tensor: torch.Tensor) -> Stream:
    """Stream a tensor of any device and stride; it is copied where it is not contiguous."""

    def blocks() -> Iterator[torch.Tensor]:
        yield from tensor.detach().cpu().contiguous().reshape(-1).split(BLOCK)

    return Stream(tuple(tensor.shape), _name(tensor.dtype), blocks)


def from_stored(stored: StoredTensor) -> Stream:
    """Stream a tensor from its file, read block by block where its values lie in one piece."""
    place = stored.place
    if place is None:
        return Stream(stored.shape, stored.dtype, lambda: from_tensor(stored.load()).blocks())
    return Stream(
        stored.shape,
        stored.dtype,
        lambda: _read(place.path, place.offset, stored.dtype, stored.size),
    )


def as_stream(source: torch.Tensor | StoredTensor | Stream) -> Stream:
    """Stream whatever holds one tensor."""
    import torch

    if isinstance(source, Stream):
        return source
    return from_tensor(source) if isinstance(source, torch.Tensor) else from_stored(source)


def cast(stream: Stream, dtype: str, *, what: str) -> Stream:
    """Round to another floating type; integers keep theirs.

    Args:
        stream: Finite values.
        dtype: A torch dtype's name.
        what: The tensor, for the message.

    Raises:
        CheckpointError: On reading, when a value lies outside the range of ``dtype``.
    """
    import torch

    if stream.dtype == dtype or not getattr(torch, stream.dtype).is_floating_point:
        return stream
    wanted = getattr(torch, dtype)

    def blocks() -> Iterator[torch.Tensor]:
        for block in stream.blocks():
            rounded = block.to(wanted)
            if not all_finite(rounded):
                raise CheckpointError(
                    f"{what} has values outside the range of {dtype}.",
                    "Use --dtype bfloat16 or float32.",
                )
            yield rounded

    return replace(stream, dtype=dtype, blocks=blocks)


def finite(stream: Stream, *, what: str) -> Stream:
    """The same stream, which refuses NaN and infinity when it is read.

    Args:
        stream: Any type.
        what: The tensor, for the message.

    Raises:
        CheckpointError: On reading.
    """

    def blocks() -> Iterator[torch.Tensor]:
        for block in stream.blocks():
            if not all_finite(block):
                raise CheckpointError(
                    f"{what} holds NaN or infinite values.",
                    "The training diverged or the file is damaged; take another checkpoint.",
                )
            yield block

    return replace(stream, blocks=blocks)


def watched(streams: Mapping[str, Stream], advance: Callable[..., None]) -> dict[str, Stream]:
    """The same streams; each calls ``advance(1, note=name)`` in the thread that has read it."""

    def watch(name: str, stream: Stream) -> Stream:
        def blocks() -> Iterator[torch.Tensor]:
            yield from stream.blocks()
            advance(1, note=name)

        return replace(stream, blocks=blocks)

    return {name: watch(name, stream) for name, stream in streams.items()}


def all_finite(block: torch.Tensor) -> bool:
    """Whether a flat CPU tensor holds neither NaN nor infinity; true for integers.

    The bits are compared as whole numbers: exact, and as fast as memory.
    """
    import torch

    if not block.is_floating_point() or not block.numel():
        return True
    if block.element_size() == 1:
        block = block.float()
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    integer = kinds[block.element_size()]
    infinity = int(torch.tensor(math.inf, dtype=block.dtype).view(integer).item())
    sign = 1 << (8 * block.element_size() - 1)
    signed = block.view(integer).numpy()
    unsigned = signed.view(f"u{signed.itemsize}")
    return int(signed.max()) < infinity and int(unsigned.max()) < sign + infinity


def largest_difference(first: Stream, second: Stream) -> float:
    """The largest absolute difference of two streams of one shape; 0 when they are equal."""
    worst = 0.0
    for one, other in zip(first.blocks(), second.blocks(), strict=True):
        if one.numel():
            worst = max(worst, float((one.double() - other.double()).abs().max()))
    return worst


def _read(path: Path, offset: int, dtype: str, size: int) -> Iterator[torch.Tensor]:
    """Map a tensor's part of a file, and let each block's memory go when the next but one is asked.

    A mapping is several times cheaper than reading into fresh memory. A block that is looked at
    later is read from the file again.
    """
    import torch

    if not size:
        return
    width = width_of(dtype)
    if path.stat().st_size < offset + size * width:
        raise CheckpointError(f"'{path}' is truncated.", "Copy or download it again.")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    done = offset
    for first in range(0, size, BLOCK):
        begin, count = offset + first * width, min(BLOCK, size - first)
        if begin % width:
            data = bytearray(memoryview(mapped)[begin : begin + count * width])
            yield torch.frombuffer(data, dtype=getattr(torch, dtype))
        else:
            kind = getattr(torch, dtype)
            yield torch.frombuffer(mapped, dtype=kind, count=count, offset=begin)
        done = _let_go(mapped, done, begin)


def _let_go(mapped: mmap.mmap, begin: int, end: int) -> int:
    """Free the memory of the whole pages between two places of a mapping; gives the new begin."""
    page = mmap.PAGESIZE
    low, high = begin - begin % page, end - end % page
    if high > low and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED, low, high - low)
    return max(high, begin)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
