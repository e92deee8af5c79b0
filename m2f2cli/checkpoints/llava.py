"""LLaVA-1.5 as a base of an explainer: layout, the language model's sizes, picture settings.

Both layouts are read: LLaVA's own (``model_type`` llava or llava_llama) and Hugging Face's
(``llava``). Sizes are read off the tensors and must agree with ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m2f2cli.checkpoints import kinds, llava_names
from m2f2cli.checkpoints.folders import Weights
from m2f2cli.checkpoints.reference import Fate, Row
from m2f2cli.checkpoints.tensorfile import StoredTensor
from m2f2cli.errors import CheckpointError

# What transformers' LlamaConfig means when a field is left out.
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LANGUAGE_MODELS = ("llama", "llava", "llava_llama")
# The vision towers that LLaVA's configurations name: (width, side of the picture).
_TOWERS = {
    "openai/clip-vit-large-patch14-336": (1024, 336),
    "openai/clip-vit-large-patch14": (1024, 224),
}
_IMPORT = {
    kinds.EXPLAINER: "It is an explainer already: m2f2 import DIR --output DIR.",
    kinds.OUR_EXPLAINER: "It is an explainer already; nothing is to be initialised.",
    kinds.DETECTOR: "Give it as --detector, and the LLaVA model as --llava.",
    kinds.LANGUAGE: "It lacks LLaVA's projector: take liuhaotian/llava-v1.5-7b, for example.",
}


@dataclass(frozen=True)
class Base:
    """A LLaVA in our terms; the tensors are still on disk.

    Args:
        weights: Its folder.
        tensors: By our names.
        fates: What becomes of each of its keys.
        text_config: The language model, in the fields of ``LlamaConfig``.
        image_aspect: What its tower sees of a picture that is not square: ``pad`` or ``square``.
    """

    weights: Weights
    tensors: dict[str, StoredTensor]
    fates: list[Fate]
    text_config: dict[str, Any]
    image_aspect: str

    @property
    def tower(self) -> dict[str, StoredTensor]:
        """Its CLIP vision tower by the tower's own names; empty where it brings none."""
        begin = llava_names.TOWER
        return {
            name.removeprefix(begin): stored
            for name, stored in self.tensors.items()
            if name.startswith(begin)
        }


def read_base(weights: Weights) -> Base:
    """Understand a LLaVA base.

    Raises:
        CheckpointError: It is something else, incomplete, or of a kind that cannot be used.
    """
    what = f"'{weights.path}'"
    rows: dict[str, tuple[Row, ...]] = {
        kinds.LLAVA: llava_names.ORIGINAL,
        kinds.LLAVA_HF: llava_names.HUGGING_FACE,
    }
    if weights.kind not in rows:
        raise CheckpointError(
            f"{what} is no LLaVA base but: {weights.kind}.",
            _IMPORT.get(weights.kind, "Give a folder of LLaVA-1.5, in either of its layouts."),
        )
    if not weights.config:
        raise CheckpointError(
            f"{what} has no config.json, so its language model is unknown.",
            "Copy or download the file into the folder.",
        )
    refuse_other_pictures(weights.config, what)
    fates = llava_names.look_up(weights.tensors, rows[weights.kind], what=what)
    tensors = {f.to: weights.tensors[f.key] for f in fates if f.to is not None}
    untie(tensors, weights.config)
    return Base(
        weights, tensors, fates, text_config(weights.config, tensors, what), aspect(weights)
    )


def untie(tensors: dict[str, StoredTensor], config: Mapping[str, Any]) -> None:
    """Give a language model whose head is its word embeddings a head of its own."""
    tied = config.get("text_config", config).get("tie_word_embeddings", False)
    words, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    if tied and words in tensors:
        tensors.setdefault(head, tensors[words])


def aspect(weights: Weights) -> str:
    """What a LLaVA's tower sees of a picture that is not square.

    LLaVA's own code cuts out the centre unless the configuration says ``pad``; LLaVA-1.5 was
    trained with ``pad``, which is what a Hugging Face folder, that does not say, is taken for.
    """
    said = weights.config.get("image_aspect_ratio")
    if weights.kind == kinds.LLAVA_HF or said == "pad":
        return "pad"
    return "square"


def text_config(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], what: str
) -> dict[str, Any]:
    """The language model's settings, in the fields of transformers' ``LlamaConfig``.

    Args:
        config: ``config.json`` of a LLaVA or a published explainer.
        tensors: By our names.
        what: The folder, for messages.

    Raises:
        CheckpointError: It is no LLaMA, a tensor is missing, or the two disagree.
    """
    fields = config.get("text_config", config)
    kind = fields.get("model_type", "llama")
    if kind not in _LANGUAGE_MODELS:
        raise CheckpointError(
            f"The language model of {what} is of type '{kind}', not of the LLaMA family.",
            "Give a LLaVA-1.5 that is built on LLaMA or Vicuna.",
        )
    sizes = _sizes(fields, tensors, what)
    for name, value in sizes.items():
        if fields.get(name) not in (None, value):
            raise CheckpointError(
                f"{what} says {name} {fields[name]} in its config.json, but its tensors have "
                f"{value}.",
                "The folder is put together from two models; copy or download it again.",
            )
    chosen = {name: fields.get(name, value) for name, value in _DEFAULTS.items()}
    return {
        "model_type": "llama",
        **chosen,
        **sizes,
        "rope_parameters": _rope(fields),
        "tie_word_embeddings": False,
    }


def _sizes(
    fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor], what: str
) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        key = f"language_model.model.{name}"
        if key not in tensors or len(tensors[key].shape) != 2:
            raise CheckpointError(
                f"The language model of {what} lacks its tensor '{name}', or it is misshapen.",
                "The folder is incomplete; m2f2 info DIR says what it lacks.",
            )
        return tensors[key].shape

    begin = "language_model.model.layers."
    layers = {int(k.split(".")[3]) for k in tensors if k.startswith(begin)}
    if missing := sorted(set(range(max(layers, default=0) + 1)) - layers):
        raise CheckpointError(
            f"The language model of {what} lacks its layers {missing}.",
            "The folder is incomplete; copy or download it again.",
        )
    words, width = shape("embed_tokens.weight")
    queries, _ = shape("layers.0.self_attn.q_proj.weight")
    keys, _ = shape("layers.0.self_attn.k_proj.weight")
    heads = int(fields.get("num_attention_heads", _DEFAULTS["num_attention_heads"]))
    if heads < 1 or queries % heads or keys % (queries // heads):
        raise CheckpointError(
            f"{heads} attention heads do not divide the language model of {what} (queries of "
            f"width {queries}, keys of width {keys}).",
            "Correct num_attention_heads in its config.json.",
        )
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": shape("layers.0.mlp.up_proj.weight")[0],
        "num_hidden_layers": len(layers),
        "num_key_value_heads": keys // (queries // heads),
        "head_dim": queries // heads,
        "attention_bias": f"{begin}0.self_attn.q_proj.bias" in tensors,
        "mlp_bias": f"{begin}0.mlp.up_proj.bias" in tensors,
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


def refuse_other_pictures(config: Mapping[str, Any], what: str) -> None:
    """Refuse a LLaVA that shows its language model pictures in another way than LLaVA-1.5.

    Raises:
        CheckpointError: Names the setting.
    """
    wanted = {
        "mm_projector_type": ("mlp2x_gelu",),
        "projector_hidden_act": ("gelu",),
        "mm_vision_select_layer": (-2,),
        "vision_feature_layer": (-2,),
        "mm_vision_select_feature": ("patch", "cls_patch"),
        "vision_feature_select_strategy": ("default",),
        "mm_use_im_start_end": (False,),
    }
    for name, values in wanted.items():
        if name in config and config[name] not in values:
            raise CheckpointError(
                f"{what} says {name} {config[name]} in its config.json; LLaVA-1.5 has {values[0]}.",
                "Give a LLaVA-1.5 model; others show pictures in another way.",
            )


def tower_size(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Width and picture side of the tower a LLaVA was trained with, as far as its config says."""
    vision = config.get("vision_config", {})
    named = _TOWERS.get(str(config.get("mm_vision_tower")), (None, None))
    width = vision.get("hidden_size", config.get("mm_hidden_size", named[0]))
    return width, vision.get("image_size", named[1])
