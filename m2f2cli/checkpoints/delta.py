"""A delta on disk: what a training stage changed, in a folder of its own.

Two forms: ``delta.safetensors``, whose tensors take the place of the base's tensors of the same
name; or a standard PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``) with the
projectors as modules trained whole. Both with ``stage.json``, written last, that names the
checkpoint they were trained on (``parent``) by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.io import (
    LazyTensor,
    as_lazy,
    digests_of,
    write_tensor_file,
)
from m2f2cli.errors import CheckpointError
from m2f2cli.files import MARK, atomic_folder, json_bytes

if TYPE_CHECKING:
    import torch

TENSORS = "delta.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Fields of adapter_config.json that say nothing about what an update means. Any other one that is
# set, now known or not, makes an adapter of a kind that is not folded.
_SILENT = frozenset(
    (
        *("task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "init_lora_weights"),
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
        *("layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
        "eva_config",
    )
)
_PLAIN = {"bias": "none"}
# Ways to start an adapter that leave the base as it is; others (PiSSA, OLoRA, …) change it.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_NAMES = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "use_qalora": "QALoRA"}


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

    Returns:
        ``sha256:`` over the adapter's configuration and every tensor.

    Raises:
        CheckpointError: The folder exists, a tensor holds NaN or infinity, or the disk refuses;
            whatever was there before is still there.
    """
    checked = {key: as_lazy(t).finite(what=f"The tensor '{key}'") for key, t in tensors.items()}
    with atomic_folder(folder, overwrite) as partial:
        digests = write_tensor_file(partial / (TENSORS if adapter is None else ADAPTER), checked)
        if adapter is not None:
            (partial / ADAPTER_CONFIG).write_bytes(json_bytes(adapter))
        mark = io.combine(adapter or {}, digests)
        said = stage(digests) if callable(stage) else stage
        (partial / MARK).write_bytes(json_bytes({**said, "fingerprint": mark}))
    return mark


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
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return plain(config) | {"inference_mode": True, "base_model_name_or_path": None}


def diff(base: Path, changed: Path, output: Path, *, overwrite: bool = False) -> str:
    """Write the delta that leads from one checkpoint to another, and return its fingerprint.

    Merging it into ``base`` gives the tensors of ``changed`` again, byte for byte.

    Args:
        base: A checkpoint folder.
        changed: One of the same model with other values.
        output: The delta folder to make.
        overwrite: Replace an existing checkpoint or delta folder.

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
    stage = {
        "stage": "diff",
        "parent": io.fingerprint(base),
        "changed": io.fingerprint(changed),
    }
    return write_delta(output, tensors=moved, stage=stage, overwrite=overwrite)


def check_adapter(config: Mapping[str, Any], what: str) -> None:
    """Refuse an adapter that is not plain LoRA, as ``adapter_config.json`` says.

    Args:
        config: The file's content.
        what: The adapter, for the message.

    Raises:
        CheckpointError: Names every field that makes it another kind.
    """
    kind = str(config.get("peft_type", "")).upper()
    odd = {
        name: value
        for name, value in config.items()
        if name not in _SILENT and value and value != _PLAIN.get(name)
    }
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
