"""``m2f2 info``: what a checkpoint is, read from its files and tensors, never from its own name.

Nothing is loaded: names, shapes and types are read from headers, pickles by the restricted reader.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from m2f2cli.checkpoints import io, keymaps
from m2f2cli.checkpoints.hub import BUNDLED, resolve_checkpoint
from m2f2cli.checkpoints.io import LazyTensor, folder_config, layout_of, open_weight_file
from m2f2cli.errors import CheckpointError, M2F2Error
from m2f2cli.files import sha256_of

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_OURS = (keymaps.DETECTOR, keymaps.OUR_EXPLAINER)
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")
# The kinds that answer in words, so that their folder needs a tokenizer.
_TALKING = (keymaps.OUR_EXPLAINER, keymaps.EXPLAINER, keymaps.LLAVA, keymaps.LLAVA_HF)


@dataclass(frozen=True)
class Description:
    """What is known of a checkpoint without loading it.

    Args:
        path: The folder or file.
        kind: In words; ``unknown weights`` when no rule fits.
        files: Weight files by name, with their sizes in bytes.
        tensors: Shape and type of each tensor, by name as it stands in the files.
        config: The folder's ``config.json`` or ``adapter_config.json``.
        stage: ``stage.json``, when there is one.
        fingerprint: Of a checkpoint of ours; for a single file, ``sha256:`` of its bytes.
        missing: What it lacks, in words or as tensor names.
        notes: What else is worth knowing.
        foreign: Classes and functions its pickles name, which were not run.
    """

    path: Path
    kind: str
    files: dict[str, int]
    tensors: dict[str, LazyTensor]
    config: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """How many values all tensors hold."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have each type, the most frequent first."""
        return dict(Counter(tensor.dtype for tensor in self.tensors.values()).most_common())

    def parts(self) -> list[tuple[str, int, int]]:
        """Rows (part, tensors, parameters), grouped by the names' beginnings."""
        depth = 2 if len({_part(key, 1) for key in self.tensors}) < 3 else 1
        counts: dict[str, tuple[int, int]] = {}
        for key, tensor in self.tensors.items():
            name = _part(key, depth)
            number, total = counts.get(name, (0, 0))
            counts[name] = (number + 1, total + tensor.size)
        return [(name, *pair) for name, pair in counts.items()]

    def as_dict(self) -> dict[str, Any]:
        """The whole description as plain data."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "files": self.files,
            "tensors": len(self.tensors),
            "parameters": self.parameters,
            "dtypes": self.dtypes,
            "fingerprint": self.fingerprint,
            "stage": self.stage or None,
            "config": self.config or None,
            "missing": list(self.missing),
            "notes": list(self.notes),
            "foreign": list(self.foreign),
            "shapes": {key: [list(t.shape), t.dtype] for key, t in sorted(self.tensors.items())},
        }


def inspect_checkpoint(name: str, *, verify: bool = False) -> Description:
    """Describe a checkpoint; compare a model of ours with what its config describes.

    Args:
        name: A folder, a weights file, or a bundled model (``lite``, ``lite-explainer``).
        verify: Also read every value: refuse NaN, and check the stored fingerprint.

    Raises:
        CheckpointError: Nothing is there, or it is damaged.
    """
    path = Path(name).expanduser()
    if not path.exists() and name in BUNDLED:
        path = resolve_checkpoint(name)
    if not path.exists():
        raise CheckpointError(f"There is nothing at '{path}'.", "Check the path.")
    found = _describe_folder(path) if path.is_dir() else _describe_file(path)
    if verify:
        io.check_finite(found.tensors, what=f"'{path}'")
        if found.kind in _OURS and path.is_dir():
            io.fingerprint(path, verify=True)
    if found.kind not in _OURS or not found.config or not found.tensors:
        return found
    from m2f2cli.checkpoints.load import check_model

    kind = {keymaps.DETECTOR: "m2f2_detector", keymaps.OUR_EXPLAINER: "m2f2_explainer"}[found.kind]
    try:
        check_model(found.tensors, {**found.config, "model_type": kind}, what="The folder")
    except M2F2Error as error:
        return replace(found, missing=(*found.missing, error.message.rstrip(".")))
    return found


def _describe_file(path: Path) -> Description:
    file = open_weight_file(path)
    tensors = file.tensors
    kind = keymaps.kind_of(tensors)
    notes = [f"{file.layout} layout"]
    if file.where:
        notes.append(f"the weights lie under '{file.where}'")
    if any(key.startswith("module.") for key in tensors):
        notes.append("its names begin with 'module.' (saved from a parallel model)")
    if file.rest:
        notes.append(f"also holds {', '.join(file.rest[:8])}")
    return Description(
        path=path,
        kind=kind,
        files={path.name: path.stat().st_size},
        tensors=tensors,
        fingerprint=f"sha256:{sha256_of(path)}",
        missing=tuple(keymaps.missing_parts(kind, tensors)),
        notes=(*notes, *_notes(tensors, {})),
        foreign=file.foreign,
    )


def _describe_folder(path: Path) -> Description:
    layout = layout_of(path)
    tensors: dict[str, LazyTensor] = {}
    missing = [f"the shard {name}" for name in layout.absent]
    foreign: set[str] = set()
    for name in layout.files:
        try:
            file = open_weight_file(path / name)
            tensors |= file.tensors
        except CheckpointError as error:
            missing.append(error.message.rstrip("."))
            continue
        foreign |= set(file.foreign)
    if strays := layout.strays(tensors):
        missing.append(f"{len(strays)} tensors of {layout.index}: {io.name_some(strays)}")
    shared = {}
    try:
        shared = io.shared_tensors(path)
    except CheckpointError as error:
        missing.append(error.message.rstrip("."))
    tensors |= shared
    config, stage = folder_config(path), io.read_stage(path)
    kind = keymaps.kind_of_folder(config, stage, tensors, layout.files)
    missing += _missing_files(path, kind, layout.files) + keymaps.missing_parts(kind, tensors)
    mark = stage.get("fingerprint")
    return Description(
        path=path,
        kind=kind,
        files={name: (path / name).stat().st_size for name in layout.files},
        tensors=tensors,
        config=config,
        stage=stage,
        fingerprint=mark if isinstance(mark, str) else None,
        missing=tuple(missing),
        notes=(*_notes(tensors, config), *_sources(shared)),
        foreign=tuple(sorted(foreign)),
    )


def _missing_files(path: Path, kind: str, files: tuple[str, ...]) -> list[str]:
    needed = ["config.json"]
    if kind in _OURS:
        needed = ["config.json", "preprocessor_config.json", "stage.json"]
    elif kind in (keymaps.PEFT, keymaps.STAGE_3):
        needed = ["adapter_config.json"]
        if not any(name.startswith("adapter_model.") for name in files):
            needed.append("adapter_model.safetensors")
    elif kind in (keymaps.UNKNOWN, keymaps.DELTA):
        needed = []
    missing = [name for name in needed if not (path / name).is_file()]
    if kind in _TALKING and not any((path / name).is_file() for name in _TOKENIZERS):
        missing.append(" or ".join(_TOKENIZERS))
    return missing if files else [*missing, "any weights"]


def _notes(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> list[str]:
    """What a reader asks of an explainer or an adapter: sizes, template, base."""
    notes = []
    blocks = {int(n) for key in tensors for n in _LAYER.findall(key)}
    words = [t for key, t in tensors.items() if key.endswith("embed_tokens.weight")]
    if blocks and len(words) == 1 and len(words[0].shape) == 2:
        parts = ("embed_tokens.", "lm_head.", "language_model.norm.", "model.norm.")
        total = sum(
            tensor.size
            for key, tensor in tensors.items()
            if _LAYER.search(key) or any(part in key for part in parts)
        )
        vocabulary, width = words[0].shape
        notes.append(
            f"language model of {total:,} parameters: {len(blocks)} layers of width {width}, "
            f"{vocabulary:,} words"
        )
    said = {"template": "asked with the template", "image_aspect": "pictures", "r": "LoRA rank"}
    notes += [f"{words} {config[name]}" for name, words in said.items() if name in config]
    if base := config.get("base_model_name_or_path"):
        notes.append(f"trained on {base}")
    return notes


def _sources(shared: Mapping[str, LazyTensor]) -> list[str]:
    """Where the tensors lie that a folder takes from others."""
    places = Counter(t.path.parent.resolve() for t in shared.values() if t.path)
    return [f"{count} of its tensors lie in '{place}'" for place, count in places.items()]


def _part(key: str, depth: int) -> str:
    parts = key.removeprefix("module.").split(".")
    kept = parts[: min(depth, max(1, len(parts) - 1))]
    return ".".join(kept)
