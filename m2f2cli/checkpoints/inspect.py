"""``m2f2 info``: what a checkpoint is, read from its files and tensors, never from its own name.

Nothing is loaded: names, shapes and types are read from headers, pickles by the restricted reader.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2f2cli.checkpoints import io, keymaps
from m2f2cli.checkpoints.hub import BUNDLED, resolve_checkpoint
from m2f2cli.checkpoints.io import LazyTensor, Weights
from m2f2cli.errors import CheckpointError, M2F2Error
from m2f2cli.files import MARK, sha256_of

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_OURS = {keymaps.DETECTOR: "m2f2_detector", keymaps.OUR_EXPLAINER: "m2f2_explainer"}
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
    config: dict[str, Any]
    stage: dict[str, Any]
    fingerprint: str | None
    missing: tuple[str, ...]
    notes: list[str]
    foreign: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """How many values all tensors hold."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have each type, the most frequent first."""
        return dict(Counter(tensor.dtype for tensor in self.tensors.values()).most_common())

    @property
    def license(self) -> str | None:
        """What a detector, alone or in an explainer, may be used for, as its config says."""
        inner = self.config.get("detector_config")
        said = [part.get("license") for part in (self.config, inner) if isinstance(part, dict)]
        return next((words for words in said if words and isinstance(words, str)), None)

    def parts(self) -> list[tuple[str, int, int]]:
        """Rows (part, tensors, parameters), grouped by the names' beginnings."""
        depth = 2 if len({_part(key, 1) for key in self.tensors}) < 3 else 1
        groups: dict[str, list[int]] = {}
        for key, tensor in self.tensors.items():
            groups.setdefault(_part(key, depth), []).append(tensor.size)
        return [(name, len(sizes), sum(sizes)) for name, sizes in groups.items()]

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
            "license": self.license,
            "stage": self.stage or None,
            "config": self.config or None,
            "missing": self.missing,
            "notes": self.notes,
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
    is_folder = path.is_dir()
    found = io.survey(path) if is_folder else io.open_weight_file(path)
    stage = io.read_stage(path) if is_folder else {}
    mark = stage.get("fingerprint") if is_folder else f"sha256:{sha256_of(path)}"
    kind, tensors = found.kind, found.tensors
    missing = (_missing_in_folder(found) if is_folder else []) + keymaps.missing_parts(
        kind, tensors
    )
    try:
        io.refuse_unusable(found)
        if kind in _OURS and found.config and tensors:
            from m2f2cli.checkpoints.load import check_model

            check_model(tensors, found.config | {"model_type": _OURS[kind]}, what="The folder")
    except M2F2Error as error:
        missing.append(error.message.rstrip("."))
    if verify:
        io.check_finite(tensors, what=f"'{path}'")
        if kind in _OURS and is_folder:
            io.fingerprint(path, verify=True)
    return Description(
        path=path,
        kind=kind,
        files={file.name: file.stat().st_size for file in found.files},
        tensors=tensors,
        config=found.config,
        stage=stage,
        fingerprint=mark if isinstance(mark, str) else None,
        missing=tuple(missing),
        notes=(_shared if is_folder else _file_notes)(found) + _notes(tensors, found.config),
        foreign=found.foreign,
    )


def _missing_in_folder(found: Weights) -> list[str]:
    """Shards and files that a folder lacks, and what is wrong with those that are there."""
    missing = [f"the shard {name}" for name in found.absent]
    faults = found.faults[1:] if found.absent else found.faults
    missing += [fault.message.rstrip(".") for fault in faults]
    needed = ["config.json"]
    if found.kind in _OURS:
        needed = ["config.json", "preprocessor_config.json", MARK]
    elif found.kind in (keymaps.PEFT, keymaps.STAGE_3):
        needed = ["adapter_config.json"]
        if not any(file.name.startswith("adapter_model.") for file in found.files):
            needed.append("adapter_model.safetensors")
    elif found.kind in (keymaps.UNKNOWN, keymaps.DELTA):
        needed = []
    missing += [name for name in needed if not (found.path / name).is_file()]
    if found.kind in _TALKING and not any((found.path / name).is_file() for name in _TOKENIZERS):
        missing.append(" or ".join(_TOKENIZERS))
    return missing if found.files else [*missing, "any weights"]


def _shared(found: Weights) -> list[str]:
    """Where the tensors lie that a folder takes from others, and the files that are not read."""
    places = Counter(t.path.parent for t in found.tensors.values() if t.path)
    others = {place: count for place, count in places.items() if place != found.path}
    notes = [f"{count} of its tensors lie in '{p.resolve()}'" for p, count in others.items()]
    if found.beside:
        notes.append(f"not read, another form of the weights: {', '.join(found.beside)}")
    return notes


def _file_notes(found: Weights) -> list[str]:
    notes = [f"{found.layout} layout"]
    if found.where:
        notes.append(f"the weights lie under '{found.where}'")
    if any(key.startswith("module.") for key in found.tensors):
        notes.append("its names begin with 'module.' (saved from a parallel model)")
    if found.others:
        notes.append(f"also holds {', '.join(found.others[:8])}")
    return notes


def _notes(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> list[str]:
    """What a reader asks of an explainer or an adapter: sizes, template, base, what is shared."""
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


def _part(key: str, depth: int) -> str:
    parts = key.removeprefix("module.").split(".")
    return ".".join(parts[: min(depth, max(1, len(parts) - 1))])
