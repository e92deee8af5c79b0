"""What a delta changes, by our names: ours, PEFT's and the published ones read alike.

A delta replaces tensors (``whole``) or adds the product of two small ones to a matrix (``pairs``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from m2f2cli.checkpoints import import_delta, io, keymaps
from m2f2cli.checkpoints.delta import TENSORS, check_adapter
from m2f2cli.checkpoints.io import (
    LazyTensor,
    Weights,
    as_lazy,
    describe_file,
    digests_of,
    home_of,
    open_weights,
)
from m2f2cli.errors import CheckpointError

_PREFIX = keymaps.DELTA_PREFIX
_LORA = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PUBLISHED = (keymaps.STAGE_2, keymaps.STAGE_3, keymaps.STAGE_3_PART, keymaps.PEFT)


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


@dataclass(frozen=True)
class Delta:
    """What a delta changes; the values are still on disk.

    Args:
        path: Its folder or file.
        kind: One of ``keymaps``.
        fingerprint: Its own; None for a published one, which ``source`` names by its files.
        parent: Fingerprint of the checkpoint it was trained on; None where it does not say.
        whole: Tensors that take the place of the base's, by our names.
        pairs: Updates by the name of the matrix they are added to.
        frozen: Modules of the frozen detector whose updates are nevertheless not zero.
        dropped: Keys that change nothing, and why.
        source: Names and SHA-256 of a published delta's files.
        modules: Modules that it says are trained whole.
    """

    path: Path
    kind: str
    fingerprint: str | None
    parent: str | None
    whole: dict[str, LazyTensor] = field(default_factory=dict)
    pairs: dict[str, Pair] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    dropped: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What ``stage.json`` says of it."""
        said: dict[str, Any] = {"name": self.path.resolve().name, "kind": self.kind}
        if self.fingerprint is not None:
            return said | {"fingerprint": self.fingerprint, "parent": self.parent}
        return said | {"parent": None, "source": self.source}


def open_delta(path: Path) -> Delta:
    """Understand a delta: a folder of ours, a PEFT adapter over our names, or a published one.

    Raises:
        CheckpointError: It is something else, incomplete, or an adapter of another kind than LoRA.
    """
    found = open_weights(home_of(path))
    what = f"'{found.path}'"
    if found.kind == keymaps.DELTA:
        whole = {key: as_lazy(stored) for key, stored in found.tensors.items()}
        return Delta(found.path, found.kind, *_marks(found), whole=whole)
    if found.kind not in _PUBLISHED:
        raise CheckpointError(f"{what} is no delta but: {found.kind}.", _hint(found))
    if found.kind in (keymaps.PEFT, keymaps.STAGE_3):
        check_adapter(found.config, what)
    if found.kind == keymaps.PEFT and import_delta.is_ours(found):
        whole, pairs, dropped = _adapter(found.tensors, found.config, what)
        return Delta(
            found.path,
            found.kind,
            *_marks(found),
            whole=whole,
            pairs=pairs,
            frozen=_frozen(pairs),
            dropped=dropped,
            modules=tuple(found.config.get("modules_to_save") or ()),
        )
    config, tensors, entries = import_delta.read_published(found)
    fates = [entry for entry in entries if entry.to is None]
    above = {f.key.split(".lora_")[0] for f in fates if f.why != import_delta.FROZEN}
    source = describe_file(found)
    whole, pairs, dropped = tensors, {}, {fate.key: fate.why for fate in fates}
    if config:
        whole, pairs, _ = _adapter(tensors, config, what)
    frozen = (*_frozen(pairs), *sorted(above))
    return Delta(found.path, found.kind, None, None, whole, pairs, frozen, dropped, source)


def _marks(found: Weights) -> tuple[str, str | None]:
    """Own fingerprint, computed and compared with stage.json's, and the parent's."""
    stage = io.read_stage(found.folder)
    parent = stage.get("parent")
    config = {} if found.kind == keymaps.DELTA else found.config
    mark = io.combine(config, digests_of(found.tensors))
    if stage.get("fingerprint", mark) != mark:
        raise CheckpointError(
            f"'{found.path}' was changed after it was written: tensors are missing, added or of "
            "other values than its stage.json says.",
            "Copy or train it again.",
        )
    return mark, parent if isinstance(parent, str) else None


def _hint(found: Weights) -> str:
    if found.kind in (keymaps.OUR_EXPLAINER, keymaps.DETECTOR):
        return "It is a whole checkpoint: give it as --base."
    if any(file.name == TENSORS for file in found.files):
        return "It has no stage.json, so it is not complete: copy or train it again."
    return "Give a delta of m2f2 align or lora, a PEFT adapter or a published delta folder."


def _adapter(
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    what: str,
) -> tuple[dict[str, LazyTensor], dict[str, Pair], dict[str, str]]:
    """The tensors of an adapter over our names: trained whole, and in pairs that are not zero."""
    sides: dict[str, dict[str, LazyTensor]] = {}
    whole: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        if match := _LORA.fullmatch(key):
            sides.setdefault(match["module"], {})[match["side"]] = as_lazy(tensor)
        elif key.startswith(_PREFIX) and ".lora_" not in key:
            whole[key.removeprefix(_PREFIX)] = as_lazy(tensor)
        else:
            raise CheckpointError(
                f"The adapter in {what} holds '{key}', which is no part of plain LoRA.",
                "Only LoRA on linear layers, and modules trained whole, are merged.",
            )
    pairs: dict[str, Pair] = {}
    dropped: dict[str, str] = {}
    for module, pair in sorted(sides.items()):
        _check_pair(module, pair, config, what)
        if import_delta.is_zero(pair["B"]):
            dropped[f"{_PREFIX}{module}"] = "its update is exactly zero"
        else:
            scale = float(config["lora_alpha"]) / int(config["r"])
            pairs[f"{module}.weight"] = Pair(pair["A"], pair["B"], scale)
    return whole, pairs, dropped


def _check_pair(
    module: str, pair: Mapping[str, LazyTensor], config: Mapping[str, Any], what: str
) -> None:
    if len(pair) != 2:
        raise CheckpointError(
            f"The adapter in {what} has only one half of its update of {module}.",
            "Copy or download it again.",
        )
    down, up, rank = pair["A"].shape, pair["B"].shape, config.get("r")
    if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
        raise CheckpointError(
            f"The adapter in {what} has updates of shape {list(up)} x {list(down)} for {module}, "
            f"which is not of rank {rank} as adapter_config.json says.",
            "The two files are of different runs; copy them again.",
        )


def _frozen(pairs: Mapping[str, Pair]) -> tuple[str, ...]:
    return tuple(name for name in pairs if name.startswith(keymaps.DETECTOR_PART))
