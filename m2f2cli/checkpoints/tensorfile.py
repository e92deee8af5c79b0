"""The safetensors container: written tensor by tensor with a digest of each, read lazily.

Format: https://github.com/huggingface/safetensors (eight bytes of header length, a JSON header, the
raw little-endian values). Reading and writing stream, so their memory does not grow with the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m2f2cli.checkpoints.filling import FileOfPieces, spread
from m2f2cli.checkpoints.streams import Stream, as_stream
from m2f2cli.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# Name in the file -> name in torch.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_CODES = {name: code for code, name in DTYPES.items()}


class Place(NamedTuple):
    """Where a tensor's values lie in one piece, in order.

    Attributes:
        path: The file.
        offset: Its first byte.
    """

    path: Path
    offset: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still on disk.

    Args:
        shape: Its sizes.
        dtype: Its torch dtype's name, for example ``float32``.
        load: Reads it; the values are mapped from the file, not copied, where the layout allows it.
        place: Where its values lie, if they lie in one piece.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]
    place: Place | None = None

    def __setstate__(self, state: object) -> None:
        """Ignore it: a pickle that builds one cannot change it."""

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


def write_tensor_file(
    path: Path, tensors: Mapping[str, torch.Tensor] | Mapping[str, Stream]
) -> dict[str, str]:
    """Write one safetensors file and return ``{name: digest}``.

    Args:
        path: The file to write.
        tensors: Tensors of any device and stride, or streams; several are read at once.

    Returns:
        For each tensor the hex SHA-256 of its dtype, shape and values.

    Raises:
        CheckpointError: A tensor's dtype has no name in the format, or a stream cannot be read.
        OSError: The disk refuses.
    """
    streams = {name: as_stream(tensor) for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Widest elements first, so that every tensor is aligned to its element size.
    order = sorted(streams, key=lambda name: (-streams[name].width, name))
    end = 0
    for name in order:
        begin, end = end, end + streams[name].nbytes
        header[name] = {
            "dtype": _code(name, streams[name].dtype),
            "shape": list(streams[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with FileOfPieces(path, len(head) + end) as file:
        file.rest.append((0, head))

        def write(name: str) -> str:
            with file.piece(len(head) + header[name]["data_offsets"][0]) as piece:
                return _digest(streams[name], piece.write)

        return dict(zip(order, spread(write, order), strict=True))


def digest_of(tensor: torch.Tensor | StoredTensor | Stream) -> str:
    """Hex SHA-256 of a tensor's dtype, shape and values."""
    return _digest(as_stream(tensor), lambda block: None)


def digests_of(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """``digest_of`` each tensor, several at once."""
    return dict(zip(tensors, spread(digest_of, tensors.values()), strict=True))


def _digest(stream: Stream, each: Callable[[torch.Tensor], None]) -> str:
    """Hash a stream and hand each block to ``each`` as flat uint8 values."""
    import torch

    digest = hashlib.sha256(f"{stream.dtype} {list(stream.shape)}\n".encode())
    for block in stream.blocks():
        data = block.view(torch.uint8)
        digest.update(data.numpy().data)
        each(data)
    return digest.hexdigest()


def open_tensor_file(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a safetensors file without reading them.

    Raises:
        CheckpointError: The file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(path), framework="pt")
        offsets = _offsets(path)
        found = {}
        for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            view = file.get_slice(name)
            dtype = DTYPES.get(view.get_dtype(), view.get_dtype())
            shape = tuple(view.get_shape())
            place = Place(path, offsets[name])
            found[name] = StoredTensor(shape, dtype, _loader(file, name), place)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' is no complete safetensors file ({_first_line(error)}).",
            "Copy or download it again.",
        ) from error
    return found


def _loader(file: Any, name: str) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    return load


def _offsets(path: Path) -> dict[str, int]:
    """Where each tensor of a sound safetensors file begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _code(name: str, dtype: str) -> str:
    code = _CODES.get(dtype)
    if code is None:
        raise CheckpointError(f"Tensor '{name}' has dtype {dtype}, which cannot be stored.")
    return code
