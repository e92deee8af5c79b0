"""What a checkpoint is, read from its files and tensor names, never from its own name.

Nothing is loaded: names, shapes and types are read from headers, pickles by the restricted reader.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2f2cli.errors import CheckpointError
from m2f2cli.weights import reference, store
from m2f2cli.weights.pickles import load_tensors_file
from m2f2cli.weights.tensorfile import StoredTensor

UNKNOWN = "unknown weights"
DETECTOR = "detector"
DETECTOR_A = "published detector A (stage 1)"
DETECTOR_B = "published detector B (of the explainer)"
EXPLAINER = "published explainer (LLaVA layout)"
LLAVA = "LLaVA base (original layout)"
LLAVA_HF = "LLaVA base (Hugging Face layout)"
STAGE_2 = "published stage-2 delta (projector)"
STAGE_3 = "published stage-3 delta (LoRA and projectors)"
STAGE_3_PART = "projectors of a published stage-3 delta"
PEFT = "PEFT adapter"
DELTA = "delta"
CLIP = "CLIP model"
TOWER = "CLIP vision tower"
LANGUAGE = "language model"

_WHOLE = (store.WEIGHTS, "pytorch_model.bin")
_INDICES = (store.INDEX, "pytorch_model.bin.index.json")
_PARTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "delta.safetensors",
    "mm_projector.bin",
    "non_lora_trainables.bin",
)
# What each published detector must hold, as key prefixes, and in which words it is missed.
_NEEDED = {
    DETECTOR_A: (
        ("clip_vision_encoder.", "the CLIP vision tower (give its file to m2f2 import as well)"),
        ("deepfake_encoder.", "the backbone"),
        ("deepfake_proj.", "the backbone's projection"),
        ("vision_proj.", "the vision projection"),
        ("output.", "the head"),
    ),
    EXPLAINER: (
        ("model.embed_tokens.", "the word embeddings"),
        ("lm_head.", "the language model's head"),
        ("model.mm_projector.", "the vision projector"),
        ("model.vision_tower.", "the CLIP vision tower (config.json names where it comes from)"),
        ("deepfake_encoder.", "the detector"),
        ("deepfake_projector.", "the detector's projector"),
    ),
    LLAVA: (
        ("lm_head.", "the language model's head"),
        ("model.vision_tower.", "the CLIP vision tower (config.json names where it comes from)"),
    ),
    LLAVA_HF: (("vision_tower.", "the CLIP vision tower"),),
}
_NEEDED[DETECTOR_B] = (*_NEEDED[DETECTOR_A], ("text_proj.", "the text projection"))


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
    tensors: dict[str, StoredTensor]
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


def describe(path: Path, *, verify: bool = False) -> Description:
    """Say what a checkpoint folder or weights file is.

    Args:
        path: A folder or file.
        verify: Also read every value: refuse NaN, and check the stored fingerprint.

    Raises:
        CheckpointError: Nothing is there, or it is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"There is nothing at '{path}'.", "Check the path.")
    found = _describe_folder(path) if path.is_dir() else _describe_file(path)
    if verify:
        store.check_finite(found.tensors, what=f"'{path}'")
        if found.kind == DETECTOR and path.is_dir():
            store.fingerprint(path, verify=True)
    return found


def kind_of(keys: Iterable[str]) -> str:
    """Name the kind of weights with these tensor names."""
    text = [key.removeprefix("module.") for key in keys]
    for kind, fits in _RULES:
        if fits(text):
            return kind
    return UNKNOWN


def _has(*parts: str) -> Callable[[list[str]], bool]:
    """Every part occurs in some name; a part that begins with ``^`` must stand at its beginning."""

    def fits(keys: list[str]) -> bool:
        return all(
            any(k.startswith(part[1:]) if part[0] == "^" else part in k for k in keys)
            for part in parts
        )

    return fits


def _only(*parts: str) -> Callable[[list[str]], bool]:
    """Every name holds one of the parts."""

    def fits(keys: list[str]) -> bool:
        return bool(keys) and all(any(part in k for part in parts) for k in keys)

    return fits


_PROJECTORS = _only("deepfake_projector.", "mm_projector.")
_RULES: tuple[tuple[str, Callable[[list[str]], bool]], ...] = (
    (PEFT, _has(".lora_A.")),
    (DETECTOR, _has("^alpha_vision", "^head.", "^backbone.", "^clip.")),
    (EXPLAINER, _has("model.layers.", "deepfake_encoder.")),
    (DETECTOR_A, _has("clip_vision_alpha", reference.FOLDED[2])),
    (DETECTOR_B, _has("clip_vision_alpha")),
    (STAGE_3_PART, lambda keys: _PROJECTORS(keys) and _has("^base_model.")(keys)),
    (STAGE_2, _PROJECTORS),
    (LLAVA, _has("model.layers.", "mm_projector.")),
    (LLAVA_HF, _has("language_model.", "multi_modal_projector.")),
    (LANGUAGE, _has("model.layers.", "embed_tokens.")),
    (CLIP, _has("vision_model.", "text_model.", "logit_scale")),
    (TOWER, _has("vision_model.embeddings.class_embedding")),
)


def _describe_file(path: Path) -> Description:
    file = load_tensors_file(path)
    tensors = file.tensors
    kind = kind_of(tensors)
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
        fingerprint=_digest(path),
        missing=tuple(_missing_parts(kind, tensors)),
        notes=tuple(notes),
        foreign=file.foreign,
    )


def _describe_folder(path: Path) -> Description:
    tensors: dict[str, StoredTensor] = {}
    missing: list[str] = []
    foreign: list[str] = []
    files = _weight_files(path, missing)
    for name in files:
        try:
            file = load_tensors_file(path / name)
            tensors |= file.tensors
        except CheckpointError as error:
            missing.append(error.message.rstrip("."))
            continue
        foreign += file.foreign
    _check_index(path, tensors, missing)
    config_name = (
        "adapter_config.json" if (path / "adapter_config.json").exists() else "config.json"
    )
    config = store.read_json(path / config_name) if (path / config_name).exists() else {}
    stage = store.read_stage(path)
    kind = _folder_kind(config, stage, tensors, files)
    missing += _missing_files(path, kind, files) + _missing_parts(kind, tensors)
    mark = stage.get("fingerprint")
    return Description(
        path=path,
        kind=kind,
        files={name: (path / name).stat().st_size for name in files},
        tensors=tensors,
        config=config,
        stage=stage,
        fingerprint=mark if isinstance(mark, str) else None,
        missing=tuple(missing),
        foreign=tuple(sorted(set(foreign))),
    )


def _folder_kind(
    config: Mapping[str, Any],
    stage: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    files: Iterable[str],
) -> str:
    names = set(files)
    if "non_lora_trainables.bin" in names and "peft_type" in config:
        return STAGE_3
    if "peft_type" in config:
        return PEFT
    if "delta.safetensors" in names and stage:
        return DELTA
    kind = kind_of(tensors)
    by_type = {
        "m2f2_detector": DETECTOR,
        "clip": CLIP,
        "clip_vision_model": TOWER,
        "llava": LLAVA_HF,
    }
    if kind == UNKNOWN:
        return by_type.get(str(config.get("model_type")), UNKNOWN)
    return kind


def _weight_files(path: Path, missing: list[str]) -> list[str]:
    """The weight files of a folder in the order they are read; missing shards are noted."""
    files = [name for name in _WHOLE if (path / name).is_file()][:1]
    for index in _INDICES:
        if files or not (path / index).is_file():
            continue
        mapping = store.read_json(path / index).get("weight_map")
        shards = sorted(set(mapping.values())) if isinstance(mapping, dict) else []
        plain = [s for s in shards if isinstance(s, str) and Path(s).name == s]
        files += [shard for shard in plain if (path / shard).is_file()]
        missing += [f"the shard {shard}" for shard in plain if not (path / shard).is_file()]
        break
    return files + [name for name in _PARTS if (path / name).is_file()]


def _check_index(path: Path, tensors: Mapping[str, StoredTensor], missing: list[str]) -> None:
    for index in _INDICES:
        if (path / index).is_file() and not any((path / name).is_file() for name in _WHOLE):
            mapping = store.read_json(path / index).get("weight_map")
            absent = set(mapping) - set(tensors) if isinstance(mapping, dict) else set()
            if absent:
                missing.append(f"{len(absent)} tensors of {index}: {store.name_some(absent)}")


def _missing_files(path: Path, kind: str, files: list[str]) -> list[str]:
    needed = ["config.json"]
    if kind == DETECTOR:
        needed = ["config.json", "preprocessor_config.json", "stage.json"]
    elif kind in (PEFT, STAGE_3):
        needed = ["adapter_config.json"]
        if not any(name.startswith("adapter_model.") for name in files):
            needed.append("adapter_model.safetensors")
    elif kind in (UNKNOWN, DELTA):
        needed = []
    missing = [name for name in needed if not (path / name).is_file()]
    return missing if files else [*missing, "any weights"]


def _missing_parts(kind: str, tensors: Mapping[str, StoredTensor]) -> list[str]:
    beginnings = _NEEDED.get(kind, ())
    prefix = next(
        (k.removesuffix("clip_vision_alpha") for k in tensors if k.endswith("clip_vision_alpha")),
        "",
    )
    if kind not in (DETECTOR_A, DETECTOR_B):
        prefix = ""
    return [
        words
        for begin, words in beginnings
        if not any(key.startswith(prefix + begin) for key in tensors)
    ]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _part(key: str, depth: int) -> str:
    parts = key.removeprefix("module.").split(".")
    kept = parts[: min(depth, max(1, len(parts) - 1))]
    return ".".join(kept)
