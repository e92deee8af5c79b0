"""Deltas and adapters: what a training stage changed, in a folder of its own.

Ours has two forms: ``delta.safetensors``, whose tensors take the place of the base's tensors of the
same name; or a standard PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``) with
the projectors as modules trained whole. Both have a ``stage.json``, written last, that names the
checkpoint they were trained on (``parent``) by its fingerprint. Published deltas of stages 2 and 3
and bare PEFT adapters are read alike, under our names, and can be written in our form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m2f2cli.checkpoints import io, keymaps
from m2f2cli.checkpoints.io import LazyTensor, Weights, as_lazy, digests_of
from m2f2cli.checkpoints.keymaps import DELTA_PREFIX, Entry
from m2f2cli.errors import CheckpointError
from m2f2cli.files import json_bytes

if TYPE_CHECKING:
    import torch

TENSORS = "delta.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PROJECTORS = "non_lora_trainables.bin"
_MODULES = ("mm_projector", "forgery_projector")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_VISION_BLOCK = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")
_FROZEN = "frozen in training: its update is exactly zero"
_ABOVE = "above the hidden state that the detector reads"
# Fields of adapter_config.json that say nothing about what an update means. Any other one that is
# set, now known or not, makes an adapter of a kind that is not folded.
_NEUTRAL = frozenset(
    (
        *("task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "init_lora_weights"),
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
        *("layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
        "eva_config",
    )
)
# Ways to start an adapter that leave the base as it is; others (PiSSA, OLoRA, …) change it.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_NAMES = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "use_qalora": "QALoRA"}


# --- writing ------------------------------------------------------------------------------------


def write_delta(
    folder: Path,
    *,
    tensors: Mapping[str, torch.Tensor] | Mapping[str, LazyTensor],
    stage: Mapping[str, Any] | Callable[[Mapping[str, str]], Mapping[str, Any]],
    adapter: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Write a delta folder in one step and return its fingerprint.

    Args:
        folder: Where; parents are made.
        tensors: By our names; for an adapter by PEFT's, as ``get_peft_model_state_dict`` gives
            them (``base_model.model.`` before every name, no adapter's name inside).
        stage: Becomes ``stage.json``, with the fingerprint added. Its ``parent`` is the
            fingerprint of the checkpoint the delta was trained on, None where that is unknown.
            A function is called when the tensors are written, with the digest of each.
        adapter: ``adapter_config.json``, for an adapter; see ``adapter_fields``.
        overwrite: Replace an existing checkpoint or delta folder.

    Raises:
        CheckpointError: The folder exists, a tensor holds NaN or infinity, or the disk refuses;
            whatever was there before is still there.
    """
    lazy = {key: as_lazy(tensor) for key, tensor in tensors.items()}
    weights = {TENSORS if adapter is None else ADAPTER: lazy}
    others = {} if adapter is None else {ADAPTER_CONFIG: json_bytes(adapter)}
    return io.write_folder(folder, adapter or {}, weights, stage, others, overwrite=overwrite)


def adapter_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``adapter_config.json`` from a PEFT configuration's ``to_dict()``.

    Sets become sorted lists and enumerations their values, as PEFT writes them; the adapter is
    marked for inference, and the place of its base, a path of one machine, is left out.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, (set, frozenset)):
            return sorted(plain(item) for item in value)
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(config) | {"inference_mode": True, "base_model_name_or_path": None}


def diff(base: Path, changed: Path, output: Path, *, overwrite: bool = False) -> str:
    """Write the delta that leads from one checkpoint folder to another; return its fingerprint.

    Merging it into ``base`` gives the tensors of ``changed`` again, byte for byte.

    Raises:
        CheckpointError: The two differ in configuration, names, shapes or types, or in nothing; a
            value is not finite, or the disk refuses.
    """
    mine, theirs = io.open_tensors(base), io.open_tensors(changed)
    what = f"'{changed}' beside '{base}'"
    io.check_names_and_shapes(theirs, mine, what=what)
    retyped = [key for key in mine if mine[key].dtype != theirs[key].dtype]
    if retyped or io.combine(io.read_config(base), {}) != io.combine(io.read_config(changed), {}):
        why = f"types of {io.name_some(retyped)}" if retyped else "settings in config.json"
        raise CheckpointError(
            f"{what} differs in more than values: {why}.",
            "A delta holds values only; both must be of one model, in the same types.",
        )
    before, after = digests_of(mine), digests_of(theirs)
    moved = {key: theirs[key] for key in mine if before[key] != after[key]}
    if not moved:
        raise CheckpointError(f"{what} is the same model: there is no difference to write.")
    marks = {"parent": io.fingerprint(base), "changed": io.fingerprint(changed)}
    return write_delta(output, tensors=moved, stage={"stage": "diff", **marks}, overwrite=overwrite)


# --- reading ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A LoRA update of a matrix: ``scale * up @ down`` is added to it.

    Attributes:
        down: (r, inputs).
        up: (outputs, r).
        scale: alpha / r.
    """

    down: LazyTensor
    up: LazyTensor
    scale: float


@dataclass
class Delta:
    """What a delta changes; the values are still on disk.

    Args:
        path: Its folder or file.
        kind: One of ``keymaps``.
        whole: Tensors that take the place of the base's, by our names.
        pairs: Updates by the name of the matrix they are added to.
        config: ``adapter_config.json`` in our terms; empty for projectors alone.
        dropped: Keys that change nothing, and why.
        frozen: Modules of the frozen detector whose updates are nevertheless not zero.
        fingerprint: Its own; None for a published one, which ``source`` names by its files.
        parent: Fingerprint of the checkpoint it was trained on; None where it does not say.
        source: Names and SHA-256 of a published delta's files.
        entries: What becomes of each key of a published delta.
    """

    path: Path
    kind: str
    whole: dict[str, LazyTensor]
    pairs: dict[str, Pair] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    fingerprint: str | None = None
    parent: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that it says are trained whole."""
        return tuple(self.config.get("modules_to_save") or ())

    def tensors(self) -> dict[str, LazyTensor]:
        """As ``write_delta`` takes them: by our names, of an adapter by PEFT's."""
        if not self.config:
            return self.whole
        found: dict[str, LazyTensor] = {}
        for name, pair in self.pairs.items():
            module = f"{DELTA_PREFIX}{name.removesuffix('.weight')}"
            found |= {f"{module}.lora_A.weight": pair.down, f"{module}.lora_B.weight": pair.up}
        return found | {f"{DELTA_PREFIX}{name}": tensor for name, tensor in self.whole.items()}

    def as_dict(self) -> dict[str, Any]:
        """What ``stage.json`` of a merge says of it."""
        said: dict[str, Any] = {"name": self.path.resolve().name, "kind": self.kind}
        if self.fingerprint is not None:
            return said | {"fingerprint": self.fingerprint, "parent": self.parent}
        return said | {"parent": None, "source": self.source}


def open_delta(path: Path) -> Delta:
    """Understand a delta: a folder of ours, a PEFT adapter over our names, or a published one.

    Raises:
        CheckpointError: It is something else, incomplete, or an adapter of another kind than LoRA.
    """
    return read_delta(io.open_weights(io.home_of(path)))


def read_delta(found: Weights) -> Delta:
    """See ``open_delta``."""
    what = f"'{found.path}'"
    if found.kind == keymaps.DELTA:
        delta = Delta(found.path, found.kind, found.tensors)
    elif found.kind in (keymaps.PEFT, keymaps.STAGE_3):
        check_adapter(found.config, what)
        delta = _own_adapter(found, what) if is_ours(found) else _published_adapter(found, what)
    elif found.kind in keymaps.DELTAS:
        whole, entries = _projectors(found.tensors, what)
        delta = Delta(found.path, found.kind, whole, entries=entries)
    else:
        raise CheckpointError(f"{what} is no delta but: {found.kind}.", _hint(found))
    if delta.entries:
        delta.source = io.describe_file(found)
        delta.dropped = {entry.key: entry.why for entry in delta.entries if entry.to is None}
        return delta
    stage = io.read_stage(found.folder)
    delta.fingerprint = io.combine(delta.config, digests_of(found.tensors))
    delta.parent = stage["parent"] if isinstance(stage.get("parent"), str) else None
    if stage.get("fingerprint", delta.fingerprint) != delta.fingerprint:
        raise CheckpointError(
            f"{what} was changed after it was written: tensors are missing, added or of other "
            "values than its stage.json says.",
            "Copy or train it again.",
        )
    return delta


def is_ours(found: Weights) -> bool:
    """Whether an adapter already has our names."""
    return any(key.startswith(f"{DELTA_PREFIX}{keymaps.LANGUAGE_PART}") for key in found.tensors)


def check_adapter(config: Mapping[str, Any], what: str) -> None:
    """Refuse an adapter that is not plain LoRA, by what its ``adapter_config.json`` says.

    Raises:
        CheckpointError: Names ``what`` and every field that makes it another kind.
    """
    kind = str(config.get("peft_type", "")).upper()
    odd = {key: value for key, value in config.items() if key not in _NEUTRAL and value}
    if odd.get("bias") == "none":
        del odd["bias"]
    if config.get("init_lora_weights") not in _STARTS:
        odd["init_lora_weights"] = config["init_lora_weights"]
    if kind == "LORA" and not odd and isinstance(config.get("lora_alpha"), int | float):
        return
    said = [f"{_NAMES.get(name, name)} ({name} = {value})" for name, value in odd.items()]
    if kind != "LORA":
        said = [f"{kind or 'an unnamed kind'} (peft_type = {config.get('peft_type')})"]
    raise CheckpointError(
        f"The adapter in {what} is not plain LoRA but: {', '.join(said) or 'without lora_alpha'}.",
        "Only plain LoRA is merged and imported; merge others with peft's merge_and_unload.",
    )


def _hint(found: Weights) -> str:
    if found.kind in (keymaps.OUR_EXPLAINER, keymaps.DETECTOR):
        return "It is a whole checkpoint: give it as --base."
    if any(file.name == TENSORS for file in found.files):
        return "It has no stage.json, so it is not complete: copy or train it again."
    return "Give a delta of m2f2 align or lora, a PEFT adapter or a published delta folder."


def _split(found: Weights, what: str) -> tuple[dict[str, dict[str, str]], dict[str, LazyTensor]]:
    """An adapter's keys by module and side, each module with both, and what is trained whole."""
    sides: dict[str, dict[str, str]] = {}
    rest: dict[str, LazyTensor] = {}
    for key, tensor in found.tensors.items():
        if match := _LORA.fullmatch(key):
            sides.setdefault(match["module"], {})[match["side"]] = key
        else:
            rest[key] = tensor
    rank = found.config.get("r")
    for module, keys in sides.items():
        if len(keys) != 2:
            raise CheckpointError(
                f"The adapter in {what} has only one half of its update of {module}.",
                "Copy or download it again.",
            )
        down, up = found.tensors[keys["A"]].shape, found.tensors[keys["B"]].shape
        if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
            raise CheckpointError(
                f"The adapter in {what} has updates of shape {list(up)} x {list(down)} for "
                f"{module}, which is not of rank {rank} as {ADAPTER_CONFIG} says.",
                "The two files are of different runs; copy them again.",
            )
    return dict(sorted(sides.items())), rest


def _pair(found: Weights, keys: Mapping[str, str]) -> Pair:
    scale = float(found.config["lora_alpha"]) / int(found.config["r"])
    return Pair(found.tensors[keys["A"]], found.tensors[keys["B"]], scale)


def _own_adapter(found: Weights, what: str) -> Delta:
    """An adapter over our names; updates that are zero are left out."""
    sides, rest = _split(found, what)
    odd = [key for key in (*sides, *rest) if not key.startswith(DELTA_PREFIX) or ".lora_" in key]
    if odd:
        raise CheckpointError(
            f"The adapter in {what} holds '{odd[0]}', which is no part of plain LoRA.",
            "Only LoRA on linear layers, and modules trained whole, are merged.",
        )
    whole = {key.removeprefix(DELTA_PREFIX): tensor for key, tensor in rest.items()}
    delta = Delta(found.path, found.kind, whole, config=found.config)
    for module, keys in sides.items():
        if is_zero(found.tensors[keys["B"]]):
            delta.dropped[module] = "its update is exactly zero"
        else:
            delta.pairs[f"{module.removeprefix(DELTA_PREFIX)}.weight"] = _pair(found, keys)
    delta.frozen = tuple(name for name in delta.pairs if name.startswith(keymaps.DETECTOR_PART))
    return delta


def _published_adapter(found: Weights, what: str) -> Delta:
    """An adapter over the published names, with its projectors, under ours."""
    sides, rest = _split(found, what)
    if not any(".mm_projector." in key or ".deepfake_projector." in key for key in rest):
        raise CheckpointError(
            f"{what} lacks the projectors trained with the adapter ({_PROJECTORS}).",
            f"Copy or download {_PROJECTORS} into the folder.",
        )
    pairs: dict[str, Pair] = {}
    entries: list[Entry] = []
    above = []
    top = max((int(n) for module in sides for n in _VISION_BLOCK.findall(module)), default=-1)
    for module, keys in sides.items():
        ours = keymaps.module_of(module.removeprefix(DELTA_PREFIX))
        block = _VISION_BLOCK.search(module)
        why = _ABOVE if ours is None or (block and int(block[1]) == top) else ""
        why = _FROZEN if is_zero(found.tensors[keys["B"]]) else why
        for side in "AB":
            name = f"{DELTA_PREFIX}{ours}.lora_{side}.weight"
            entries.append(Entry(keys[side], None if why else name, why))
        if not why:
            pairs[f"{ours}.weight"] = _pair(found, keys)
        elif why == _ABOVE:
            above.append(module)
    whole, of_projectors = _projectors(rest, what)
    entries += [Entry(e.key, e.to and f"{DELTA_PREFIX}{e.to}", e.why) for e in of_projectors]
    if not pairs:
        raise CheckpointError(
            f"The adapter in {what} changes nothing: every one of its updates is zero.",
            "It was saved before training, or is damaged; take another checkpoint.",
        )
    frozen = [name for name in pairs if name.startswith(keymaps.DETECTOR_PART)]
    config = found.config | {
        "target_modules": [name.removesuffix(".weight") for name in pairs],
        "modules_to_save": [m for m in _MODULES if f"{m}.0.weight" in whole] or None,
        "base_model_name_or_path": None,
    }
    return Delta(
        found.path, found.kind, whole, pairs, config, frozen=(*frozen, *above), entries=entries
    )


def _projectors(
    found: Mapping[str, LazyTensor], what: str
) -> tuple[dict[str, LazyTensor], list[Entry]]:
    """Trained projectors by our names, whole ones only, and what becomes of each key."""
    entries = keymaps.look_up(found, keymaps.PUBLISHED, what=what, prefix=DELTA_PREFIX)
    tensors = {e.to: found[e.key] for e in entries if e.to is not None}
    for module in _MODULES:
        names = [f"{module}.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")]
        absent = [name for name in names if name not in tensors]
        if len(absent) not in (0, len(names)):
            raise CheckpointError(
                f"{what} lacks the tensors {', '.join(absent)}.", "Copy or download it again."
            )
    others = sorted(name for name in tensors if not name.startswith(_MODULES))
    if others:
        raise CheckpointError(
            f"{what} holds tensors that no published delta trains: {', '.join(others[:4])}.",
            "The file is of another kind; m2f2 info PATH says what it is.",
        )
    return tensors, entries


def is_zero(tensor: LazyTensor) -> bool:
    """Whether every value is zero; read only as far as the first part that is not."""
    parts = (part for block in tensor.blocks() for part in block.split(1 << 12))
    return not any(bool(part.any()) for part in parts)
