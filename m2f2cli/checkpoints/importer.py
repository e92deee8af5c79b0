"""Published detectors turned into our configuration and tensors, every key accounted for.

What a file is, is read from its tensors' names and shapes, never from its own name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m2f2cli.checkpoints import reference, streams, towers
from m2f2cli.checkpoints.folders import Weights, sha256_of
from m2f2cli.checkpoints.reference import Fate
from m2f2cli.checkpoints.store import check_finite
from m2f2cli.checkpoints.streams import Stream
from m2f2cli.checkpoints.tensorfile import StoredTensor
from m2f2cli.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# The published detectors read the hidden state before the last.
VISION_LAYER = -2
ABOVE = "above the hidden state that the detector reads"
SAME_TOWER = "the detector's file brings the same tower"
TRAINING = "training state or other data, no weight of the model"
NO_TOWER = "not part of the vision tower"
_VISION_MARK = "embeddings.class_embedding"
_WORDS = "clip_text_encoder.model.text_model.embeddings.token_embedding.weight"


@dataclass(frozen=True)
class Source:
    """One recognised file or folder.

    Args:
        file: What was read.
        kind: ``detector A``, ``detector B`` or ``vision tower``.
        prefix: What stands before every key of interest, for example ``module.``.
        state: The tensors by key without prefix, still on disk; a tower's begin with
            ``vision_model.`` whatever stands there in the file.
        others: Keys of the file that are not tensors of the model.
    """

    file: Weights
    kind: str
    prefix: str
    state: dict[str, StoredTensor]
    others: tuple[str, ...] = ()


class PublishedHead(NamedTuple):
    """A published detector's last layer, before anything is folded into it.

    Attributes:
        weight: (2, F).
        bias: (2,).
        constant: What detector A's bridge adds to the middle of the features; None for B.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    constant: torch.Tensor | None


@dataclass(frozen=True)
class Conversion:
    """Published weights in our terms.

    Args:
        kind: What they are, in words.
        config: The content of ``config.json`` (of ``adapter_config.json`` for an adapter).
        tensors: By our names.
        fates: For each file, what becomes of each of its keys (as they stand in the file).
        sources: For each file its name, layout and kind.
        rows: The key table used, for naming tensors as published.
        head: Of a detector.
    """

    kind: str
    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor] | Mapping[str, Stream]
    fates: dict[str, list[Fate]]
    sources: list[dict[str, Any]]
    rows: tuple[reference.Row, ...]
    head: PublishedHead | None = None


def recognise(file: Weights) -> Source:
    """Tell what a published weights file is.

    Raises:
        CheckpointError: It is neither a detector nor anything with a vision tower.
    """
    keys = file.tensors
    alpha = [key for key in keys if key.endswith("clip_vision_alpha")]
    if len(alpha) == 1:
        prefix = alpha[0].removesuffix("clip_vision_alpha")
        state = {k.removeprefix(prefix): t for k, t in keys.items() if k.startswith(prefix)}
        if len(state) != len(keys):
            raise CheckpointError(
                f"'{file.path}' holds a detector inside a larger model.",
                "Give the detector's own file; m2f2 info PATH says what this one is.",
            )
        folded = reference.FOLDED[2] in state
        kind = "detector A" if folded else "detector B"
        return Source(file, kind, prefix, state, file.others)
    return recognise_tower(file)


def recognise_tower(file: Weights) -> Source:
    """Find the CLIP vision tower in a tower's own file, a CLIP model or a LLaVA.

    Raises:
        CheckpointError: There is none, or there are several.
    """
    marks = [key for key in file.tensors if key.endswith(_VISION_MARK)]
    if len(marks) != 1:
        raise CheckpointError(
            f"'{file.path}' is neither a published detector nor a CLIP vision tower.",
            "m2f2 info PATH says what it is.",
        )
    begin = marks[0].removesuffix(_VISION_MARK)
    state = {
        f"vision_model.{key.removeprefix(begin)}": stored
        for key, stored in file.tensors.items()
        if key.startswith(begin)
    }
    rest = tuple(key for key in file.tensors if not key.startswith(begin))
    return Source(file, "vision tower", begin, state, file.others + rest)


def convert(files: Sequence[Weights], *, clip_config: Path | None = None) -> Conversion:
    """Turn published files into one detector of ours.

    Args:
        files: One detector A or B and, where it lacks its vision tower, the tower's.
        clip_config: A CLIP ``config.json`` for towers that are none of the known ones.

    Raises:
        CheckpointError: A file is unknown, incomplete or holds NaN.
        UsageError: The files do not make one detector.
    """
    detector, tower = _sort([recognise(file) for file in files])
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
            require_equal(own, of_tower, detector.file.path, tower.file.path)
        state.update(of_tower)
    rows = reference.table(detector.kind[-1], _backbone(state, what))
    tensors, fates = _rename(detector.kind, state, rows, what=what)
    words = int(state[_WORDS].shape[0]) if _WORDS in state else 49408
    config = detector_config(tensors, given_clip(clip_config, tower), words=words, what=what)
    config["backbone"] = _backbone(state, what)
    used = towers.blocks_used(config["clip"]["vision"]["num_hidden_layers"], VISION_LAYER)
    fates = [drop_above(fate, used) for fate in fates]
    kept = {fate.to for fate in fates if fate.to is not None}
    return Conversion(
        kind=detector.kind,
        config=config,
        tensors={key: tensors[key] for key in sorted(kept)},
        fates=_by_file(fates, detector, tower, bool(own)),
        sources=[describe_source(s) for s in (detector, tower) if s is not None],
        rows=rows,
        head=_head(detector),
    )


def given_clip(path: Path | None, tower: Source | None) -> dict[str, dict[str, Any]]:
    """The CLIP settings the user gave, or those in the folder the tower came from."""
    if path is not None or tower is None or not tower.file.config:
        return towers.read_clip_config(path)
    part = tower.file.config.get("vision_config", tower.file.config)
    return {"vision": part} if part.get("model_type") == "clip_vision_model" else {}


def _head(detector: Source) -> PublishedHead:
    needed = (
        "output.weight",
        "output.bias",
        *(reference.FOLDED if detector.kind[-1] == "A" else ()),
    )
    state = {key: detector.state[key].load() for key in needed}
    constant = None
    if detector.kind[-1] == "A":
        constant = state["clip_text_alpha"] * reference.bridge_constant(state)
    return PublishedHead(state["output.weight"], state["output.bias"], constant)


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


def detector_config(
    tensors: Mapping[str, torch.Tensor] | Mapping[str, StoredTensor],
    given: Mapping[str, dict[str, Any]],
    *,
    words: int,
    what: str,
) -> dict[str, Any]:
    """The content of ``config.json`` for a published detector with densenet121.

    Args:
        tensors: By our names.
        given: The ``vision`` and ``text`` settings of its CLIP model, as far as they were given.
        words: Size of the CLIP vocabulary; nothing is looked up in it.
        what: The file, for messages.

    Raises:
        CheckpointError: A tensor is missing, or a size cannot be read or contradicts ``given``.
    """
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
        clip["text"] = towers.text_fields(parts["text"], given.get("text"), words=words, what=what)
    for key in ("vision_proj.0.weight", *(("forgery_prompt.tokens",) if mapped else ())):
        if key not in tensors or len(tensors[key].shape) < 2:
            raise CheckpointError(f"{what} lacks its tensor '{key}', or it is misshapen.")
    return {
        "architectures": ["Detector"],
        "model_type": "m2f2_detector",
        "backbone": "densenet121",
        "backbone_kwargs": {},
        "clip": clip,
        "hidden_size": int(tensors["vision_proj.0.weight"].shape[0]),
        "prompt_tokens": int(tensors["forgery_prompt.tokens"].shape[1]) if mapped else 0,
        "vision_layer": VISION_LAYER,
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


def drop_above(fate: Fate, used: int) -> Fate:
    """Drop the vision blocks that do not feed the hidden state in use."""
    name = (fate.to or "").removeprefix("clip.vision.")
    parts = name.split(".")
    above = name.startswith("post_layernorm.") or (
        name.startswith("encoder.layers.") and int(parts[2]) >= used
    )
    return replace(fate, action="dropped", to=None, why=ABOVE) if above else fate


def require_equal(
    own: Mapping[str, StoredTensor], other: Mapping[str, StoredTensor], first: Path, second: Path
) -> None:
    """Refuse a tower beside another one of other values.

    Args:
        own: The tower that a model brings.
        other: The one that was given with it, under the same names; it may hold more.
        first: The model's file.
        second: The tower's file.

    Raises:
        UsageError: Names the first tensor that differs.
    """
    for key, stored in own.items():
        twin = other.get(key)
        if twin is None or twin.shape != stored.shape or streams.largest_difference(
            streams.from_stored(twin), streams.from_stored(stored)
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
        *(Fate(key, "dropped", None, TRAINING) for key in detector.others),
    ]
    if tower is not None:
        by_key = {f.key.removeprefix("clip_vision_encoder.model."): f for f in fates}
        sorted_fates[str(tower.file.path)] = [
            *(
                Fate(key_in_file(tower, key), "dropped", None, SAME_TOWER)
                if own
                else replace(by_key[key], key=key_in_file(tower, key))
                for key in tower.state
            ),
            *(Fate(key, "dropped", None, NO_TOWER) for key in tower.others),
        ]
    return sorted_fates


def key_in_file(tower: Source, key: str) -> str:
    """A tower's key as it stands in its file."""
    return tower.prefix + key.removeprefix("vision_model.")


def describe_source(source: Source) -> dict[str, Any]:
    """What ``stage.json`` says of a file."""
    return describe_file(source.file) | {"kind": source.kind}


def describe_file(file: Weights) -> dict[str, Any]:
    """Name, kind, layout and SHA-256 of a file or of the files of a folder."""
    digests = {path.name: sha256_of(path) for path in file.files}
    alone = file.path.is_file()
    return {
        "file": file.path.resolve().name,
        "sha256": digests[file.path.name] if alone else digests,
        "kind": file.kind,
        "layout": file.layout,
        "foreign": list(file.foreign),
    }
