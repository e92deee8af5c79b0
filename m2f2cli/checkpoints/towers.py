"""The sizes of a CLIP tower, read off its tensors.

What tensors cannot tell (the number of attention heads, the activation, the epsilon) comes from
the known towers or from a CLIP configuration file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from m2f2cli.checkpoints.store import read_json
from m2f2cli.errors import CheckpointError


class Shaped(Protocol):
    """Anything with a shape: a tensor, or one still on disk."""

    @property
    def shape(self) -> Any:
        """The sizes."""


# OpenAI's towers: (width, blocks, inner width, patch) -> heads.
_VISION_HEADS: dict[tuple[int, ...], int] = {
    (1024, 24, 4096, 14): 16,  # ViT-L/14 and ViT-L/14-336
    (768, 12, 3072, 16): 12,  # ViT-B/16
    (768, 12, 3072, 32): 12,  # ViT-B/32
}
_TEXT_HEADS: dict[tuple[int, ...], int] = {
    (768, 12, 3072): 12,
    (512, 12, 2048): 8,
}  # of ViT-L, of ViT-B
# What a CLIP configuration file means when it leaves these out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision": {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "text": {"num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
_PART_TYPES = ("clip_vision_model", "clip_text_model")


def read_clip_config(path: Path | None) -> dict[str, dict[str, Any]]:
    """Read the ``vision`` and ``text`` settings of a CLIP configuration.

    Args:
        path: A transformers CLIP ``config.json`` (or the folder that holds it): a whole model's,
            or a vision or text model's alone. None gives nothing.

    Raises:
        CheckpointError: The file is missing or no CLIP configuration.
    """
    if path is None:
        return {}
    content = read_json(path / "config.json" if path.is_dir() else path)
    parts = {
        part: content[name]
        for part in ("vision", "text")
        for name in (part, f"{part}_config")
        if isinstance(content.get(name), dict)
    }
    kind = content.get("model_type")
    if not parts and kind in _PART_TYPES:
        parts = {"vision" if kind == "clip_vision_model" else "text": content}
    if not parts:
        raise CheckpointError(
            f"'{path}' is no CLIP configuration: it has neither vision_config nor text_config.",
            "Give the config.json of the CLIP model, such as openai/clip-vit-large-patch14-336's.",
        )
    return parts


def vision_fields(
    tensors: Mapping[str, Shaped], given: Mapping[str, Any] | None, *, what: str
) -> dict[str, Any]:
    """The fields of a vision tower's configuration.

    Args:
        tensors: Its tensors, named as in transformers' ``CLIPVisionTransformer``.
        given: The ``vision`` part of a CLIP configuration.
        what: The file, for messages.

    Raises:
        CheckpointError: A size cannot be read, contradicts ``given``, or needs it.
    """
    patches = _shape(tensors, "embeddings.patch_embedding.weight", what, dims=4)
    positions = _shape(tensors, "embeddings.position_embedding.weight", what, dims=2)
    grid = math.isqrt(positions[0] - 1)
    if grid * grid + 1 != positions[0]:
        raise CheckpointError(
            f"The vision tower of {what} has {positions[0]} positions, which is no square grid "
            "and a class token."
        )
    fields = {
        **_blocks(tensors, what),
        "hidden_size": patches[0],
        "num_channels": patches[1],
        "patch_size": patches[2],
        "image_size": grid * patches[2],
    }
    shape = (*(fields[name] for name in _SIZES), fields["patch_size"])
    return _complete("vision", fields, given, heads=_VISION_HEADS.get(shape), what=what)


def text_fields(
    tensors: Mapping[str, Shaped], given: Mapping[str, Any] | None, *, words: int, what: str
) -> dict[str, Any]:
    """The fields of a text tower's configuration.

    Args:
        tensors: Its tensors, named as in transformers' ``CLIPTextTransformer``.
        given: The ``text`` part of a CLIP configuration.
        words: Size of the vocabulary; nothing is looked up in it.
        what: The file, for messages.

    Raises:
        CheckpointError: A size cannot be read, contradicts ``given``, or needs it.
    """
    positions = _shape(tensors, "embeddings.position_embedding.weight", what, dims=2)
    fields = {
        **_blocks(tensors, what),
        "hidden_size": positions[1],
        "max_position_embeddings": positions[0],
        "vocab_size": words,
    }
    shape = tuple(fields[name] for name in _SIZES)
    return _complete("text", fields, given, heads=_TEXT_HEADS.get(shape), what=what)


_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size")


def _blocks(tensors: Mapping[str, Shaped], what: str) -> dict[str, int]:
    numbers = {
        int(key.split(".")[2])
        for key in tensors
        if key.startswith("encoder.layers.") and key.split(".")[2].isdecimal()
    }
    if not numbers or numbers != set(range(len(numbers))):
        missing = sorted(set(range(max(numbers, default=0) + 1)) - numbers)
        raise CheckpointError(f"A CLIP tower of {what} lacks its blocks {missing}.")
    inner = _shape(tensors, "encoder.layers.0.mlp.fc1.weight", what, dims=2)
    return {"num_hidden_layers": len(numbers), "intermediate_size": inner[0]}


def _shape(tensors: Mapping[str, Shaped], key: str, what: str, *, dims: int) -> tuple[int, ...]:
    if key not in tensors:
        raise CheckpointError(f"A CLIP tower of {what} lacks its tensor '{key}'.")
    shape = tuple(int(n) for n in tensors[key].shape)
    if len(shape) != dims or not all(shape):
        raise CheckpointError(f"'{key}' of {what} has the shape {list(shape)}.")
    return shape


def _complete(
    part: str,
    fields: dict[str, Any],
    given: Mapping[str, Any] | None,
    *,
    heads: int | None,
    what: str,
) -> dict[str, Any]:
    if given is None:
        if heads is None:
            raise CheckpointError(
                f"The {part} tower of {what} is none of the known ones (width "
                f"{fields['hidden_size']}, {fields['num_hidden_layers']} blocks), so its number of "
                "attention heads is unknown.",
                "Add --clip-config FILE with the CLIP model's config.json.",
            )
        return {**fields, **_DEFAULTS[part], "num_attention_heads": heads}
    for name, value in fields.items():
        if name in given and given[name] != value and name != "vocab_size":
            raise CheckpointError(
                f"The CLIP configuration says {part} {name} {given[name]}, but {what} has {value}.",
                "Give the configuration of the CLIP model this file was made with.",
            )
    chosen = {name: given.get(name, default) for name, default in _DEFAULTS[part].items()}
    if fields["hidden_size"] % int(chosen["num_attention_heads"]):
        raise CheckpointError(
            f"{chosen['num_attention_heads']} heads do not divide the {part} tower's width "
            f"{fields['hidden_size']}.",
            "Correct num_attention_heads in the CLIP configuration.",
        )
    return {**fields, **chosen}


def blocks_used(blocks: int, layer: int) -> int:
    """How many of a tower's blocks feed hidden state ``layer`` (negative counts from the last)."""
    return layer if layer >= 0 else blocks + 1 + layer
