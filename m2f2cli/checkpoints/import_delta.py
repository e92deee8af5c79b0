"""The published deltas of stages 2 and 3 in our form.

Trained projectors become ``delta.safetensors``: tensors by our names that take the place of the
base's. A LoRA adapter becomes a standard PEFT folder over our module names, the projectors in it as
modules trained whole, so ``peft.PeftModel.from_pretrained`` loads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from m2f2cli.checkpoints import delta, keymaps
from m2f2cli.checkpoints.io import LazyTensor, Weights
from m2f2cli.checkpoints.keymaps import Entry
from m2f2cli.errors import CheckpointError

PROJECTORS = "non_lora_trainables.bin"
_PREFIX = keymaps.DELTA_PREFIX
_MODULES = ("mm_projector", "forgery_projector")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
FROZEN = "frozen in training: its update is exactly zero"
_ABOVE = "above the hidden state that the detector reads"
_PART = 1 << 12
_BLOCK = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")


def read_published(
    source: Weights,
) -> tuple[dict[str, Any], dict[str, LazyTensor], list[Entry]]:
    """Put a published delta in our terms.

    Args:
        source: A stage-2 folder or its ``mm_projector.bin``, a stage-3 folder, or its projectors.

    Returns:
        The content of ``adapter_config.json`` (empty for projectors alone), the tensors by our
        names, and what becomes of each key.

    Raises:
        CheckpointError: A tensor is unknown, missing, misshapen or of an adapter of another kind.
    """
    if source.kind in (keymaps.STAGE_3, keymaps.PEFT):
        return _adapter(source)
    return {}, *_projectors(source.tensors, what=f"'{source.path}'")


def _projectors(
    found: Mapping[str, LazyTensor], *, what: str
) -> tuple[dict[str, LazyTensor], list[Entry]]:
    """Trained projectors by our names, whole ones only."""
    entries = keymaps.look_up(found, keymaps.PUBLISHED, what=what, prefix=_PREFIX)
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


def _adapter(source: Weights) -> tuple[dict[str, Any], dict[str, LazyTensor], list[Entry]]:
    what = f"'{source.path}'"
    config = dict(source.config)
    delta.check_adapter(config, what)
    pairs, projectors = _split(source, what)
    tensors: dict[str, LazyTensor] = {}
    entries: list[Entry] = []
    targets = []
    top = max((int(n) for module in pairs for n in _BLOCK.findall(module)), default=-1)
    for module, sides in sorted(pairs.items()):
        _check_pair(module, sides, config, source, what)
        ours = keymaps.module_of(module.removeprefix(_PREFIX))
        block = _BLOCK.search(module)
        why = _ABOVE if ours is None or (block and int(block.group(1)) == top) else ""
        why = FROZEN if is_zero(source.tensors[sides["B"]]) else why
        for side, key in sorted(sides.items()):
            if why:
                entries.append(Entry(key, None, why))
                continue
            name = f"{_PREFIX}{ours}.lora_{side}.weight"
            tensors[name] = source.tensors[key]
            entries.append(Entry(key, name))
        if not why and ours is not None:
            targets.append(ours)
    whole, of_projectors = _projectors(projectors, what=what)
    tensors |= {f"{_PREFIX}{name}": stream for name, stream in whole.items()}
    entries += [replace(e, to=f"{_PREFIX}{e.to}") if e.to else e for e in of_projectors]
    if not targets:
        raise CheckpointError(
            f"The adapter in {what} changes nothing: every one of its updates is zero.",
            "It was saved before training, or is damaged; take another checkpoint.",
        )
    config["target_modules"] = targets
    config["modules_to_save"] = [m for m in _MODULES if f"{m}.0.weight" in whole] or None
    config["base_model_name_or_path"] = None
    return config, tensors, entries


def _split(source: Weights, what: str) -> tuple[dict[str, dict[str, str]], dict[str, LazyTensor]]:
    """The adapter's keys by module and side, and the projectors trained beside it."""
    pairs: dict[str, dict[str, str]] = {}
    rest: dict[str, LazyTensor] = {}
    for key, stored in source.tensors.items():
        if match := _LORA.fullmatch(key):
            pairs.setdefault(match["module"], {})[match["side"]] = key
        else:
            rest[key] = stored
    if any(len(sides) != 2 for sides in pairs.values()):
        module = next(m for m, sides in pairs.items() if len(sides) != 2)
        raise CheckpointError(
            f"The adapter in {what} has only one half of its update of {module}.",
            "Copy or download it again.",
        )
    if not any(".mm_projector." in key or ".deepfake_projector." in key for key in rest):
        raise CheckpointError(
            f"{what} lacks the projectors trained with the adapter ({PROJECTORS}).",
            f"Copy or download {PROJECTORS} into the folder.",
        )
    return pairs, rest


def _check_pair(
    module: str, sides: Mapping[str, str], config: Mapping[str, Any], source: Weights, what: str
) -> None:
    first, second = (source.tensors[sides[side]].shape for side in "AB")
    rank = config.get("r")
    if len(first) != 2 or len(second) != 2 or first[0] != rank or second[1] != rank:
        raise CheckpointError(
            f"The adapter in {what} has updates of shape {list(second)} x {list(first)} for "
            f"{module}, which is not of rank {rank} as adapter_config.json says.",
            "The two files are of different runs; copy them again.",
        )


def is_zero(stream: LazyTensor) -> bool:
    """Whether every value is zero. Read only as far as the first part that is not."""
    parts = (part for block in stream.blocks() for part in block.split(_PART))
    return not any(bool(part.any()) for part in parts)


def is_ours(source: Weights) -> bool:
    """Whether an adapter already has our names."""
    return any(key.startswith(f"{_PREFIX}{keymaps.LANGUAGE_PART}") for key in source.tensors)
