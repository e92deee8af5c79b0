"""Foreign ``.pth``, ``.pt`` and ``.bin`` files, read by torch's restricted unpickler.

A pickle is a program. torch's reader for weights alone builds tensors, numbers, strings and plain
containers; every other class or function a file names is answered by an inert stand-in, so nothing
in the file runs and a training scheduler inside a checkpoint does no harm. Before torch sees the
file, its program is walked without running it: what would cost time or memory out of proportion is
refused, and what is broken is said in one sentence.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from m2f2cli.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_AGAIN = "Copy or download it again."
_WRAPPERS = ("model_state_dict", "state_dict", "model", "module", "net", "network", "weights")
_WRAPPED_IN = 3  # how many levels of keys may lie around a state dict
# How every file begins that torch wrote before 1.6: two pickles, a magic number and a version.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
_LEGACY_PICKLES = 5  # magic number, version, system, content, keys of the storages
_LOCAL_HEADER = 30
_PROTOCOL = 2
_BLOCKED = frozenset({"sys", "os", "posix", "nt"})  # torch refuses these for good
# Limits of a program: nesting and size of what is hashed, and what its calls may copy in all.
_DEEPEST_KEY, _LARGEST_KEY = 64, 10_000
_MOST_COPIED = 10_000_000
_CALL_GROWTH = 4  # a call may return more than it is given, for example an encoded text
_DEEPEST, _LARGEST_NUMBER = 1000, 1 << 20
_MOST_STEPS = 3_000_000
# Steps that put a number, a text or nothing on the stack.
_PLAIN = frozenset(
    (
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
        *("NONE", "NEWTRUE", "NEWFALSE"),
    )
)
_CODECS = ("latin1", "latin-1", "utf-8", "ascii")  # others take time out of proportion
_MOST_DIMENSIONS = 64
# What a broken or hostile file may raise inside torch's reader.
_FAULTS = (
    pickle.UnpicklingError,
    EOFError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    OSError,
    struct.error,
)


class Placeholder:
    """Stands for a class or function that a file names. Inert."""

    source = "?"

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        """Ignore everything."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignore everything."""

    def __setstate__(self, state: object) -> None:
        """Ignore everything."""

    def __repr__(self) -> str:
        return f"<placeholder for {self.source}>"


class _NumpyDtype(Placeholder):
    """Stands for ``numpy.dtype`` while a NumPy number is read; its byte order is ours."""

    def __init__(self, kind: str = "", *flags: object) -> None:
        self.kind = kind


def _numpy_scalar(dtype: object, data: object = b"") -> Any:
    import numpy as np

    if not isinstance(dtype, _NumpyDtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("malformed number")
    kind = np.dtype(dtype.kind)
    if kind.hasobject or len(data) != kind.itemsize:
        raise pickle.UnpicklingError("malformed number")
    return np.frombuffer(data, kind)[0].item()


class _PlainDict:
    """Stands for a class of mappings: what is made of it is an ordered dictionary."""

    def __new__(cls, *args: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        """Ignore everything, a factory of default values for example."""
        return OrderedDict()


# Plain data that torch's reader does not know by itself.
_KNOWN: Mapping[str, Any] = {
    "numpy.dtype": _NumpyDtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "collections.defaultdict": _PlainDict,
    **{f"builtins.{kind}": type(kind, (Placeholder,), {}) for kind in ("dict", "list", "slice")},
    "builtins.frozenset": frozenset,
}


@dataclass(frozen=True)
class TorchFile:
    """What a file holds that ``torch.save`` wrote.

    Args:
        path: The file.
        layout: ``zip``, or ``legacy`` for that before torch 1.6.
        content: The outermost object. Tensors of a zip file are mapped, not copied.
        foreign: Classes and functions it names that were made inert.
        offsets: The place of each storage in a zip file, by its address in memory.
    """

    path: Path
    layout: str
    content: Any
    foreign: tuple[str, ...] = ()
    offsets: Mapping[int, int] = field(default_factory=dict, repr=False)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where a tensor's values begin in the file, if they lie there in one piece."""
        begin = self.offsets.get(tensor.untyped_storage().data_ptr())
        if begin is None or not tensor.is_contiguous():
            return None
        return begin + int(tensor.storage_offset()) * tensor.element_size()

    def state_dict(self) -> tuple[tuple[str, ...], dict[str, torch.Tensor]]:
        """The keys under which the state dict lies (none if it is the file itself), and it.

        Single values beside it, such as a metric saved as a tensor, are none of it.

        Raises:
            CheckpointError: The file holds no state dict, or several.
        """
        if isinstance(self.content, dict):
            found = self._sets_of(self.content)
            known = [keys for name in _WRAPPERS for keys in found if keys and keys[-1] == name]
            known.sort(key=len)
            if known[1:2] and known[0][-1] == known[1][-1] and len(known[0]) == len(known[1]):
                known = []
            if known or len(found) == 1:
                where = known[0] if known else next(iter(found))
                return where, found[where]
            if found:
                names = ", ".join(".".join(keys) for keys in found)
                raise CheckpointError(
                    f"'{self.path}' holds several sets of weights: {names}.",
                    "Save the wanted one alone.",
                )
        raise CheckpointError(
            f"'{self.path}' holds no model weights.",
            "Give a file with a state dict; optimizer states and whole pickled models do not help.",
        )

    def _sets_of(
        self, mapping: Mapping[Any, Any], levels: int = _WRAPPED_IN
    ) -> dict[tuple[str, ...], dict[str, torch.Tensor]]:
        """The sets of tensors in a mapping, by the keys that lead to them.

        Larger sets below the mapping's own tensors take their place.
        """
        own = self._tensors_of(mapping)
        inner = {k: v for k, v in mapping.items() if isinstance(k, str) and isinstance(v, dict)}
        larger = {
            (key, *keys): tensors
            for key, value in inner.items()
            if levels
            for keys, tensors in self._sets_of(value, levels - 1).items()
            if _extent(tensors) > _extent(own)
        }
        return larger or ({(): own} if own else {})

    def _tensors_of(self, mapping: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
        import torch

        found = {}
        for key, value in mapping.items():
            plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
            if not isinstance(key, str) or not plain or value.is_quantized or not value.is_cpu:
                continue
            room = value.untyped_storage().nbytes()
            if value.dim() > _MOST_DIMENSIONS or value.numel() * value.element_size() > room:
                raise _damaged(self.path)
            found[key] = value.detach()
        return found


def read_torch_file(path: Path) -> TorchFile:
    """Read a file that ``torch.save`` wrote; nothing in it runs.

    Raises:
        CheckpointError: The file is truncated, damaged, out of proportion, or something else.
    """
    with path.open("rb") as file:
        head = file.read(len(_LEGACY))
        if head.startswith(b"PK\x03\x04"):
            return _read_zip(path)
        if head != _LEGACY:
            raise (
                _damaged(path)
                if _LEGACY.startswith(head)
                else CheckpointError(
                    f"'{path}' is a pickle, but not one that torch.save wrote.",
                    "Give the file that holds the model's weights.",
                )
            )
        file.seek(0)
        programs = [_Program(path, file) for _ in range(_LEGACY_PICKLES)]
    content, foreign = _load(path, programs, mmap=False, place=lambda storage, _: storage)
    return TorchFile(path, "legacy", content, foreign)


def _read_zip(path: Path) -> TorchFile:
    records = _records(path)
    begin, size = records["data.pkl"]
    with path.open("rb") as file:
        file.seek(begin)
        program = _Program(path, io.BytesIO(file.read(size)))
    if missing := [key for key in program.keys if f"data/{key}" not in records]:
        raise CheckpointError(f"'{path}' lacks its record 'data/{missing[0]}'.", _AGAIN)
    order = iter(program.keys)
    offsets: dict[int, int] = {}

    def place(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        """Note where a storage lies; torch asks for each once, in the order of the program."""
        if storage.nbytes():
            begin, size = records[f"data/{next(order)}"]
            if storage.nbytes() > size:
                raise ValueError("a storage longer than its record")
            offsets[storage.data_ptr()] = begin
        return storage

    content, foreign = _load(path, [program], mmap=True, place=place)
    if len({address - offset for address, offset in offsets.items()}) > 1:
        offsets = {}  # not one mapping of the file in this order
    return TorchFile(path, "zip", content, foreign, offsets)


def _records(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and size of each record of a torch zip file; nothing is decompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"'{path}' is a truncated or damaged archive.", _AGAIN) from error
    root = next((n.removesuffix("data.pkl") for n in entries if n.endswith("/data.pkl")), None)
    if root is None:
        raise CheckpointError(
            f"'{path}' is a zip archive, but not one that torch.save wrote.",
            "Give the .pth or .bin file with the weights; unpack other archives first.",
        )
    if f"{root}constants.pkl" in entries:
        raise CheckpointError(
            f"'{path}' is a TorchScript program, not a file of weights.",
            "Save its state dict: torch.save(model.state_dict(), PATH)",
        )
    records = {}
    with path.open("rb") as file:
        length = file.seek(0, io.SEEK_END)
        for name, entry in entries.items():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"'{path}' is a compressed archive, which torch.save never writes.",
                    "Save the weights again with torch.save.",
                )
            file.seek(max(0, entry.header_offset))
            head = file.read(_LOCAL_HEADER)
            names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            begin = entry.header_offset + _LOCAL_HEADER + names
            outside = entry.header_offset < 0 or begin + entry.file_size > length
            if len(head) < _LOCAL_HEADER or outside:
                raise CheckpointError(f"'{path}' is truncated.", _AGAIN)
            records[name.removeprefix(root)] = (begin, entry.file_size)
        begin, size = records.get("byteorder", (0, 0))
        file.seek(begin)
        if size and file.read(size) != b"little":
            raise CheckpointError(f"'{path}' was written on a big-endian machine.")
    return records


class _Node:
    """What is known of a value that a program would build.

    Attributes:
        depth: How deep it nests.
        items: How many values it holds directly.
        size: How many values it holds, shared ones as often as they occur.
        value: A text, a number, the name of a class, or what a small tuple holds.
        widest: The largest number of items of a value that it holds directly.
    """

    __slots__ = ("depth", "items", "made_of", "size", "value", "widest")

    def __init__(self, inside: Sequence[_Node] = (), value: Any = None) -> None:
        self.depth = self.size = 1
        self.items = len(inside)
        self.widest = 0
        self.made_of = ""
        self.value = value
        if inside:
            self.depth += max(node.depth for node in inside)
            self.size += sum(node.size for node in inside)
            self.widest = max(node.items for node in inside)
        if isinstance(value, str | bytes):
            self.size += len(value)

    def take(self, inside: Sequence[_Node]) -> None:
        self.depth = max(self.depth, 1 + max((node.depth for node in inside), default=0))
        self.size = min(self.size + sum(node.size for node in inside), 1 << 60)


class _Program:
    """One pickle, walked without running it.

    Args:
        path: The file, for messages.
        stream: Stands at its begin, and afterwards at its end.

    Attributes:
        keys: Of the storages it asks for that are not empty, each once, in order.
        names: Of the classes and functions it asks for.
        mappings: Those of them into whose instances it puts items.

    Raises:
        CheckpointError: The pickle is broken, of another protocol than torch writes, or builds
            something out of proportion to its length.
    """

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.keys: dict[str, None] = {}
        self.names: dict[str, None] = {}
        self.mappings: set[str] = set()
        self._copied = 0
        self._stack: list[_Node | None] = []  # None is a mark
        memo: dict[int, _Node | None] = {}
        try:
            argument: Any
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if opcode.name == "PROTO" and argument != _PROTOCOL:
                    raise CheckpointError(
                        f"'{path}' was saved with pickle protocol {argument}, which torch's "
                        "reader for weights does not know.",
                        "Save it again with torch.save and its own protocol.",
                    )
                if opcode.name in ("BINPUT", "LONG_BINPUT"):
                    if argument > count:
                        raise ValueError("a memo with gaps")
                    memo[argument] = self._stack[-1]
                elif opcode.name in ("BINGET", "LONG_BINGET"):
                    self._stack.append(memo[argument])
                elif opcode.name in _PLAIN:
                    self._stack.append(_Node((), argument))
                else:
                    self._step(opcode, argument)
                if self._copied > _MOST_COPIED or count > _MOST_STEPS:
                    raise ValueError("more is built than the file holds")
                if self._stack and (top := self._stack[-1]) and top.depth > _DEEPEST:
                    raise ValueError("nested out of proportion")
        except _FAULTS as error:
            raise _damaged(path) from error

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do to the stack of nodes what an opcode does to the stack of values."""
        before, stack = opcode.stack_before, self._stack
        inside: list[_Node] = []
        below = len(before)
        if pickletools.markobject in before:
            below = before.index(pickletools.markobject)
            while (node := stack.pop()) is not None:
                inside.append(node)
            inside.reverse()
        taken = [_solid(stack.pop()) for _ in range(below)][::-1]
        if opcode.name == "MARK":
            stack.append(None)
        elif opcode.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"):
            target, items = taken[0], taken[1:] + inside
            if opcode.name.startswith("SETITEM"):
                # A key is hashed with all that it holds.
                if any(k.depth > _DEEPEST_KEY or k.size > _LARGEST_KEY for k in items[::2]):
                    raise ValueError("a key out of proportion")
                self.mappings.add(target.made_of)
            target.take(items)
            stack.append(target)
        elif opcode.name in ("REDUCE", "NEWOBJ"):
            _check_call(str(taken[0].value), taken[1])
            self._copied += taken[1].size
            made = _Node(taken)
            made.size *= _CALL_GROWTH
            made.made_of = str(taken[0].value)
            stack.append(made)
        elif opcode.name == "GLOBAL":
            name = argument.replace(" ", ".", 1)
            self.names[name] = None
            stack.append(_Node((), name))
        elif opcode.name == "BINPERSID":
            pid = taken[0].value  # ("storage", type, key, location, count, …)
            if isinstance(pid, tuple) and len(pid) >= 5 and isinstance(pid[2], str) and pid[4] != 0:
                self.keys.setdefault(pid[2])
            stack.append(_Node())
        elif opcode.stack_after:
            inside = taken + inside
            value = argument if argument is not None else tuple(node.value for node in inside[:8])
            stack.append(_Node(inside, value))


def _check_call(name: str, arguments: _Node) -> None:
    """Refuse a call that would take time or memory out of proportion to its arguments."""
    given = arguments.value if isinstance(arguments.value, tuple) else ()
    numbers = [value for value in given if isinstance(value, int)]
    if name.endswith("bytearray") and any(abs(value) > _LARGEST_NUMBER for value in numbers):
        raise ValueError("room for nothing")
    if name == "_codecs.encode" and not all(codec in _CODECS for codec in given[1:2]):
        raise ValueError("an unusual encoding")
    if name.startswith(("torch._utils.", "torch.Size")) and arguments.widest > _MOST_DIMENSIONS:
        raise ValueError("too many dimensions")


def _solid(node: _Node | None) -> _Node:
    if node is None:
        raise ValueError("a mark where a value belongs")
    return node


def _load(
    path: Path,
    programs: Sequence[_Program],
    *,
    mmap: bool,
    place: Callable[[Any, str], Any],
) -> tuple[Any, tuple[str, ...]]:
    """Let torch read a file with stand-ins for the names it does not know."""
    import torch

    names = {name for program in programs for name in program.names}
    unsafe = _unsafe(names)
    if blocked := sorted(name for name in unsafe if name.split(".")[0] in _BLOCKED):
        raise CheckpointError(
            f"'{path}' asks for {blocked[0]}, which can run programs; it is not read.",
            "No model needs it. Take the file from a source you trust.",
        )
    foreign = sorted(unsafe - set(_KNOWN))
    # A name of Python 2 is read as that of Python 3.
    filled = {name for program in programs for name in program.mappings}
    mappings = {name.replace("__builtin__.", "builtins.", 1) for name in filled}
    allowed: list[Any] = [(_KNOWN[name], name) for name in unsafe & set(_KNOWN)]
    for name in foreign:
        kind = _PlainDict if name in mappings else Placeholder
        allowed.append((type("Placeholder", (kind,), {"source": name}), name))
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location=place, weights_only=True, mmap=mmap)
    except _FAULTS as error:
        raise _damaged(path) from error
    return content, tuple(foreign)


def _unsafe(names: set[str]) -> set[str]:
    """The names that torch's reader does not know by itself.

    torch tells this of a zip file alone, so one is made that holds nothing but the names.
    """
    import torch

    program = b"\x80\x02" + b"".join(
        f"c{module}\n{name}\n".encode() for module, _, name in (n.rpartition(".") for n in names)
    )
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("names/data.pkl", program + b".")
        archive.writestr("names/version", "3\n")
    data.seek(0)
    return set(torch.serialization.get_unsafe_globals_in_checkpoint(data))


def _extent(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """How many values a set of tensors holds, and how many tensors."""
    return sum(tensor.numel() for tensor in tensors.values()), len(tensors)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"'{path}' is truncated or damaged: its contents cannot be read.", _AGAIN
    )
