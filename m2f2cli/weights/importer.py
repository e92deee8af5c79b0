"""Published detectors turned into our configuration and tensors, every key accounted for.

What a file is, is read from its tensors' names and shapes, never from its own name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f2cli.errors import CheckpointError, UsageError
from m2f2cli.weights import reference, towers
from m2f2cli.weights.pickles import LoadedFile, load_tensors_file
from m2f2cli.weights.reference import Fate
from m2f2cli.weights.store import check_finite
from m2f2cli.weights.tensorfile import StoredTensor

if TYPE_CHECKING:
    import torch

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# The published detectors read the hidden state before the last.
_VISION_LAYER = -2
_ABOVE = "above the hidden state that the detector reads"
_SAME_TOWER = "the detector's file brings the same tower"
_TRAINING = "training state or other data, no weight of the model"
_NO_TOWER = "not part of the vision tower"
_VISION_MARK = "vision_model.embeddings.class_embedding"
_WORDS = "clip_text_encoder.model.text_model.embeddings.token_embedding.weight"


@dataclass(frozen=True)
class Source:
    """One recognised file.

    Args:
        file: What was read.
        kind: ``detector A``, ``detector B`` or ``vision tower``.
        prefix: What stands before every key of interest, for example ``module.``.
        state: The tensors by key without prefix, still on disk.
        others: Keys of the file that are not tensors of the model.
    """

    file: LoadedFile
    kind: str
    prefix: str
    state: dict[str, StoredTensor]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """A published detector in our terms.

    Args:
        kind: ``detector A`` or ``detector B``.
        config: The content of ``config.json``.
        tensors: By our names.
        fates: For each file, what becomes of each of its keys (as they stand in the file).
        sources: For each file its name, layout and kind.
        rows: The key table used, for naming tensors as published.
    """

    kind: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    fates: dict[str, list[Fate]]
    sources: list[dict[str, Any]]
    rows: tuple[reference.Row, ...]


def recognise(path: Path) -> Source:
    """Tell what a published weights file is.

    Raises:
        CheckpointError: The file is unreadable, or neither a detector nor a vision tower.
    """
    file = load_tensors_file(path)
    keys = file.tensors
    others = tuple(sorted(set(file.rest)))
    alpha = [key for key in keys if key.endswith("clip_vision_alpha")]
    if len(alpha) == 1:
        prefix = alpha[0].removesuffix("clip_vision_alpha")
        state = {k.removeprefix(prefix): t for k, t in keys.items() if k.startswith(prefix)}
        if len(state) != len(keys):
            raise CheckpointError(
                f"'{path}' holds a detector inside a larger model.",
                "Give the detector's own file; m2f2 info PATH says what this one is.",
            )
        folded = reference.FOLDED[2] in state
        return Source(file, "detector A" if folded else "detector B", prefix, state, others)
    marks = [key for key in keys if key.endswith(_VISION_MARK)]
    if len(marks) == 1 and not any(".layers." in k and "self_attn.o_proj" in k for k in keys):
        prefix = marks[0].removesuffix(_VISION_MARK)
        begin = f"{prefix}vision_model."
        state = {k.removeprefix(prefix): t for k, t in keys.items() if k.startswith(begin)}
        rest = tuple(k for k in keys if not k.startswith(begin))
        return Source(file, "vision tower", prefix, state, others + rest)
    raise CheckpointError(
        f"'{path}' is neither a published detector nor a CLIP vision tower.",
        "m2f2 info PATH says what it is.",
    )


def convert(paths: Sequence[Path], *, clip_config: Path | None = None) -> Conversion:
    """Turn published files into one detector of ours.

    Args:
        paths: One detector A or B and, where it lacks its vision tower, the tower's file.
        clip_config: A CLIP ``config.json`` for towers that are none of the known ones.

    Raises:
        CheckpointError: A file is unreadable, unknown, incomplete or holds NaN.
        UsageError: The files do not make one detector.
    """
    detector, tower = _sort([recognise(path) for path in paths])
    what = f"'{detector.file.path}'"
    state = dict(detector.state)
    own = {k: t for k, t in state.items() if ".vision_model." in k}
    if not own and tower is None:
        raise CheckpointError(
            f"{what} comes without its CLIP vision tower.",
            "Give the tower's file as well: m2f2 import DETECTOR.pth TOWER.pth --output DIR.",
        )
    if tower is not None:
        of_tower = {f"clip_vision_encoder.model.{k}": t for k, t in tower.state.items()}
        if own:
            _require_equal(own, of_tower, detector.file.path, tower.file.path)
        state.update(of_tower)
    rows = reference.table(detector.kind[-1], _backbone(state, what))
    tensors, fates = _rename(detector.kind, state, rows, what=what)
    config = _config(tensors, state, towers.read_clip_config(clip_config), what=what)
    used = towers.blocks_used(config["clip"]["vision"]["num_hidden_layers"], _VISION_LAYER)
    fates = [_drop_above(fate, used) for fate in fates]
    kept = {fate.to for fate in fates if fate.to is not None}
    return Conversion(
        kind=detector.kind,
        config=config,
        tensors={key: tensors[key] for key in sorted(kept)},
        fates=_by_file(fates, detector, tower, bool(own)),
        sources=[_describe(source) for source in (detector, tower) if source is not None],
        rows=rows,
    )


def _sort(sources: Sequence[Source]) -> tuple[Source, Source | None]:
    detectors = [source for source in sources if source.kind != "vision tower"]
    vision = [source for source in sources if source.kind == "vision tower"]
    names = ", ".join(f"'{source.file.path}' is a {source.kind}" for source in sources)
    if not detectors:
        raise UsageError(
            f"A vision tower alone is no detector: {names}.", "Give the detector's file as well."
        )
    if len(detectors) > 1 or len(vision) > 1:
        raise UsageError(
            f"These files do not make one detector: {names}.",
            "Give one detector and at most one vision tower; import others into other folders.",
        )
    return detectors[0], vision[0] if vision else None


def _backbone(state: Mapping[str, StoredTensor], what: str) -> str:
    if "deepfake_encoder.conv0.weight" in state:
        return "densenet121"
    if "deepfake_encoder.0.0.weight" in state:
        return "efficientnet_b4"
    raise CheckpointError(
        f"The backbone of {what} is neither densenet121 nor efficientnet_b4.",
        "m2f2 info PATH lists what the file holds.",
    )


def _rename(
    kind: str, state: dict[str, StoredTensor], rows: Sequence[reference.Row], *, what: str
) -> tuple[dict[str, torch.Tensor], list[Fate]]:
    """Our tensors, and the fate of every key; the bridge of a detector A is folded."""
    folded = reference.FOLDED if kind == "detector A" else ()
    if missing := [key for key in folded if key not in state]:
        raise CheckpointError(f"{what} lacks the tensors {', '.join(missing)}.")
    fates = reference.fates((key for key in state if key not in folded), rows, what=what)
    fates += [Fate(key, "folded", None, "a constant, added to head.bias") for key in folded]
    needed = [fate.key for fate in fates if fate.action != "dropped"]
    loaded = {key: state[key].load() for key in needed}
    check_finite(loaded, what=what)
    if folded:
        if missing := [k for k in ("output.weight", "output.bias", "vision_proj.0.weight")
                       if k not in loaded]:  # fmt: skip
            raise CheckpointError(f"{what} lacks the tensors {', '.join(missing)}.")
        loaded = reference.fold_bridge(loaded)
    return reference.rename(loaded, rows, what=what), fates


def _config(
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, StoredTensor],
    given: Mapping[str, dict[str, Any]],
    *,
    what: str,
) -> dict[str, Any]:
    parts = {
        part: {
            key.removeprefix(f"clip.{part}."): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"clip.{part}.")
        }
        for part in ("vision", "text")
    }
    vision = towers.vision_fields(parts["vision"], given.get("vision"), what=what)
    clip: dict[str, Any] = {"library": "transformers", "vision": vision}
    mapped = bool(parts["text"])
    if mapped:
        words = int(state[_WORDS].shape[0]) if _WORDS in state else 49408
        clip["text"] = towers.text_fields(parts["text"], given.get("text"), words=words, what=what)
    for key in ("vision_proj.0.weight", *(("forgery_prompt.tokens",) if mapped else ())):
        if key not in tensors or tensors[key].ndim < 2:
            raise CheckpointError(f"{what} lacks its tensor '{key}', or it is misshapen.")
    return {
        "architectures": ["Detector"],
        "model_type": "m2f2_detector",
        "backbone": _backbone(state, what),
        "backbone_kwargs": {},
        "clip": clip,
        "hidden_size": int(tensors["vision_proj.0.weight"].shape[0]),
        "prompt_tokens": int(tensors["forgery_prompt.tokens"].shape[1]) if mapped else 0,
        "vision_layer": _VISION_LAYER,
        "forgery_map": mapped,
        "bridge": None,
        "image_size": vision["image_size"],
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "crop": {"detector": "dlib", "margin": 0.3},
        "threshold": 0.5,
        "uncertain": None,
        "score_temperature": 1.0,
        "domain": None,
        "dtype": str(tensors["vision_proj.0.weight"].dtype).removeprefix("torch."),
    }


def _drop_above(fate: Fate, used: int) -> Fate:
    """Drop the vision blocks that do not feed the hidden state in use."""
    name = (fate.to or "").removeprefix("clip.vision.")
    parts = name.split(".")
    above = name.startswith("post_layernorm.") or (
        name.startswith("encoder.layers.") and int(parts[2]) >= used
    )
    return replace(fate, action="dropped", to=None, why=_ABOVE) if above else fate


def _require_equal(
    own: Mapping[str, StoredTensor], other: Mapping[str, StoredTensor], first: Path, second: Path
) -> None:
    import torch

    for key, stored in own.items():
        twin = other.get(key)
        if twin is None or twin.shape != stored.shape or not torch.equal(
            twin.load().float(), stored.load().float()
        ):  # fmt: skip
            raise UsageError(
                f"'{first}' brings its own CLIP vision tower, and the one in '{second}' differs "
                f"({key}).",
                "Give the detector's file alone, or a detector without a tower.",
            )


def _by_file(
    fates: Sequence[Fate], detector: Source, tower: Source | None, own: bool
) -> dict[str, list[Fate]]:
    """Give each fate back to its file, under the key as it stands there."""
    sorted_fates: dict[str, list[Fate]] = {}
    own_keys = detector.state
    sorted_fates[str(detector.file.path)] = [
        *(replace(f, key=detector.prefix + f.key) for f in fates if f.key in own_keys),
        *(Fate(key, "dropped", None, _TRAINING) for key in detector.others),
    ]
    if tower is not None:
        by_key = {f.key.removeprefix("clip_vision_encoder.model."): f for f in fates}
        sorted_fates[str(tower.file.path)] = [
            *(
                Fate(tower.prefix + key, "dropped", None, _SAME_TOWER)
                if own
                else replace(by_key[key], key=tower.prefix + key)
                for key in tower.state
            ),
            *(Fate(key, "dropped", None, _NO_TOWER) for key in tower.others),
        ]
    return sorted_fates


def _describe(source: Source) -> dict[str, Any]:
    path = source.file.path
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {
        "file": path.name,
        "sha256": digest.hexdigest(),
        "kind": source.kind,
        "layout": source.file.layout,
        "foreign": list(source.file.foreign),
    }
