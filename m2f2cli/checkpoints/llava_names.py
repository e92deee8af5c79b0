"""The names of an explainer's tensors in the layouts of LLaVA, of the published explainer and ours.

Literal tables in the form of ``reference``: (their pattern, our name or None, why it is dropped).
The CLIP tower of a LLaVA becomes the detector's own: an explainer runs one tower for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from m2f2cli.checkpoints import reference
from m2f2cli.checkpoints.reference import Fate, Row

DETECTOR = "detector."
TOWER = "detector.clip.vision."
LANGUAGE = "language_model."
VISION_PROJECTOR = "mm_projector."
FORGERY_PROJECTOR = "forgery_projector."

_ROTARY = "rotary frequencies: computed from the configuration"
_POSITION_IDS = "a constant (0, 1, 2, …), not a weight"

# LLaVA's own layout (liuhaotian/llava-v1.5-*): LLaMA's names, the picture's parts inside "model.".
_LLAMA: tuple[Row, ...] = (
    ("model.layers.#.self_attn.rotary_emb.inv_freq", None, _ROTARY),
    ("model.layers.#.{}", "language_model.model.layers.#.{}", ""),
    ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight", ""),
    ("model.norm.weight", "language_model.model.norm.weight", ""),
    ("lm_head.weight", "language_model.lm_head.weight", ""),
)
_PROJECTOR: tuple[Row, ...] = (
    ("model.mm_projector.0.{}", "mm_projector.0.{}", ""),
    ("model.mm_projector.2.{}", "mm_projector.2.{}", ""),
)
_TOWER = "model.vision_tower.vision_tower.vision_model."
_VISION: tuple[Row, ...] = (
    (f"{_TOWER}embeddings.position_ids", None, _POSITION_IDS),
    (f"{_TOWER}{{}}", "detector.clip.vision.{}", ""),
)
ORIGINAL: tuple[Row, ...] = (*_LLAMA, *_PROJECTOR, *_VISION)

# The published explainer adds its detector (without a tower of its own) and its projector.
_FORGERY: tuple[Row, ...] = (
    ("deepfake_projector.0.{}", "forgery_projector.0.{}", ""),
    ("deepfake_projector.2.{}", "forgery_projector.2.{}", ""),
)
_DETECTOR: tuple[Row, ...] = tuple(
    (f"deepfake_encoder.{theirs}", None if ours is None else f"detector.{ours}", why)
    for theirs, ours, why in reference.table("B", "densenet121")
)
PUBLISHED: tuple[Row, ...] = (*ORIGINAL, *_FORGERY, *_DETECTOR)

# Hugging Face's layout (llava-hf/llava-1.5-*): as transformers 4 saves it and, for the tower, as
# transformers 5 does; then as both name it in memory.
_HF_VISION = (
    "vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
)
HUGGING_FACE: tuple[Row, ...] = (
    ("language_model.model.layers.#.self_attn.rotary_emb.inv_freq", None, _ROTARY),
    ("language_model.model.layers.#.{}", "language_model.model.layers.#.{}", ""),
    ("language_model.model.embed_tokens.weight", "language_model.model.embed_tokens.weight", ""),
    ("language_model.model.norm.weight", "language_model.model.norm.weight", ""),
    ("language_model.lm_head.weight", "language_model.lm_head.weight", ""),
    ("model.language_model.layers.#.{}", "language_model.model.layers.#.{}", ""),
    ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight", ""),
    ("model.language_model.norm.weight", "language_model.model.norm.weight", ""),
    ("lm_head.weight", "language_model.lm_head.weight", ""),
    ("multi_modal_projector.linear_1.{}", "mm_projector.0.{}", ""),
    ("multi_modal_projector.linear_2.{}", "mm_projector.2.{}", ""),
    ("model.multi_modal_projector.linear_1.{}", "mm_projector.0.{}", ""),
    ("model.multi_modal_projector.linear_2.{}", "mm_projector.2.{}", ""),
    *((f"{begin}embeddings.position_ids", None, _POSITION_IDS) for begin in _HF_VISION),
    *((f"{begin}{{}}", "detector.clip.vision.{}", "") for begin in _HF_VISION),
)

# What PEFT and the published training scripts put before every name of a delta.
DELTA_PREFIX = "base_model.model."


def look_up(keys: Iterable[str], rows: Sequence[Row], *, what: str) -> list[Fate]:
    """What becomes of each key of an explainer or a LLaVA.

    Args:
        keys: As they stand in the files.
        rows: ``ORIGINAL``, ``PUBLISHED`` or ``HUGGING_FACE``.
        what: The file or folder, for the message.

    Raises:
        CheckpointError: A key is in no row, or two keys mean the same tensor.
    """
    found = reference.fates(keys, rows, what=what, kind="model")
    reference.refuse_twins(found, what=what)
    return found


def module_of(name: str, rows: Sequence[Row] = PUBLISHED) -> str | None:
    """Our name of a published module, such as ``model.layers.0.mlp.up_proj``.

    Args:
        name: The module's path, without a parameter's name.
        rows: The table.

    Returns:
        Our module's path, or None where its weight is dropped.

    Raises:
        CheckpointError: The module is in no row.
    """
    weight = reference.fates([f"{name}.weight"], rows, what="The adapter", kind="model")[0].to
    return weight.removesuffix(".weight") if weight else None
