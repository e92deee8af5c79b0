"""The published explainer in our configuration and names, every key accounted for.

Its tensors stay on disk: what is made here are streams, so memory does not grow with the model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from m2f2cli.checkpoints import importer, llava, llava_names, reference, streams, towers
from m2f2cli.checkpoints.assembling import explainer_config
from m2f2cli.checkpoints.folders import Weights
from m2f2cli.checkpoints.importer import Conversion, Source
from m2f2cli.checkpoints.reference import Fate
from m2f2cli.checkpoints.tensorfile import StoredTensor
from m2f2cli.errors import CheckpointError

KIND = "published explainer"
_CLASS = f"{llava_names.TOWER}embeddings.class_embedding"
_WORDS = "deepfake_encoder.clip_text_encoder.model.text_model.embeddings.token_embedding.weight"


def convert(
    source: Weights, tower: Weights | None = None, *, clip_config: Path | None = None
) -> Conversion:
    """Turn the published merged explainer into one of ours.

    Args:
        source: Its folder.
        tower: A file or folder that brings the CLIP vision tower, where the explainer does not.
        clip_config: A CLIP ``config.json`` for towers that are none of the known ones.

    Raises:
        CheckpointError: It is incomplete, holds an unknown tensor, or lacks its tower.
        UsageError: Both bring a tower and they differ.
    """
    what = f"'{source.path}'"
    if not source.config:
        raise CheckpointError(
            f"{what} has no config.json, so its language model is unknown.",
            "Give the published folder with its config.json and tokeniser.",
        )
    llava.refuse_other_pictures(source.config, what)
    fates = llava_names.look_up(source.tensors, llava_names.PUBLISHED, what=what)
    tensors = {f.to: source.tensors[f.key] for f in fates if f.to is not None}
    own = _CLASS in tensors
    other = importer.recognise_tower(tower) if tower is not None else None
    if not own and other is None:
        raise CheckpointError(
            f"{what} comes without its CLIP vision tower "
            f"({source.config.get('mm_vision_tower', 'named in its config.json')}).",
            "Download openai/clip-vit-large-patch14-336 and give its folder as well: "
            "m2f2 import EXPLAINER CLIP-FOLDER --output DIR.",
        )
    if other is not None:
        tower_fates = _tower_fates(other)
        brought = {f.to: other.state[f.key] for f in tower_fates if f.to is not None}
        if own:
            mine = {k: t for k, t in tensors.items() if k.startswith(llava_names.TOWER)}
            importer.require_equal(mine, brought, source.path, other.file.path)
        else:
            tensors |= brought
    llava.untie(tensors, source.config)
    config = _config(source, tensors, other, clip_config)
    vision = config["detector_config"]["clip"]["vision"]
    used = towers.blocks_used(vision["num_hidden_layers"], importer.VISION_LAYER)
    fates = [_drop_above(fate, used) for fate in fates]
    dropped = _above(tensors, used)
    by_file = {str(source.path): fates}
    if other is not None:
        by_file[str(other.file.path)] = _other_fates(other, tower_fates, used, own)
    return Conversion(
        kind=KIND,
        config=config,
        tensors={k: streams.from_stored(tensors[k]) for k in sorted(tensors) if k not in dropped},
        fates=by_file,
        sources=[importer.describe_source(other)] if other is not None else [],
        rows=llava_names.PUBLISHED,
    )


def _config(
    source: Weights,
    tensors: dict[str, StoredTensor],
    tower: Source | None,
    clip_config: Path | None,
) -> dict[str, Any]:
    what = f"'{source.path}'"
    begin = llava_names.DETECTOR
    words = source.tensors.get(_WORDS)
    detector = importer.detector_config(
        {k.removeprefix(begin): t for k, t in tensors.items() if k.startswith(begin)},
        importer.given_clip(clip_config, tower),
        words=int(words.shape[0]) if words is not None else 49408,
        what=what,
    )
    text = llava.text_config(source.config, tensors, what)
    return explainer_config(
        detector=detector,
        text=text,
        aspect=llava.aspect(source),
        dtype=tensors["language_model.model.embed_tokens.weight"].dtype,
    )


def _tower_fates(tower: Source) -> list[Fate]:
    """What becomes of the keys of a tower from elsewhere, under ``vision_model.``."""
    rows: tuple[reference.Row, ...] = (
        ("vision_model.embeddings.position_ids", None, "a constant (0, 1, 2, …), not a weight"),
        ("vision_model.{}", f"{llava_names.TOWER}{{}}", ""),
    )
    return reference.fates(tower.state, rows, what=f"'{tower.file.path}'", kind="tower")


def _other_fates(tower: Source, fates: list[Fate], used: int, own: bool) -> list[Fate]:
    """The same, as keys stand in the file, once it is known what the explainer needs."""
    found = []
    for fate in fates:
        fate = _drop_above(fate, used)
        if own and fate.to is not None:
            fate = replace(fate, action="dropped", to=None, why=importer.SAME_TOWER)
        found.append(replace(fate, key=importer.key_in_file(tower, fate.key)))
    return found + [Fate(key, "dropped", None, importer.NO_TOWER) for key in tower.others]


def _drop_above(fate: Fate, used: int) -> Fate:
    if fate.to is None or not fate.to.startswith(llava_names.TOWER):
        return fate
    inside = replace(fate, to=fate.to.removeprefix(llava_names.DETECTOR))
    return fate if importer.drop_above(inside, used).to is not None else replace(
        fate, action="dropped", to=None, why=importer.ABOVE
    )  # fmt: skip


def _above(tensors: dict[str, StoredTensor], used: int) -> set[str]:
    """The tower's tensors above the hidden state in use."""
    return {key for key in tensors if _drop_above(Fate(key, "mapped", key), used).to is None}
