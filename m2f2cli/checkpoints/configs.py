"""``config.json`` of detectors and explainers, read off tensors and the configurations beside them.

Sizes come from the tensors and must agree with what a configuration says. What tensors cannot tell
(attention heads, activations, epsilons) comes from the configuration or the known models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2f2cli.checkpoints import io, keymaps
from m2f2cli.checkpoints.keymaps import Tensor
from m2f2cli.errors import CheckpointError
from m2f2cli.files import json_bytes, read_json
from m2f2cli.models.detector import CLIP_MEAN, CLIP_STD

# The published detectors and LLaVA-1.5 read CLIP's hidden state before the last.
VISION_LAYER = -2
_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size")
# OpenAI's towers: (width, blocks, inner width) -> heads.
_HEADS: dict[str, dict[tuple[int, ...], int]] = {
    "vision": {(1024, 24, 4096): 16, (768, 12, 3072): 12},  # ViT-L/14, and ViT-B/16 and /32
    "text": {(768, 12, 3072): 12, (512, 12, 2048): 8},  # of ViT-L, of ViT-B
}
_PATCHES = {1024: (14,), 768: (16, 32)}
# What a CLIP configuration file means when it leaves these out.
_CLIP_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision": {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "text": {"num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
# What transformers' LlamaConfig means when a field is left out.
_LLAMA_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_INCOMPLETE = "The file or folder is incomplete; m2f2 info PATH says what it lacks."
_LANGUAGE_MODELS = ("llama", "llava", "llava_llama")
# How LLaVA-1.5 shows its language model a picture, in the fields of both layouts.
_LLAVA_PICTURES: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "projector_hidden_act": ("gelu",),
    "mm_vision_select_layer": (-2,),
    "vision_feature_layer": (-2,),
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "vision_feature_select_strategy": ("default",),
    "mm_use_im_start_end": (False,),
}


def read_clip_config(path: Path | None) -> dict[str, dict[str, Any]]:
    """Read the ``vision`` and ``text`` settings of a CLIP configuration.

    ``path`` is a transformers CLIP ``config.json`` (or the folder that holds it), of a whole model
    or of a vision or text model alone; None gives nothing.

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
    alone = {"clip_vision_model": "vision", "clip_text_model": "text"}
    if not parts and content.get("model_type") in alone:
        parts = {alone[content["model_type"]]: content}
    if not parts:
        raise CheckpointError(
            f"'{path}' is no CLIP configuration: it has neither vision_config nor text_config.",
            "Give the config.json of the CLIP model, such as openai/clip-vit-large-patch14-336's.",
        )
    return parts


def detector_config(
    tensors: Mapping[str, Any],
    given: Mapping[str, dict[str, Any]],
    *,
    backbone: str,
    words: int,
    what: str,
) -> dict[str, Any]:
    """The content of ``config.json`` for a published detector.

    Args:
        tensors: Anything with ``shape`` and ``dtype``, by our names.
        given: The ``vision`` and ``text`` settings of its CLIP model, as far as they were given.
        backbone: timm's name of its backbone.
        words: Size of the CLIP vocabulary; nothing is looked up in it.
        what: The file, for messages.

    Raises:
        CheckpointError: A tensor is missing, or a size cannot be read or contradicts ``given``.
    """
    vision = _vision_fields(below("clip.vision.", tensors), given.get("vision"), what=what)
    clip: dict[str, Any] = {"library": "transformers", "vision": vision}
    text = below("clip.text.", tensors)
    if text:
        clip["text"] = _text_fields(text, given.get("text"), words=words, what=what)
    return {
        "architectures": ["Detector"],
        "model_type": "m2f2_detector",
        "backbone": backbone,
        "backbone_kwargs": {},
        "clip": clip,
        "hidden_size": _shape(tensors, "vision_proj.0.weight", what)[0],
        "prompt_tokens": _shape(tensors, "forgery_prompt.tokens", what, 3)[1] if text else 0,
        "vision_layer": VISION_LAYER,
        "forgery_map": bool(text),
        "bridge": None,
        "image_size": vision["image_size"],
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "crop": {"detector": "dlib", "margin": 0.3},
        "threshold": 0.5,
        "uncertain": None,
        "score_temperature": 1.0,
        "domain": None,
        "dtype": str(tensors["vision_proj.0.weight"].dtype).removeprefix("torch."),
    }


def preprocessor_file(detector: Mapping[str, Any]) -> bytes:
    """The content of ``preprocessor_config.json`` for a detector's configuration."""
    size, mean, std = (detector[name] for name in ("image_size", "image_mean", "image_std"))
    return json_bytes(io.preprocessor_config(size, mean, std))


def below(begin: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {k.removeprefix(begin): t for k, t in tensors.items() if k.startswith(begin)}


def _vision_fields(
    tensors: Mapping[str, Any], given: Mapping[str, Any] | None, *, what: str
) -> dict[str, Any]:
    """The fields of a vision tower, named as in transformers' ``CLIPVisionTransformer``."""
    patches = _shape(tensors, "embeddings.patch_embedding.weight", f"A CLIP tower of {what}", 4)
    fields = _tower_fields(tensors, what)
    positions = fields.pop("positions")
    grid = math.isqrt(positions - 1)
    if grid * grid + 1 != positions:
        raise CheckpointError(
            f"The vision tower of {what} has {positions} positions, which is no square grid and a "
            "class token."
        )
    fields |= {
        "num_channels": patches[1],
        "patch_size": patches[2],
        "image_size": grid * patches[2],
    }
    known = patches[2] in _PATCHES.get(fields["hidden_size"], ())
    return _complete("vision", fields, given, known=known, what=what)


def _text_fields(
    tensors: Mapping[str, Any], given: Mapping[str, Any] | None, *, words: int, what: str
) -> dict[str, Any]:
    """The fields of a text tower, named as in transformers' ``CLIPTextTransformer``."""
    fields = _tower_fields(tensors, what)
    fields |= {"max_position_embeddings": fields.pop("positions"), "vocab_size": words}
    return _complete("text", fields, given, known=True, what=what)


def _tower_fields(tensors: Mapping[str, Any], what: str) -> dict[str, int]:
    what = f"A CLIP tower of {what}"
    count = _count_layers(tensors, "encoder.layers.", what)
    positions, width = _shape(tensors, "embeddings.position_embedding.weight", what)
    inner, _ = _shape(tensors, "encoder.layers.0.mlp.fc1.weight", what)
    return {
        "num_hidden_layers": count,
        "intermediate_size": inner,
        "hidden_size": width,
        "positions": positions,
    }


def _count_layers(tensors: Mapping[str, Any], begin: str, what: str) -> int:
    """How many layers there are, numbered from 0 without a gap."""
    numbers = {k.removeprefix(begin).split(".")[0] for k in tensors if k.startswith(begin)}
    if missing := {str(n) for n in range(max(1, len(numbers)))} - numbers:
        raise CheckpointError(f"{what} lacks its layers {sorted(map(int, missing))}.", _INCOMPLETE)
    return len(numbers)


def _shape(tensors: Mapping[str, Any], key: str, what: str, dims: int = 2) -> tuple[int, ...]:
    shape = tuple(int(n) for n in tensors[key].shape) if key in tensors else ()
    if len(shape) != dims or not all(shape):
        raise CheckpointError(f"{what} lacks its tensor '{key}', or it is misshapen.", _INCOMPLETE)
    return shape


def _complete(
    part: str, fields: dict[str, Any], given: Mapping[str, Any] | None, *, known: bool, what: str
) -> dict[str, Any]:
    if given is None:
        heads = _HEADS[part].get(tuple(fields[name] for name in _SIZES)) if known else None
        if heads is None:
            raise CheckpointError(
                f"The {part} tower of {what} is none of the known ones (width "
                f"{fields['hidden_size']}, {fields['num_hidden_layers']} blocks), so its number of "
                "attention heads is unknown.",
                "Add --clip-config FILE with the CLIP model's config.json.",
            )
        return {**fields, **_CLIP_DEFAULTS[part], "num_attention_heads": heads}
    for name, value in fields.items():
        if name in given and given[name] != value and name != "vocab_size":
            raise CheckpointError(
                f"The CLIP configuration says {part} {name} {given[name]}, but {what} has {value}.",
                "Give the configuration of the CLIP model this file was made with.",
            )
    chosen = {name: given.get(name, default) for name, default in _CLIP_DEFAULTS[part].items()}
    if fields["hidden_size"] % int(chosen["num_attention_heads"]):
        raise CheckpointError(
            f"{chosen['num_attention_heads']} heads do not divide the {part} tower's width "
            f"{fields['hidden_size']}.",
            "Correct num_attention_heads in the CLIP configuration.",
        )
    return {**fields, **chosen}


def explainer_config(
    *, detector: Mapping[str, Any], text: Mapping[str, Any], aspect: str, dtype: str
) -> dict[str, Any]:
    """The content of an explainer's ``config.json``.

    From a detector's content, the language model's fields, how it sees a picture that is not square
    (``pad`` or ``square``), and the type most values have.
    """
    left_out = ("architectures", "dtype", "transformers_version")
    return {
        "architectures": ["Explainer"],
        "model_type": "m2f2_explainer",
        "detector_config": {k: v for k, v in detector.items() if k not in left_out},
        "text_config": dict(text),
        "template": "vicuna_v1",
        "image_aspect": aspect,
        "image_token_id": -200,
        "deepfake_token_id": -300,
        "dtype": dtype,
    }


def llava_aspect(config: Mapping[str, Any], kind: str) -> str:
    """What a LLaVA's tower sees of a picture that is not square: ``pad`` or ``square``.

    LLaVA's own code cuts out the centre unless the configuration says ``pad``; LLaVA-1.5 was
    trained with ``pad``, which is what a Hugging Face folder, that does not say, is taken for.
    """
    said = config.get("image_aspect_ratio")
    return "pad" if kind == keymaps.LLAVA_HF or said == "pad" else "square"


def llama_config(
    config: Mapping[str, Any], tensors: dict[str, Any], *, what: str
) -> dict[str, Any]:
    """The language model's settings, in the fields of transformers' ``LlamaConfig``.

    ``config`` is that of a LLaVA or a published explainer; ``tensors`` anything with a shape, by
    our names. A model whose head is its word embeddings gets a head of its own in ``tensors``.

    Raises:
        CheckpointError: There is no configuration, it is no LLaMA or no LLaVA-1.5, a tensor is
            missing, or the two disagree.
    """
    if not config:
        raise CheckpointError(
            f"{what} has no config.json, so its language model is unknown.",
            "Copy or download the file into the folder.",
        )
    for name, values in _LLAVA_PICTURES.items():
        if name in config and config[name] not in values:
            raise CheckpointError(
                f"{what} says {name} {config[name]} in its config.json; LLaVA-1.5 has {values[0]}.",
                "Give a LLaVA-1.5 model; others show pictures in another way.",
            )
    fields = config.get("text_config", config)
    kind = fields.get("model_type", "llama")
    if kind not in _LANGUAGE_MODELS:
        raise CheckpointError(
            f"The language model of {what} is of type '{kind}', not of the LLaMA family.",
            "Give a LLaVA-1.5 that is built on LLaMA or Vicuna.",
        )
    words, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    if fields.get("tie_word_embeddings", False) and words in tensors:
        tensors.setdefault(head, tensors[words])
    sizes = _llama_sizes(fields, tensors, what)
    for name, value in sizes.items():
        if fields.get(name) not in (None, value):
            raise CheckpointError(
                f"{what} says {name} {fields[name]} in its config.json, but its tensors have "
                f"{value}.",
                "The folder is put together from two models; copy or download it again.",
            )
    return {
        "model_type": "llama",
        **{name: fields.get(name, value) for name, value in _LLAMA_DEFAULTS.items()},
        **sizes,
        "rope_parameters": _rope(fields),
        "tie_word_embeddings": False,
    }


def _llama_sizes(
    fields: Mapping[str, Any], tensors: Mapping[str, Any], what: str
) -> dict[str, Any]:
    tensors, what = below("language_model.model.", tensors), f"The language model of {what}"
    layers = _count_layers(tensors, "layers.", what)
    words, width = _shape(tensors, "embed_tokens.weight", what)
    queries, _ = _shape(tensors, "layers.0.self_attn.q_proj.weight", what)
    keys, _ = _shape(tensors, "layers.0.self_attn.k_proj.weight", what)
    heads = int(fields.get("num_attention_heads", _LLAMA_DEFAULTS["num_attention_heads"]))
    if heads < 1 or queries % heads or keys % (queries // heads):
        raise CheckpointError(
            f"{heads} attention heads do not divide {what[0].lower()}{what[1:]} (queries of width "
            f"{queries}, keys of width {keys}).",
            "Correct num_attention_heads in its config.json.",
        )
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, "layers.0.mlp.up_proj.weight", what)[0],
        "num_hidden_layers": layers,
        "num_key_value_heads": keys // (queries // heads),
        "head_dim": queries // heads,
        "attention_bias": "layers.0.self_attn.q_proj.bias" in tensors,
        "mlp_bias": "layers.0.mlp.up_proj.bias" in tensors,
    }


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions as transformers 5 writes them, from its fields or those before it."""
    if given := fields.get("rope_parameters"):
        return dict(given)
    scaling = dict(fields.get("rope_scaling") or {})
    kind = scaling.pop("type", None)
    return {
        "rope_theta": fields.get("rope_theta", 10000.0),
        "rope_type": scaling.pop("rope_type", kind or "default"),
        **scaling,
    }
