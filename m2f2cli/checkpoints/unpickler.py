"""The restricted unpickler: builds tensors on disk, numbers, strings and plain containers.

A pickle is a program. Every class or function it names beyond a short list becomes an inert
``Placeholder``; nothing the file names is imported or run. What a pickle may build or call is
kept free of state that it could set.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2f2cli.checkpoints.tensorfile import StoredTensor
from m2f2cli.checkpoints.torchfile import Storage
from m2f2cli.errors import CheckpointError

# Storage class in a pickle -> torch dtype.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
_DTYPES = frozenset(_STORAGES.values()) | {"float8_e4m3fn", "float8_e5m2"}
# What a broken or hostile pickle may raise inside the unpickler.
_FAULTS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
)


class Placeholder:
    """Stands for a class or function that the file names and the reader does not know. Inert."""

    source = "?"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignore everything."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        """Ignore everything."""
        return object.__new__(cls)

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        """Ignore everything."""

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        """Stay a placeholder."""
        return self

    __setstate__ = __setitem__ = append = extend = add = update = _ignore

    def __repr__(self) -> str:
        return f"<placeholder for {self.source}>"


class PlainDict(dict[Any, Any]):
    """Stands for ``OrderedDict``; keeps no attributes."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore attributes such as ``_metadata``."""


def scan(path: Path, stream: Any) -> None:
    """Walk one pickle's opcodes without running them: it must end, and its memo must be sane."""
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            count += 1
            if "PUT" in opcode.name and isinstance(argument, int) and argument > count:
                raise damaged(path)
    except _FAULTS as error:
        raise damaged(path) from error


def damaged(path: Path) -> CheckpointError:
    """The one sentence for contents that cannot be read."""
    return CheckpointError(
        f"'{path}' is truncated or damaged: its contents cannot be read.",
        "Copy or download it again.",
    )


class _Builder:
    """A function a pickle may call. Takes no state, so a pickle cannot change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        """Ignore it."""


@dataclass(frozen=True)
class _Name:
    """A storage class or dtype as a value."""

    dtype: str

    def __setstate__(self, state: object) -> None:
        """Ignore it."""


class _NumpyDtype:
    """Stands for ``numpy.dtype`` while a NumPy number is rebuilt."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment: torch writes native little-endian."""


class Reader(pickle.Unpickler):
    """Builds plain data; anything else becomes a ``Placeholder``."""

    def __init__(
        self, stream: io.BytesIO, path: Path, storage: Callable[[str, str, int], Storage]
    ) -> None:
        super().__init__(stream, encoding="utf-8", errors="surrogateescape")
        self._stream = stream
        self._path = path
        self._storage = storage
        self._inert: dict[str, type[Placeholder]] = {}

    @property
    def foreign(self) -> tuple[str, ...]:
        """The classes and functions made inert so far."""
        return tuple(sorted(self._inert))

    def run(self) -> Any:
        """Read one object.

        Raises:
            CheckpointError: The pickle is damaged.
        """
        begin = self._stream.tell()
        scan(self._path, self._stream)
        end = self._stream.tell()
        self._stream.seek(begin)
        try:
            value = self.load()
        except _FAULTS as error:
            raise damaged(self._path) from error
        self._stream.seek(end)
        return value

    def find_class(self, module: str, name: str) -> Any:
        """Answer a name with a known builder or an inert class; import nothing."""
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _Name(_STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return _Name(name)
        builder = _BUILDERS.get((module, name))
        if builder is not None:
            return builder
        source = f"{module}.{name}"
        if source not in self._inert:
            self._inert[source] = type("Placeholder", (Placeholder,), {"source": source})
        return self._inert[source]

    def persistent_load(self, pid: Any) -> Any:
        """Answer a reference to a storage."""
        if isinstance(pid, tuple) and pid and pid[0] == "module":
            return pid[1]
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("unknown persistent id")
        _, kind, key, _, count, *view = pid
        if not isinstance(kind, _Name) or not isinstance(key, str) or not isinstance(count, int):
            raise pickle.UnpicklingError("malformed storage")
        storage = self._storage(key, kind.dtype, count)
        if view and view[0] is not None:
            _, offset, size = view[0]
            return storage.part(int(offset), int(size))
        return storage


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> StoredTensor | None:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without storage")
    return storage.tensor(offset, tuple(size), tuple(stride))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> StoredTensor | None:
    kind = next((value for value in rest if isinstance(value, _Name)), None)
    if not isinstance(storage, Storage) or kind is None:
        raise pickle.UnpicklingError("a tensor without storage")
    return storage.cast(kind.dtype).tensor(offset, tuple(size), tuple(stride))


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    return function(*args) if isinstance(function, _Builder) else Placeholder()


def _numpy_scalar(dtype: Any, data: Any = b"") -> Any:
    import numpy as np

    if not isinstance(dtype, _NumpyDtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("malformed number")
    kind = np.dtype(dtype.kind)
    if kind.hasobject or len(data) != kind.itemsize:
        raise pickle.UnpicklingError("malformed number")
    return np.frombuffer(data, kind)[0].item()


def _plain_dict(*args: Any) -> PlainDict:
    return PlainDict(args[0]) if args and isinstance(args[0], (dict, list)) else PlainDict()


def _text(*values: Any) -> str:
    if not all(isinstance(value, (str, int)) for value in values):
        raise pickle.UnpicklingError("text expected")
    return ":".join(map(str, values))


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    return _text(text).encode("latin1")


def _builders() -> Iterator[tuple[tuple[str, str], Any]]:
    tensor = _Builder(_rebuild_tensor)
    for module in ("torch._utils", "torch._tensor"):
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            yield (module, name), tensor
        yield (module, "_rebuild_tensor_v3"), _Builder(_rebuild_tensor_v3)
        yield (module, "_rebuild_parameter"), _Builder(lambda data, *rest: data)
        yield (module, "_rebuild_parameter_with_state"), _Builder(lambda data, *rest: data)
        yield (module, "_rebuild_from_type_v2"), _Builder(_rebuild_from_type)
    yield ("torch", "Size"), _Builder(lambda sizes=(): tuple(sizes))
    yield ("torch", "device"), _Builder(_text)
    yield ("torch.serialization", "_get_layout"), _Builder(_text)
    yield ("collections", "OrderedDict"), PlainDict
    yield ("collections", "defaultdict"), _Builder(_plain_dict)
    yield ("_codecs", "encode"), _Builder(_encode)
    for module in ("builtins", "__builtin__"):
        yield (module, "set"), _Builder(lambda values=(): list(values))
        yield (module, "frozenset"), _Builder(lambda values=(): list(values))
        yield (module, "complex"), _Builder(complex)
        yield (module, "dict"), _Builder(_plain_dict)
        yield (module, "list"), _Builder(lambda values=(): list(values))
        yield (module, "slice"), _Builder(slice)
    for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
        yield (core, "scalar"), _Builder(_numpy_scalar)
    yield ("numpy", "dtype"), _Builder(lambda kind, *flags: _NumpyDtype(_text(kind)))


_BUILDERS: Mapping[tuple[str, str], Any] = dict(_builders())
