"""Checkpoints on disk: opened as names of lazily read tensors, written whole or not at all.

A checkpoint is a folder of ``config.json``, ``model.safetensors`` (in shards when large) and
``stage.json``. Weights of others are opened alike, in one file, shards or the parts of a delta,
safetensors or pickles. Tensors go from file to file block by block, several at once, so that memory
does not grow with them.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from m2f2cli.checkpoints.keymaps import (
    DELTAS,
    DETECTOR,
    DETECTOR_A,
    DETECTOR_B,
    EXPLAINER,
    OUR_EXPLAINER,
    kind_of,
    kind_of_folder,
)
from m2f2cli.checkpoints.torch_files import read_torch_file
from m2f2cli.errors import CheckpointError, ConfigError
from m2f2cli.files import MARK, ParallelFile, atomic_folder, json_bytes, read_json, sha256_of

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARED = "shared.json"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# A folder's weights, the first form that is there: safetensors before pickles.
_FORMS = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
INDICES = (INDEX, "pytorch_model.bin.index.json")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_PARTS = ("delta.safetensors", "mm_projector.bin", "non_lora_trainables.bin")
_POINTER = b"version https://"  # of the Git LFS specification
_AGAIN = "Copy or download it again."
_ONE = "Keep the file that is right, and take the other out of the folder."
_BAD_VALUES = "The training diverged or the file is damaged; take another checkpoint."
_GATHER = (
    "Gather the weights first: python RUN_DIR/zero_to_fp32.py RUN_DIR OUTPUT_DIR, a script that "
    "DeepSpeed puts there; for FSDP: accelerate merge-weights RUN_DIR OUTPUT_DIR."
)
# Fields of config.json that change without the model changing.
_BOOKKEEPING = frozenset(
    {"_name_or_path", "architectures", "dtype", "license", "torch_dtype", "transformers_version"}
)
_NAMED_IN_ERRORS = 4
# What bitsandbytes stores beside a weight that it has quantized.
_PACKED = re.compile(r"\.(absmax|quant_state\.bitsandbytes__\w+|SCB)$")
_MOST_WORKERS = 8
# Name in a safetensors file -> name in torch.
_DTYPES = {
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
_CODES = {name: code for code, name in _DTYPES.items()}
BLOCK = 1 << 20
"""How many values every block of a tensor holds, but the last."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


# --- tensors ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are read when asked for, as often as asked.

    Args:
        shape: Its sizes.
        dtype: Its torch dtype's name, for example ``float32``.
        blocks: Gives its values in order, as flat CPU tensors of ``BLOCK`` values (the last may
            be shorter). A block is not changed afterwards.
        whole: Gives it at once, mapped from its file where that can be; by default from blocks.
        path: The file in which its values lie.
        offset: Their first byte in it, where they lie in one piece.
        checked: Reading it refuses NaN and infinity.
    """

    shape: tuple[int, ...]
    dtype: str
    blocks: Callable[[], Iterator[torch.Tensor]]
    whole: Callable[[], torch.Tensor] | None = None
    path: Path | None = None
    offset: int | None = None
    checked: bool = False

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether its values are floating-point numbers."""
        return _dtype(self.dtype).is_floating_point

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.size * _dtype(self.dtype).itemsize

    def load(self) -> torch.Tensor:
        """The tensor at once."""
        import torch

        if self.whole is not None:
            return self.whole()
        empty = torch.empty(0, dtype=_dtype(self.dtype))
        return torch.cat([empty, *self.blocks()]).reshape(self.shape)

    def floats(self) -> torch.Tensor:
        """Its values in float32, read block by block."""
        import torch

        return torch.cat([torch.empty(0), *(b.float() for b in self.blocks())]).reshape(self.shape)

    def cast(self, dtype: str, *, what: str) -> LazyTensor:
        """Round to another floating type; integers keep theirs.

        Reading the result raises a ``CheckpointError`` that names ``what`` when a value lies
        outside the range of ``dtype``.
        """
        if self.dtype == dtype or not self.floating:
            return self

        def rounded() -> Iterator[torch.Tensor]:
            for block in self.blocks():
                result = block.to(_dtype(dtype))
                if not all_finite(result):
                    if not all_finite(block):
                        raise CheckpointError(f"{what} holds NaN or infinite values.", _BAD_VALUES)
                    raise CheckpointError(
                        f"{what} has values outside the range of {dtype}.",
                        "Use --dtype bfloat16 or float32.",
                    )
                yield result

        return LazyTensor(self.shape, dtype, rounded, checked=True)

    def finite(self, *, what: str) -> LazyTensor:
        """The same; reading it refuses NaN and infinity by a ``CheckpointError`` on ``what``."""
        if self.checked:
            return self

        def checked() -> Iterator[torch.Tensor]:
            for block in self.blocks():
                if not all_finite(block):
                    raise CheckpointError(f"{what} holds NaN or infinite values.", _BAD_VALUES)
                yield block

        return LazyTensor(self.shape, self.dtype, checked, checked=True)


def from_tensor(tensor: torch.Tensor) -> LazyTensor:
    """A tensor of any device and stride; it is copied where it is not contiguous."""

    def blocks() -> Iterator[torch.Tensor]:
        yield from tensor.detach().cpu().contiguous().reshape(-1).split(BLOCK)

    dtype = str(tensor.dtype).removeprefix("torch.")
    return LazyTensor(tuple(tensor.shape), dtype, blocks, lambda: tensor)


def as_lazy(source: torch.Tensor | LazyTensor) -> LazyTensor:
    """Whatever holds one tensor, as a lazy one."""
    return source if isinstance(source, LazyTensor) else from_tensor(source)


def watched(
    tensors: Mapping[str, LazyTensor], advance: Callable[..., None]
) -> dict[str, LazyTensor]:
    """The same tensors; each calls ``advance(1, note=name)`` in the thread that has read it."""

    def watch(name: str, tensor: LazyTensor) -> LazyTensor:
        def blocks() -> Iterator[torch.Tensor]:
            yield from tensor.blocks()
            advance(1, note=name)

        return replace(tensor, blocks=blocks, whole=None)

    return {name: watch(name, tensor) for name, tensor in tensors.items()}


def _dtype(name: str) -> torch.dtype:
    import torch

    kind: torch.dtype = getattr(torch, name)
    return kind


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


def largest_difference(first: LazyTensor, second: LazyTensor) -> float:
    """The largest absolute difference of two tensors of one shape; 0 when they are equal."""
    worst = 0.0
    for one, other in zip(first.blocks(), second.blocks(), strict=True):
        if one.numel():
            worst = max(worst, float((one.double() - other.double()).abs().max()))
    return worst


def _in_file(
    path: Path, offset: int, shape: tuple[int, ...], dtype: str, whole: Callable[[], torch.Tensor]
) -> LazyTensor:
    """A tensor whose values lie in a file in one piece."""

    def blocks() -> Iterator[torch.Tensor]:
        return _map(path, offset, dtype, math.prod(shape))

    return LazyTensor(shape, dtype, blocks, whole, path, offset)


def _map(path: Path, offset: int, dtype: str, size: int) -> Iterator[torch.Tensor]:
    """Map a tensor's part of a file, and let each block's memory go when the next but one is asked.

    A mapping is several times cheaper than reading into fresh memory. A block that is looked at
    later is read from the file again.
    """
    import torch

    if not size:
        return
    kind = _dtype(dtype)
    width = kind.itemsize
    if path.stat().st_size < offset + size * width:
        raise CheckpointError(f"'{path}' is truncated.", _AGAIN)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    page, done = mmap.PAGESIZE, offset - offset % mmap.PAGESIZE
    for first in range(0, size, BLOCK):
        begin, count = offset + first * width, min(BLOCK, size - first)
        if begin % width:
            data = bytearray(memoryview(mapped)[begin : begin + count * width])
            yield torch.frombuffer(data, dtype=kind)
        else:
            yield torch.frombuffer(mapped, dtype=kind, count=count, offset=begin)
        whole_pages = begin - begin % page
        if whole_pages > done and hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_DONTNEED, done, whole_pages - done)
            done = whole_pages


def workers() -> int:
    """How many threads ``spread`` uses: one more than torch does, for while one waits for disk."""
    import torch

    return min(torch.get_num_threads() + 1, _MOST_WORKERS)


def spread(job: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """The results of a job for many items, in threads for each of which torch uses one core.

    The first exception ends the others and is raised.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers(), "m2f2-tensor", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(job, items))
    finally:
        torch.set_num_threads(threads)  # a worker's setting is that of all threads to come


# --- opening ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """The weights of one folder or file, still on disk.

    Args:
        path: The folder or file.
        kind: One of ``keymaps``.
        tensors: By name as it stands in the files.
        files: The files they lie in.
        config: ``config.json`` or ``adapter_config.json`` of the folder.
        layout: How the files are written: ``zip``, ``legacy``, ``safetensors`` or several.
        where: The key under which a file's state dict lies; empty when the file is one.
        foreign: Classes and functions the files name that were made inert.
        others: Keys of a file that are no weights.
        absent: Shards that an index names and that are not there.
        faults: What is wrong with a folder.
        beside: Files that hold the weights once more, in a form that is not read.
    """

    path: Path
    kind: str
    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)
    layout: str = "safetensors"
    where: str = ""
    foreign: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    faults: tuple[CheckpointError, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where files that belong to it lie."""
        return self.path if self.path.is_dir() else self.path.parent


def open_weights(path: Path) -> Weights:
    """Open a folder or file strictly: every shard must be whole and there.

    Raises:
        CheckpointError: Nothing is there, no weights, an absent or truncated shard, an index that
            does not agree with its shards, or weights that are placeholders or quantized.
    """
    if not path.exists():
        raise CheckpointError(f"There is nothing at '{path}'.", "Check the path.")
    found = survey(path) if path.is_dir() else open_weight_file(path)
    if found.faults:
        raise found.faults[0]
    if not found.files:
        hint = "Give the folder with model.safetensors or pytorch_model.bin (or their shards)."
        sharded = (path / "zero_to_fp32.py").is_file() or any(path.glob("*.distcp"))
        said = f"The folder '{path}' holds no weights."
        raise CheckpointError(said, _GATHER if sharded else hint)
    refuse_unusable(found)
    if path.is_dir():
        _refuse_disagreement(found)
    return found


def refuse_unusable(found: Weights) -> None:
    """Refuse weights that stand for others: placeholders of sharded ones, quantized ones."""
    if empty := [key for key, tensor in found.tensors.items() if tensor.shape == (0,)]:
        raise CheckpointError(
            f"'{found.path}' holds {len(empty)} empty tensors ({name_some(empty)}): placeholders "
            "that DeepSpeed ZeRO-3 or FSDP leaves where each process has its own part.",
            _GATHER,
        )
    if packed := [key for key in found.tensors if _PACKED.search(key)]:
        bits = "8" if packed[0].endswith(".SCB") else "4"
        raise CheckpointError(
            f"'{found.path}' holds weights that bitsandbytes has quantized to {bits} bits: "
            f"{name_some(packed)}.",
            "Give the model in floating point; it is quantized when it is loaded, with --quantize.",
        )


def open_tensors(folder: Path) -> dict[str, LazyTensor]:
    """List the tensors of a checkpoint of ours, single file or shards, without reading them.

    Matrices stored as int8 with a scale for each row are listed as what they stand for, float32.

    Raises:
        CheckpointError: No weights, a missing or truncated shard, an index that does not agree
            with its shards, or see ``shared_tensors``.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        raise CheckpointError(f"'{folder}' has no {WEIGHTS}.", f"m2f2 info '{folder}'")
    found = open_weights(folder)
    if found.layout != "safetensors":
        raise CheckpointError(f"'{folder}' holds pickles under the name of {WEIGHTS}.", _AGAIN)
    return found.tensors


def read_tensors(folder: Path, *, finite: bool = False) -> dict[str, torch.Tensor]:
    """Read a checkpoint's tensors, mapped from the files.

    With ``finite``, NaN and infinity are refused, at the price of reading every value.

    Raises:
        CheckpointError: See ``open_tensors``; or a tensor holds NaN or infinity.
    """
    tensors = {key: stored.load() for key, stored in open_tensors(folder).items()}
    if finite:
        check_finite(tensors, what=f"'{folder}'")
    return tensors


def open_weight_file(path: Path) -> Weights:
    """Open a file of weights of any of the common layouts; nothing in it runs.

    Args:
        path: A ``.pth``, ``.pt``, ``.bin`` (torch's zip or older layout) or ``.safetensors`` file;
            the layout is read from the content, not the name.

    Raises:
        CheckpointError: The file is missing, truncated, something else, or holds no state dict.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file '{path}'.", "Check the path.") from error
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    if not head:
        raise CheckpointError(f"'{path}' is empty.", _AGAIN)
    # A header's length may begin with any byte, a pickle's first one too; it is never this large.
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and (head[:1] != b"\x80" or length < path.stat().st_size):
        tensors = _open_safetensors(path)
        return Weights(path, kind_of(tensors), tensors, (path,))
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _open_torch_file(path)
    if head.startswith(_POINTER):
        raise CheckpointError(
            f"'{path}' is a Git LFS pointer, not the file it stands for.",
            "Fetch the files with: git lfs pull",
        )
    raise CheckpointError(
        f"'{path}' is no PyTorch or safetensors file.",
        "Give a .pth, .pt, .bin or .safetensors file that holds model weights.",
    )


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """List the tensors of a safetensors file without reading them."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(str(path), framework="pt")  # checks the header
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"'{path}' is no complete safetensors file ({said}).", _AGAIN
        ) from error
    header.pop("__metadata__", None)
    _refuse_types(path, {name: entry["dtype"] for name, entry in header.items()}, _DTYPES)
    return {
        name: _in_file(
            path,
            8 + length + entry["data_offsets"][0],
            tuple(entry["shape"]),
            _DTYPES[entry["dtype"]],
            partial(opened.get_tensor, name),
        )
        for name, entry in header.items()
    }


def _refuse_types(path: Path, types: Mapping[str, str], known: Collection[str]) -> None:
    if odd := sorted(name for name, kind in types.items() if kind not in known):
        raise CheckpointError(
            f"'{path}' holds {name_some(odd)} of type {types[odd[0]]}, which no model has.",
            "The file is damaged or of another kind.",
        )


def _open_torch_file(path: Path) -> Weights:
    file = read_torch_file(path)
    where, found = file.state_dict()
    types = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in found.items()}
    _refuse_types(path, types, _CODES)
    tensors = {}
    for key, tensor in found.items():
        lazy = from_tensor(tensor)
        if (offset := file.offset_of(tensor)) is not None:
            lazy = _in_file(path, offset, lazy.shape, lazy.dtype, lazy.load)
        tensors[key] = lazy
    rest = tuple(str(k) for k in file.content if k not in (where[:1] or tensors))
    name, foreign = ".".join(where), file.foreign
    return Weights(path, kind_of(tensors), tensors, (path,), {}, file.layout, name, foreign, rest)


def survey(folder: Path) -> Weights:
    """Open what can be opened of a folder; ``faults`` says what is wrong with the rest.

    Safetensors go before pickles, a whole model before shards, a model before parts of a delta.

    Raises:
        CheckpointError: A JSON file is unreadable.
    """
    forms = _forms(folder)
    first = _open_form(folder, *forms[0])
    faults = list(first.faults)
    whole = any((folder / name).is_file() for name in _FORMS)
    if whole and (folder / ADAPTER_CONFIG).is_file():
        faults.append(
            CheckpointError(
                f"'{folder}' holds a model and, beside it, an adapter ({ADAPTER_CONFIG}), which "
                "is no part of it.",
                "Move the adapter into a folder of its own; m2f2 merge applies it.",
            )
        )
    tensors = first.tensors
    try:
        taken = shared_tensors(folder)
        if twice := tensors.keys() & taken.keys():
            raise CheckpointError(f"'{folder}' holds what it shares: {name_some(twice)}.", _AGAIN)
        tensors = _unpacked(tensors) | taken
    except CheckpointError as error:
        faults.append(error)
    configs = [folder / name for name in (() if whole else (ADAPTER_CONFIG,)) + (CONFIG,)]
    config: dict[str, Any] = {}
    if path := next((path for path in configs if path.is_file()), None):
        config = read_json(path)
        try:
            _check_config(path, config)
        except CheckpointError as error:
            faults.append(error)
    names = [file.name for file in first.files]
    return replace(
        first,
        kind=kind_of_folder(config, read_stage(folder), tensors, names),
        tensors=tensors,
        config=config,
        faults=tuple(faults),
        beside=tuple(path for name, _, _ in forms[1:] for path in name),
    )


def _open_form(folder: Path, names: Sequence[str], index: str, mapping: dict[str, str]) -> Weights:
    """Open the files of one form of a folder's weights."""
    absent = [
        name for name in names if Path(name).name != name or not os.path.isfile(folder / name)
    ]
    faults = []
    if absent:
        faults.append(
            CheckpointError(
                f"'{folder / index}' names the shard {name_some(absent)}, which is not there: it "
                "is missing.",
                "Copy or download the missing shards into the folder.",
            )
        )
    tensors: dict[str, LazyTensor] = {}
    opened: list[Weights] = []
    there = [name for name in names if name not in absent]
    for name in there:
        try:
            part = open_weight_file(folder / name)
        except CheckpointError as error:
            faults.append(error)
            continue
        opened.append(part)
        wanted = {key for key, shard in mapping.items() if shard == name}
        if index and (strays := wanted ^ set(part.tensors)):
            said = f"'{folder / name}' does not hold what {index} says: {name_some(strays)}."
            faults.append(CheckpointError(said, _AGAIN))
        if unlike := disagreement(tensors, part.tensors):
            said = f"'{folder / name}' and another file differ in {name_some(unlike)}."
            faults.append(CheckpointError(said, _ONE))
        tensors |= part.tensors
    return Weights(
        path=folder,
        kind="",
        tensors=tensors,
        files=tuple(folder / name for name in there),
        layout=", ".join(sorted({part.layout for part in opened})),
        foreign=tuple(sorted({name for part in opened for name in part.foreign})),
        others=tuple(sorted({name for part in opened for name in part.others})),
        absent=tuple(absent),
        faults=tuple(faults),
    )


def disagreement(first: Mapping[str, LazyTensor], second: Mapping[str, LazyTensor]) -> list[str]:
    """The tensors that both have and that differ in shape, type or a value."""
    common = sorted(first.keys() & second.keys())
    mine, theirs = (digests_of({key: part[key] for key in common}) for part in (first, second))
    return [key for key in common if mine[key] != theirs[key]]


def _refuse_disagreement(found: Weights) -> None:
    """Compare the weights of a folder with those of its other forms, by every value."""
    for names, index, mapping in _forms(found.path)[1:]:
        other = _open_form(found.path, names, index, mapping)
        if other.faults:
            raise other.faults[0]
        if unlike := disagreement(found.tensors, other.tensors):
            raise CheckpointError(
                f"'{found.path}' holds its weights twice, and {index or names[0]} differs from "
                f"{found.files[0].name} in {len(unlike)} tensors: {name_some(unlike)}.",
                _ONE,
            )


def _forms(folder: Path) -> list[tuple[list[str], str, dict[str, str]]]:
    """The forms of a folder's weights, the one that is read first.

    Each with its files, and the name and the content of their index, if there is one.
    """
    parts = [name for name in _PARTS if (folder / name).is_file()]
    found: list[tuple[list[str], str, dict[str, str]]] = []
    for name in _FORMS:
        if not (folder / name).is_file():
            continue
        if name not in INDICES:
            found.append(([name], "", {}))
            continue
        mapping = read_json(folder / name).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
            raise CheckpointError(f"'{folder / name}' has no weight_map.", _AGAIN)
        found.append((sorted(set(mapping.values())), name, mapping))
    if not found:
        adapters = [[name] for name in _ADAPTERS if (folder / name).is_file()] or [[]]
        found = [([*adapters[0], *parts], "", {}), *((name, "", {}) for name in adapters[1:])]
    return found


def home_of(path: Path) -> Path:
    """The folder that a weight file belongs to, where it is one of several files; else the file.

    A shard stands for its folder, and so does a file of a stage-3 delta or a whole model.
    """
    if not path.is_file():
        return path
    folder = path.parent
    names, index, _ = _forms(folder)[0]
    together = path.name in (*_ADAPTERS, "non_lora_trainables.bin")
    if path.name in names and (index or together or (folder / "config.json").is_file()):
        return folder
    return path


def describe_file(file: Weights) -> dict[str, Any]:
    """Name, kind, layout and SHA-256 of a file or of the files of a folder, for ``stage.json``."""
    digests = {path.name: sha256_of(path) for path in file.files}
    alone = file.path.is_file()
    return {
        "file": file.path.resolve().name,
        "sha256": digests[file.path.name] if alone else digests,
        "kind": file.kind,
        "layout": file.layout,
        "foreign": list(file.foreign),
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` and check it (``models.schema``).

    Raises:
        CheckpointError: The folder or the file is missing, it is no JSON object, or a field of a
            model of ours is unknown, of another type or out of its range.
    """
    if folder.is_file():
        raise CheckpointError(f"'{folder}' is a file, not a checkpoint folder.", _hint(folder))
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder '{folder}'.", "Check the path.")
    fields = read_json(folder / CONFIG)
    _check_config(folder / CONFIG, fields)
    return fields


def _hint(file: Path) -> str:
    """What to do with a file where a folder is needed."""
    kind = open_weight_file(file).kind
    if kind in (DETECTOR, OUR_EXPLAINER) or home_of(file) != file:
        return f"Give its folder: {file.parent}"
    if kind in (DETECTOR_A, DETECTOR_B, EXPLAINER, *DELTAS):
        return f"It is a {kind}; import it first: m2f2 import {file} --output DIR"
    return f"See what it is with: m2f2 info {file}"


def _check_config(path: Path, fields: Mapping[str, Any]) -> None:
    from m2f2cli.models.schema import check_config

    try:
        check_config(fields)
    except ConfigError as error:
        raise CheckpointError(f"'{path}': {error.message}", error.hint) from error


def read_stage(folder: Path) -> dict[str, Any]:
    """Read ``stage.json``; empty where the folder has none.

    Raises:
        CheckpointError: The file is no JSON object.
    """
    path = folder / MARK
    return read_json(path) if path.exists() else {}


def shared_tensors(folder: Path) -> dict[str, LazyTensor]:
    """List the tensors that a folder takes from another checkpoint, as its ``shared.json`` says.

    The file maps the beginning of their names to ``{"folder": relative path, "fingerprint": …}``;
    ``share`` writes it. Most folders have none and share nothing.

    Raises:
        CheckpointError: The file is malformed, or the other checkpoint is missing or not the one
            that was shared.
    """
    path = folder / SHARED
    if not path.is_file():
        return {}
    found: dict[str, LazyTensor] = {}
    for begin, source in read_json(path).items():
        said = source if isinstance(source, dict) else {}
        place, mark = said.get("folder"), said.get("fingerprint")
        if not isinstance(place, str) or not isinstance(mark, str):
            raise CheckpointError(f"'{path}' does not say what is shared with whom.", _AGAIN)
        other = folder / place
        # A name from a file may be none of a file system, at which Path.is_file raises.
        if os.path.isfile(other / SHARED):
            raise CheckpointError(
                f"'{path}' names '{other}', which shares tensors itself.",
                "Name the checkpoint that holds them.",
            )
        if not os.path.isdir(other) or read_stage(other).get("fingerprint") != mark:
            raise CheckpointError(
                f"'{folder}' takes the tensors '{begin}' from '{other}', which is not there or not "
                "the checkpoint they were left to.",
                "Keep the two folders together, as they were made.",
            )
        found |= {begin + key: tensor for key, tensor in open_tensors(other).items()}
    return found


# --- int8 matrices -----------------------------------------------------------------------------


def pack_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a matrix as int8 with a scale for each row, without loss where it came from that.

    A folder stores them as ``NAME`` and ``NAME_scale``; ``open_tensors`` gives their product.

    Args:
        weight: (out, in) float32, each row integers of [-127, 127] times one float32 scale.

    Returns:
        (out, in) int8 and (out,) float32, whose product is ``weight``.

    Raises:
        CheckpointError: A row is no such product.
    """
    import torch

    largest = weight.abs().amax(1)
    packed, scales = torch.zeros_like(weight, dtype=torch.int8), torch.zeros_like(largest)
    left = torch.ones_like(largest, dtype=torch.bool)
    for top in range(127, 0, -1):
        scale = torch.where(largest > 0, largest / top, torch.ones_like(largest))
        whole = (weight / scale[:, None]).round()
        fits = left & torch.isclose(whole * scale[:, None], weight, rtol=1e-6, atol=0).all(1)
        packed[fits], scales[fits] = whole[fits].to(torch.int8), scale[fits]
        left &= ~fits
        if not left.any():
            return packed, scales
    raise CheckpointError(f"{int(left.sum())} rows of a matrix are no int8 rows with a scale.")


def _unpacked(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Put float32 matrices in the place of int8 ones that have a scale for each row."""
    found = dict(tensors)
    for name, packed in tensors.items():
        scale = tensors.get(f"{name}_scale")
        if packed.dtype == "int8" and scale is not None and scale.shape == packed.shape[:1]:
            found[name] = _product(packed, scale)
            del found[f"{name}_scale"]
    return found


def _product(packed: LazyTensor, scale: LazyTensor) -> LazyTensor:
    def whole() -> torch.Tensor:
        return packed.load().float() * scale.load().float()[:, None]

    return LazyTensor(packed.shape, "float32", lambda: from_tensor(whole()).blocks(), whole)


# --- fingerprints and checks --------------------------------------------------------------------


def digest_of(
    tensor: torch.Tensor | LazyTensor, each: Callable[[Any], object] = lambda block: None
) -> str:
    """Hex SHA-256 of a tensor's dtype, shape and values.

    Each block is handed to ``each`` as a flat uint8 array.
    """
    import torch

    tensor = as_lazy(tensor)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    for block in tensor.blocks():
        data = block.view(torch.uint8).numpy()
        digest.update(data.data)
        each(data)
    return digest.hexdigest()


def digests_of(tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """``digest_of`` each tensor, several at once."""
    return dict(zip(tensors, spread(digest_of, tensors.values()), strict=True))


def combine(config: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """The fingerprint of a model with this configuration and these digests of its tensors."""
    kept = {key: value for key, value in config.items() if key not in _BOOKKEEPING}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for key in sorted(digests):
        digest.update(f"\n{key} {digests[key]}".encode())
    return f"sha256:{digest.hexdigest()}"


def fingerprint(folder: Path, *, verify: bool = False) -> str:
    """Name a checkpoint by its content: ``sha256:`` over its model's settings and every tensor.

    With ``verify`` it is computed from the files and compared with ``stage.json``, instead of
    trusting what that says.

    Raises:
        CheckpointError: The folder is unreadable, or ``verify`` finds another content.
    """
    stored = read_stage(folder).get("fingerprint")
    if isinstance(stored, str) and not verify:
        return stored
    computed = combine(read_config(folder), digests_of(open_tensors(folder)))
    if isinstance(stored, str) and stored != computed:
        raise CheckpointError(
            f"'{folder}' was changed after it was written: its fingerprint is {computed}, "
            f"{MARK} says {stored}.",
            "Restore it from where it came.",
        )
    return computed


def check_names_and_shapes(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    what: str,
    optional: Collection[str] = (),
) -> None:
    """Compare two sets of tensors (or anything with ``shape``) by name and shape.

    Args:
        found: What a file holds.
        expected: What the model needs.
        what: The file, for the message.
        optional: Names that may be missing.

    Raises:
        CheckpointError: Names the missing, the unexpected and the wrongly shaped tensors.
    """
    wrong = [
        f"{key} is {list(found[key].shape)}, not {list(expected[key].shape)}"
        for key in expected
        if key in found and tuple(found[key].shape) != tuple(expected[key].shape)
    ]
    faults = {
        "missing": [key for key in expected if key not in found and key not in optional],
        "unexpected": [key for key in found if key not in expected],
        "of the wrong shape": wrong,
    }
    if said := say_faults(faults):
        raise CheckpointError(
            f"{what} does not fit its model: {said}.",
            "The file is incomplete or of another kind; m2f2 info PATH says what it is.",
        )


def say_faults(faults: Mapping[str, Collection[str]]) -> str:
    """How many tensors have each fault, and the first of them by name; empty without any."""
    return "; ".join(f"{len(f)} {words}: {name_some(f)}" for words, f in faults.items() if f)


def name_some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    ordered = sorted(" ".join(name.split()) for name in names)
    rest = len(ordered) - _NAMED_IN_ERRORS
    shown = ", ".join(ordered[:_NAMED_IN_ERRORS])
    return f"{shown} and {rest} more" if rest > 0 else shown


def check_finite(
    tensors: Mapping[str, torch.Tensor] | Mapping[str, LazyTensor], *, what: str
) -> None:
    """Refuse NaN and infinite values.

    Raises:
        CheckpointError: Names ``what`` and the tensors at fault.
    """
    bad = [
        key
        for key, tensor in tensors.items()
        if not all(all_finite(block) for block in as_lazy(tensor).blocks())
    ]
    if bad:
        raise CheckpointError(
            f"{what} holds NaN or infinite values in {len(bad)} tensors: {name_some(bad)}.",
            _BAD_VALUES,
        )


# --- writing ------------------------------------------------------------------------------------


def write_checkpoint(  # noqa: PLR0913 - a checkpoint is its parts
    folder: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor] | Mapping[str, LazyTensor],
    stage: Mapping[str, Any] | Callable[[Mapping[str, str]], Mapping[str, Any]],
    extra_files: Mapping[str, bytes] | None = None,
    int8: Collection[str] = (),
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> str:
    """Write a checkpoint folder in one step and return its fingerprint.

    Args:
        folder: Where; parents are made.
        config: Becomes ``config.json``.
        tensors: Becomes ``model.safetensors``, or shards with an index. Lazy ones are read once,
            a few at a time in threads, so memory does not grow with them.
        stage: Becomes ``stage.json``, with the fingerprint added. A function is called when the
            tensors are written, with the digest of each.
        extra_files: Further files by name, for example ``preprocessor_config.json``.
        int8: Matrices to store as int8 with a scale for each row (see ``pack_rows``).
        max_shard_bytes: No file holds more, unless a single tensor does.
        overwrite: Replace an existing checkpoint folder.

    Raises:
        CheckpointError: The folder exists, a tensor holds NaN or infinity, or the disk refuses;
            whatever was there before is still there.
    """
    held = {key: t for key, t in tensors.items() if not isinstance(t, LazyTensor)}
    check_finite(held, what=f"The model for '{folder}'")
    lazy = {
        key: t if isinstance(t, LazyTensor) else replace(from_tensor(t), checked=True)
        for key, t in tensors.items()
    }
    packed: dict[str, torch.Tensor] = {}
    for name in int8:
        packed[name], packed[f"{name}_scale"] = pack_rows(lazy[name].load())
    written = lazy | {name: from_tensor(tensor) for name, tensor in packed.items()}
    shards = _split(written, max_shard_bytes)
    others = {"config.json": json_bytes(config), **(extra_files or {})}
    if len(shards) > 1:
        mapping = {key: name for name, part in shards.items() for key in part}
        total = {"total_size": sum(tensor.nbytes for tensor in written.values())}
        index = {"metadata": total, "weight_map": dict(sorted(mapping.items()))}
        others[INDEX] = json_bytes(index)
    values = {name: lazy[name] for name in int8}
    return write_folder(folder, config, shards, stage, others, values=values, overwrite=overwrite)


def _split(tensors: Mapping[str, LazyTensor], limit: int) -> dict[str, dict[str, LazyTensor]]:
    """Tensors by file."""
    groups: list[dict[str, LazyTensor]] = [{}]
    room = limit
    for key in sorted(tensors):
        if tensors[key].nbytes > room and groups[-1]:
            groups.append({})
            room = limit
        groups[-1][key] = tensors[key]
        room -= tensors[key].nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    total = len(groups)
    return {f"model-{n:05d}-of-{total:05d}.safetensors": g for n, g in enumerate(groups, start=1)}


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, LazyTensor]],
    stage: Mapping[str, Any] | Callable[[Mapping[str, str]], Mapping[str, Any]],
    others: Mapping[str, bytes],
    *,
    values: Mapping[str, LazyTensor] | None = None,
    overwrite: bool = False,
) -> str:
    """Write tensors by file, other files and at last ``stage.json``; see ``write_checkpoint``.

    The fingerprint that is returned is of ``config`` and the tensors, however they are stored:
    ``values`` has those that are stored as int8.
    """
    with atomic_folder(folder, overwrite) as partial:
        for name, data in others.items():
            if Path(name).name != name:
                raise CheckpointError(f"'{name}' is no plain file name.")
            (partial / name).write_bytes(data)
        digests: dict[str, str] = {}
        for name, tensors in weights.items():
            checked = {k: t.finite(what=f"The tensor '{k}'") for k, t in tensors.items()}
            digests |= write_tensor_file(partial / name, checked)
        for name, tensor in (values or {}).items():
            del digests[f"{name}_scale"]
            digests[name] = digest_of(tensor)
        mark = combine(config, digests)
        said = stage(digests) if callable(stage) else stage
        (partial / MARK).write_bytes(json_bytes({**said, "fingerprint": mark}))
    return mark


def write_tensor_file(
    path: Path, tensors: Mapping[str, torch.Tensor] | Mapping[str, LazyTensor]
) -> dict[str, str]:
    """Write one safetensors file and return ``{name: digest_of(tensor)}``.

    Tensors may be of any device and stride, or lazy; several are read at once.

    Raises:
        CheckpointError: A tensor's dtype has no name in the format, or a tensor cannot be read.
        OSError: The disk refuses.
    """
    lazy = {name: as_lazy(tensor) for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Widest elements first, so that every tensor is aligned to its element size.
    order = sorted(lazy, key=lambda name: (-_dtype(lazy[name].dtype).itemsize, name))
    end = 0
    for name in order:
        tensor = lazy[name]
        if tensor.dtype not in _CODES:
            said = f"Tensor '{name}' has dtype {tensor.dtype}, which cannot be stored."
            raise CheckpointError(said)
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with ParallelFile(path, len(head) + end) as file:
        file.edges.append((0, head))

        def write(name: str) -> str:
            with file.part(len(head) + header[name]["data_offsets"][0]) as part:
                return digest_of(lazy[name], part.write)

        return dict(zip(order, spread(write, order), strict=True))


def share(folder: Path, output: Path, *, begin: str, source: Path) -> None:
    """Copy a checkpoint without the tensors that another one has.

    Args:
        folder: The whole checkpoint.
        output: The copy; it is found together with ``source``, so it names it by a relative path.
        begin: What the shared tensors' names begin with, for example ``detector.``.
        source: The checkpoint that has them, under the rest of their names.

    Raises:
        CheckpointError: One of them is missing in either or differs in a bit, or the disk refuses.
    """
    tensors = open_tensors(folder)
    theirs = {begin + key: tensor for key, tensor in open_tensors(source).items()}
    shared = {key: tensor for key, tensor in tensors.items() if key.startswith(begin)}
    mine, others = digests_of(shared), digests_of(theirs)
    unlike = [key for key in mine | others if mine.get(key) != others.get(key)]
    if unlike:
        raise CheckpointError(
            f"'{folder}' and '{source}' differ in {len(unlike)} tensors: {name_some(unlike)}."
        )
    own = {key: tensor for key, tensor in tensors.items() if key not in shared}
    place = Path(os.path.relpath(source.resolve(), output.resolve())).as_posix()
    said = {begin: {"folder": place, "fingerprint": fingerprint(source)}}
    with atomic_folder(output) as partial:
        for path in sorted(folder.iterdir()):
            if path.suffix != ".safetensors" and path.name not in (MARK, INDEX):
                shutil.copyfile(path, partial / path.name)
        write_tensor_file(partial / WEIGHTS, own)
        (partial / SHARED).write_bytes(json_bytes(said))
        shutil.copyfile(folder / MARK, partial / MARK)


def preprocessor_config(size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """The content of ``preprocessor_config.json``, as transformers' CLIP image processor reads it.

    ``size`` is the side of the model's input in pixels; ``mean`` and ``std`` are per channel, in
    [0, 1].
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
