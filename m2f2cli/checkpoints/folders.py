"""Weights in a folder of any common layout: one file, shards with an index, or a delta's parts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2f2cli.checkpoints.keymaps import kind_of_folder
from m2f2cli.checkpoints.pickles import load_tensors_file
from m2f2cli.checkpoints.store import (
    INDEX,
    WEIGHTS,
    name_some,
    read_json,
    read_stage,
    shared_tensors,
)
from m2f2cli.checkpoints.tensorfile import StoredTensor
from m2f2cli.errors import CheckpointError

WHOLE = (WEIGHTS, "pytorch_model.bin")
INDICES = (INDEX, "pytorch_model.bin.index.json")
PARTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "delta.safetensors",
    "mm_projector.bin",
    "non_lora_trainables.bin",
)
_AGAIN = "Copy or download it again."


@dataclass(frozen=True)
class Layout:
    """Which files hold a folder's weights.

    Args:
        files: Names of those that are there, in the order they are read.
        absent: Names of shards that the index lists and that are not there.
        index: The index's name, where the weights are in shards.
        mapping: The index: tensor names to shards.
    """

    files: tuple[str, ...]
    absent: tuple[str, ...] = ()
    index: str | None = None
    mapping: Mapping[str, str] | None = None

    def strays(self, names: Mapping[str, Any]) -> list[str]:
        """Tensors that only the index, or only the shards know."""
        return sorted(set(self.mapping or ()) ^ set(names)) if self.index else []


def layout_of(folder: Path) -> Layout:
    """Find the files that hold a folder's weights; nothing is opened but an index.

    A whole model goes before shards, safetensors before pickles, a model before parts of a delta.

    Raises:
        CheckpointError: An index is unreadable.
    """
    for name in WHOLE:
        if (folder / name).is_file():
            return Layout((name,))
    for index in INDICES:
        if not (folder / index).is_file():
            continue
        mapping = read_json(folder / index).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
            raise CheckpointError(f"'{folder / index}' has no weight_map.", _AGAIN)
        shards = sorted(set(mapping.values()))
        there = tuple(s for s in shards if Path(s).name == s and (folder / s).is_file())
        return Layout(there, tuple(s for s in shards if s not in there), index, mapping)
    return Layout(tuple(name for name in PARTS if (folder / name).is_file()))


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
        foreign: Classes and functions the files name that were made inert.
        others: Keys of a file that are no weights.
    """

    path: Path
    kind: str
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    config: dict[str, Any]
    layout: str
    foreign: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where files that belong to it lie."""
        return self.path if self.path.is_dir() else self.path.parent


def open_weights(path: Path) -> Weights:
    """Open a folder or file strictly: every shard must be whole and there.

    Raises:
        CheckpointError: Nothing is there, no weights, an absent or truncated shard, or an index
            that does not agree with its shards.
    """
    if not path.exists():
        raise CheckpointError(f"There is nothing at '{path}'.", "Check the path.")
    layout = layout_of(path) if path.is_dir() else Layout((path.name,))
    folder = path if path.is_dir() else path.parent
    if layout.absent:
        raise CheckpointError(
            f"'{folder / str(layout.index)}' names the shard {name_some(layout.absent)}, which is "
            "not there.",
            "Copy or download the missing shards into the folder.",
        )
    if not layout.files:
        raise CheckpointError(
            f"The folder '{path}' holds no weights.",
            "Give the folder that holds model.safetensors or pytorch_model.bin (or their shards).",
        )
    opened = [load_tensors_file(folder / name) for name in layout.files]
    tensors: dict[str, StoredTensor] = {}
    for file in opened:
        tensors |= file.tensors
    if strays := layout.strays(tensors):
        raise CheckpointError(
            f"'{folder}' does not hold what {layout.index} says: {name_some(strays)}.", _AGAIN
        )
    if path.is_dir():
        tensors |= shared_tensors(path)
    config = folder_config(path) if path.is_dir() else {}
    stage = read_stage(path) if path.is_dir() else {}
    return Weights(
        path=path,
        kind=kind_of_folder(config, stage, tensors, layout.files),
        tensors=tensors,
        files=tuple(folder / name for name in layout.files),
        config=config,
        layout=", ".join(sorted({file.layout for file in opened})),
        foreign=tuple(sorted({name for file in opened for name in file.foreign})),
        others=tuple(sorted({name for file in opened for name in file.rest})),
    )


def folder_config(folder: Path) -> dict[str, Any]:
    """A folder's ``adapter_config.json`` or ``config.json``; empty where it has neither."""
    for name in ("adapter_config.json", "config.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    return {}


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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


def home_of(path: Path) -> Path:
    """The folder that a weight file belongs to, where it is one of several files; else the file.

    A shard stands for its folder, and so does a file of a stage-3 delta or a whole model.
    """
    if path.is_dir() or not path.is_file():
        return path
    folder = path.parent
    layout = layout_of(folder)
    together = {"adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin"}
    if path.name in layout.files and (
        layout.index or path.name in together or (folder / "config.json").is_file()
    ):
        return folder
    return path
