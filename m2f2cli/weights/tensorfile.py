"""The safetensors container: written tensor by tensor with a digest of each, read lazily.

Format: https://github.com/huggingface/safetensors (eight bytes of header length, a JSON header, the
raw little-endian values). Writing streams, so its memory does not grow with the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still on disk.

    Args:
        shape: Its sizes.
        dtype: Its torch dtype's name, for example ``float32``.
        load: Reads it; the values are mapped from the file, not copied, where the layout allows it.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]

    def __setstate__(self, state: object) -> None:
        """Ignore it: a pickle that builds one cannot change it."""

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


def write_tensor_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Write one safetensors file and return ``{name: digest}``.

    Args:
        path: The file to write.
        tensors: Any device, any stride; each is copied to contiguous CPU memory in its turn.

    Returns:
        For each tensor the hex SHA-256 of its dtype, shape and values.

    Raises:
        CheckpointError: A tensor's dtype has no name in the format.
        OSError: The disk refuses.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Widest elements first, so that every tensor is aligned to its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _code(name, tensor),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digests = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            data = _bytes_of(tensors[name])
            digests[name] = _digest(tensors[name], data)
            file.write(data)
    return digests


def digest_of(tensor: torch.Tensor) -> str:
    """Hex SHA-256 of a tensor's dtype, shape and values."""
    return _digest(tensor, _bytes_of(tensor))


def open_tensor_file(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a safetensors file without reading them.

    Raises:
        CheckpointError: The file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(path), framework="pt")
        found = {}
        for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            view = file.get_slice(name)
            dtype = DTYPES.get(view.get_dtype(), view.get_dtype())
            found[name] = StoredTensor(tuple(view.get_shape()), dtype, _loader(file, name))
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _code(name: str, tensor: torch.Tensor) -> str:
    code = _CODES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise CheckpointError(f"Tensor '{name}' has dtype {tensor.dtype}, which cannot be stored.")
    return code


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _digest(tensor: torch.Tensor, data: memoryview) -> str:
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n"
    digest = hashlib.sha256(kind.encode())
    digest.update(data)
    return digest.hexdigest()
