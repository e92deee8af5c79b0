"""The kinds of weights there are, told apart by the names of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from m2f2cli.checkpoints import reference

UNKNOWN = "unknown weights"
DETECTOR = "detector"
OUR_EXPLAINER = "explainer"
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

_TOWER = "the CLIP vision tower (config.json names where it comes from)"
_DETECTOR_A: tuple[tuple[str, str], ...] = (
    ("clip_vision_encoder.", "the CLIP vision tower (give its file to m2f2 import as well)"),
    ("deepfake_encoder.", "the backbone"),
    ("deepfake_proj.", "the backbone's projection"),
    ("vision_proj.", "the vision projection"),
    ("output.", "the head"),
)
NEEDED: Mapping[str, tuple[tuple[str, str], ...]] = {
    DETECTOR_A: _DETECTOR_A,
    DETECTOR_B: (*_DETECTOR_A, ("text_proj.", "the text projection")),
    EXPLAINER: (
        ("model.embed_tokens.", "the word embeddings"),
        ("lm_head.", "the language model's head"),
        ("model.mm_projector.", "the vision projector"),
        ("model.vision_tower.", "the CLIP vision tower (give its file to m2f2 import as well)"),
        ("deepfake_encoder.", "the detector"),
        ("deepfake_projector.", "the detector's projector"),
    ),
    LLAVA: (("lm_head.", "the language model's head"), ("model.vision_tower.", _TOWER)),
    LLAVA_HF: (("vision_tower.|model.vision_tower.", "the CLIP vision tower"),),
}
"""What each kind must hold, as beginnings of names, and in which words it is missed."""


def kind_of(keys: Iterable[str]) -> str:
    """Name the kind of weights with these tensor names."""
    text = [key.removeprefix("module.") for key in keys]
    for kind, fits in _RULES:
        if fits(text):
            return kind
    return UNKNOWN


def kind_of_folder(
    config: Mapping[str, Any],
    stage: Mapping[str, Any],
    keys: Iterable[str],
    files: Iterable[str],
) -> str:
    """Name the kind of a folder.

    Args:
        config: Its ``config.json`` or ``adapter_config.json``.
        stage: Its ``stage.json``.
        keys: The names of its tensors.
        files: The names of its weight files.
    """
    names = set(files)
    if "peft_type" in config:
        return STAGE_3 if "non_lora_trainables.bin" in names else PEFT
    if "delta.safetensors" in names and stage:
        return DELTA
    kind = kind_of(keys)
    return _BY_TYPE.get(str(config.get("model_type")), UNKNOWN) if kind == UNKNOWN else kind


def missing_parts(kind: str, keys: Iterable[str]) -> list[str]:
    """The parts that weights of a kind lack, in words."""
    names = list(keys)
    prefix = ""
    if kind in (DETECTOR_A, DETECTOR_B):
        mark = "clip_vision_alpha"
        prefix = next((k.removesuffix(mark) for k in names if k.endswith(mark)), "")
    return [
        words
        for begins, words in NEEDED.get(kind, ())
        if not any(name.startswith(prefix + b) for b in begins.split("|") for name in names)
    ]


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
    (OUR_EXPLAINER, _has("^language_model.", "^forgery_projector.", "^detector.")),
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
_BY_TYPE = {
    "m2f2_detector": DETECTOR,
    "m2f2_explainer": OUR_EXPLAINER,
    "clip": CLIP,
    "clip_vision_model": TOWER,
    "llava": LLAVA_HF,
}
