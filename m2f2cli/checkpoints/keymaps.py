"""The names of tensors in published files and ours: how a layout is recognized, and its key map.

``LAYOUTS`` lists every kind of weights that is known, with the tensor names it is recognized by,
the parts it must hold and its key map. A key map is a literal tuple of rows (their name, our name
or None, why it is dropped); in a name ``#`` stands for a number and ``{}`` for the rest. Functions
take names or state dicts and give the same; a name that is in no row is an error. The way back,
``to_published``, reads the same rows backwards.

A new published layout is a row of ``LAYOUTS`` with its key map here, and, where it is imported
in a way of its own, a function in ``convert``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from m2f2cli.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Tensor = TypeVar("Tensor")
Row = tuple[str, str | None, str]
KeyMap = tuple[Row, ...]

DETECTOR_PART = "detector."
TOWER_PART = "detector.clip.vision."
LANGUAGE_PART = "language_model."
VISION_PROJECTOR = "mm_projector."
FORGERY_PROJECTOR = "forgery_projector."
# What PEFT and the published training scripts put before every name of a delta.
DELTA_PREFIX = "base_model.model."

_ROTARY = "rotary frequencies: computed from the configuration"
_POSITION_IDS = "a constant (0, 1, 2, …), not a weight"
_WORDS = "word embeddings: the prompt's tokens are learned, so no word is looked up"
_UNUSED_TEXT = "computed and unused in this detector"
_CONSTANT = "the bridge's output is a constant whatever these hold"
BRIDGE = "a constant, added to head.bias"

# --- the published detectors ------------------------------------------------------------------

_CLIP_VISION: KeyMap = (
    ("clip_vision_encoder.model.vision_model.embeddings.position_ids", None, _POSITION_IDS),
    ("clip_vision_encoder.model.vision_model.{}", "clip.vision.{}", ""),
)
_PROJECTIONS: KeyMap = (
    ("clip_vision_alpha", "alpha_vision", ""),
    ("deepfake_proj.{}", "backbone_proj.{}", ""),
    ("vision_proj.{}", "vision_proj.{}", ""),
)
_DETECTOR_B: KeyMap = (
    ("clip_text_alpha", "alpha_text", ""),
    ("clip_text_encoder.prompt_tokens", "forgery_prompt.tokens", ""),
    ("clip_text_encoder.model.text_model.embeddings.token_embedding.weight", None, _WORDS),
    ("clip_text_encoder.model.text_model.embeddings.position_ids", None, _POSITION_IDS),
    ("clip_text_encoder.model.text_model.{}", "clip.text.{}", ""),
    ("text_proj.{}", "text_proj.{}", ""),
    *_PROJECTIONS,
    *_CLIP_VISION,
    ("output.{}", "head.{}", ""),
)
# What is folded into the head is removed before this map is read (``fold_bridge``).
_DETECTOR_A: KeyMap = (
    ("clip_text_encoder.{}", None, _UNUSED_TEXT),
    ("text_proj.{}", None, _UNUSED_TEXT),
    ("linear_#.{}", None, _CONSTANT),
    ("clip_reduction.{}", None, _CONSTANT),
    ("bridge_adapter_proj.bridge_adapter_proj.1.{}", None, _CONSTANT),
    ("bridge_adapter_proj.bridge_adapter_proj.2.weight", None, _CONSTANT),
    *_PROJECTIONS,
    *_CLIP_VISION,
    ("output.{}", "head.{}", ""),
)
# Folded into head.bias, in the order of the arithmetic.
FOLDED = (
    "clip_text_alpha",
    "bridge_adapter_proj.bridge_adapter_proj.2.bias",
    "bridge_adapter_proj.bridge_adapter_reduction.0.weight",
    "bridge_adapter_proj.bridge_adapter_reduction.0.bias",
    "bridge_adapter_proj.bridge_adapter_reduction.1.weight",
    "bridge_adapter_proj.bridge_adapter_reduction.1.bias",
)

# torchvision's efficientnet_b4 -> timm's. A block of stage 1 has no expansion, so its parts are
# numbered one lower. Stages 1 to 7 of torchvision are 0 to 6 of timm.
_FIRST_STAGE = {
    "0.0": "conv_dw",
    "0.1": "bn1",
    "1.fc1": "se.conv_reduce",
    "1.fc2": "se.conv_expand",
    "2.0": "conv_pw",
    "2.1": "bn2",
}
_LATER_STAGES = {
    "0.0": "conv_pw",
    "0.1": "bn1",
    "1.0": "conv_dw",
    "1.1": "bn2",
    "2.fc1": "se.conv_reduce",
    "2.fc2": "se.conv_expand",
    "3.0": "conv_pwl",
    "3.1": "bn3",
}
_EFFICIENTNET: KeyMap = (
    ("deepfake_encoder.0.0.{}", "backbone.net.conv_stem.{}", ""),
    ("deepfake_encoder.0.1.{}", "backbone.net.bn1.{}", ""),
    ("deepfake_encoder.8.0.{}", "backbone.net.conv_head.{}", ""),
    ("deepfake_encoder.8.1.{}", "backbone.net.bn2.{}", ""),
    *(
        (f"deepfake_encoder.1.#.block.{part}.{{}}", f"backbone.net.blocks.0.#.{name}.{{}}", "")
        for part, name in _FIRST_STAGE.items()
    ),
    *(
        (
            f"deepfake_encoder.{stage}.#.block.{part}.{{}}",
            f"backbone.net.blocks.{stage - 1}.#.{name}.{{}}",
            "",
        )
        for stage in range(2, 8)
        for part, name in _LATER_STAGES.items()
    ),
)
_DENSENET: KeyMap = (("deepfake_encoder.{}", "backbone.net.features.{}", ""),)
# Each backbone's timm name, the tensor that tells it from the others, and its key map.
_BACKBONES: tuple[tuple[str, str, KeyMap], ...] = (
    ("densenet121", "deepfake_encoder.conv0.weight", _DENSENET),
    ("efficientnet_b4", "deepfake_encoder.0.0.weight", _EFFICIENTNET),
)

# --- LLaVA and the published explainer --------------------------------------------------------

# LLaVA's own layout (liuhaotian/llava-v1.5-*): LLaMA's names, the picture's parts inside "model.".
# The CLIP tower of a LLaVA becomes the detector's own: an explainer runs one tower for both.
_TOWER = "model.vision_tower.vision_tower.vision_model."
ORIGINAL: KeyMap = (
    ("model.layers.#.self_attn.rotary_emb.inv_freq", None, _ROTARY),
    ("model.layers.#.{}", "language_model.model.layers.#.{}", ""),
    ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight", ""),
    ("model.norm.weight", "language_model.model.norm.weight", ""),
    ("lm_head.weight", "language_model.lm_head.weight", ""),
    ("model.mm_projector.0.{}", "mm_projector.0.{}", ""),
    ("model.mm_projector.2.{}", "mm_projector.2.{}", ""),
    (f"{_TOWER}embeddings.position_ids", None, _POSITION_IDS),
    (f"{_TOWER}{{}}", "detector.clip.vision.{}", ""),
)
# The published explainer adds its projector and its detector (without a tower of its own).
PUBLISHED: KeyMap = (
    *ORIGINAL,
    ("deepfake_projector.0.{}", "forgery_projector.0.{}", ""),
    ("deepfake_projector.2.{}", "forgery_projector.2.{}", ""),
    *(
        (f"deepfake_encoder.{theirs}", None if ours is None else f"detector.{ours}", why)
        for theirs, ours, why in _DETECTOR_B + _DENSENET
    ),
)
# Hugging Face's layout (llava-hf/llava-1.5-*): as transformers 4 saves it and, for the tower, as
# transformers 5 does; then as both name it in memory.
_HF_VISION = (
    "vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
)
HUGGING_FACE: KeyMap = (
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
# A vision tower of any file, its names cut to those inside the tower.
VISION_TOWER: KeyMap = (
    ("embeddings.position_ids", None, _POSITION_IDS),
    ("{}", "clip.vision.{}", ""),
)

# --- recognizing --------------------------------------------------------------------------------

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
DELTAS = (STAGE_2, STAGE_3, STAGE_3_PART, PEFT)
"""The kinds of deltas that are not ours, or may not be."""


class Layout(NamedTuple):
    """A kind of weights.

    Attributes:
        kind: In words.
        fits: Whether tensor names, without ``module.``, are of this kind.
        rows: Its key map; of a detector without its backbone (``detector_map``).
        needed: What it must hold, as beginnings of names (several by ``|``), and in which words
            that is missed.
    """

    kind: str
    fits: Callable[[Sequence[str]], bool]
    rows: KeyMap = ()
    needed: tuple[tuple[str, str], ...] = ()


def _has(*parts: str) -> Callable[[Sequence[str]], bool]:
    """Every part occurs in some name; a part that begins with ``^`` must stand at its beginning."""

    def fits(keys: Sequence[str]) -> bool:
        return all(
            any(k.startswith(part[1:]) if part[0] == "^" else part in k for k in keys)
            for part in parts
        )

    return fits


def _projectors(keys: Sequence[str]) -> bool:
    parts = ("deepfake_projector.", "mm_projector.")
    return bool(keys) and all(any(part in key for part in parts) for key in keys)


_NEEDED_A: tuple[tuple[str, str], ...] = (
    ("clip_vision_encoder.", "the CLIP vision tower (give its file to m2f2 import as well)"),
    ("deepfake_encoder.", "the backbone"),
    ("deepfake_proj.", "the backbone's projection"),
    ("vision_proj.", "the vision projection"),
    ("output.", "the head"),
)
_NEEDED_EXPLAINER: tuple[tuple[str, str], ...] = (
    ("model.embed_tokens.", "the word embeddings"),
    ("lm_head.", "the language model's head"),
    ("model.mm_projector.", "the vision projector"),
    ("model.vision_tower.", "the CLIP vision tower (give its file to m2f2 import as well)"),
    ("deepfake_encoder.", "the detector"),
    ("deepfake_projector.", "the detector's projector"),
)
_MISSING_TOWER = "the CLIP vision tower (config.json names where it comes from)"
_NEEDED_LLAVA = (("lm_head.", "the language model's head"), ("model.vision_tower.", _MISSING_TOWER))
_NEEDED_HF = (("vision_tower.|model.vision_tower.", _MISSING_TOWER),)

LAYOUTS: tuple[Layout, ...] = (
    Layout(PEFT, _has(".lora_A."), PUBLISHED),
    Layout(OUR_EXPLAINER, _has("^language_model.", "^forgery_projector.", "^detector.")),
    Layout(DETECTOR, _has("^alpha_vision", "^head.", "^backbone.", "^clip.")),
    Layout(EXPLAINER, _has("model.layers.", "deepfake_encoder."), PUBLISHED, _NEEDED_EXPLAINER),
    Layout(DETECTOR_A, _has("clip_vision_alpha", FOLDED[2]), _DETECTOR_A, _NEEDED_A),
    Layout(
        DETECTOR_B,
        _has("clip_vision_alpha"),
        _DETECTOR_B,
        (*_NEEDED_A, ("text_proj.", "the text projection")),
    ),
    Layout(STAGE_3_PART, lambda keys: _projectors(keys) and _has("^base_model.")(keys), PUBLISHED),
    Layout(STAGE_2, _projectors, PUBLISHED),
    Layout(LLAVA, _has("model.layers.", "mm_projector."), ORIGINAL, _NEEDED_LLAVA),
    Layout(LLAVA_HF, _has("language_model.", "multi_modal_projector."), HUGGING_FACE, _NEEDED_HF),
    Layout(LANGUAGE, _has("model.layers.", "embed_tokens.")),
    Layout(CLIP, _has("vision_model.", "text_model.", "logit_scale"), VISION_TOWER),
    Layout(TOWER, _has("vision_model.embeddings.class_embedding"), VISION_TOWER),
)
"""Every kind that tensor names tell, the first that fits counts."""
# Of torch.compile, and of DataParallel or DistributedDataParallel around a part.
_WRAPPERS = re.compile(r"_orig_mod\.|(?<=\.)module\.")
_BY_TYPE = {
    "m2f2_detector": DETECTOR,
    "m2f2_explainer": OUR_EXPLAINER,
    "clip": CLIP,
    "clip_vision_model": TOWER,
    "llava": LLAVA_HF,
}


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take out of names what torch's parallel and compiled modules put inside them.

    A leading ``module.`` stays. Where two names would become one, all stay.
    """
    renamed = {_WRAPPERS.sub("", key): tensor for key, tensor in state.items()}
    return renamed if len(renamed) == len(state) else dict(state)


def kind_of(keys: Iterable[str]) -> str:
    """Name the kind of weights with these tensor names."""
    names = [key.removeprefix("module.") for key in keys]
    return next((layout.kind for layout in LAYOUTS if layout.fits(names)), UNKNOWN)


def kind_of_folder(
    config: Mapping[str, Any], stage: Mapping[str, Any], keys: Iterable[str], files: Iterable[str]
) -> str:
    """Name the kind of a folder by its configuration, ``stage.json``, tensors and weight files."""
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
    needed = next((layout.needed for layout in LAYOUTS if layout.kind == kind), ())
    return [
        words
        for begins, words in needed
        if not any(name.startswith(prefix + b) for b in begins.split("|") for name in names)
    ]


# --- renaming -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What becomes of one published key.

    Args:
        key: As it stands in the file.
        to: Our name; None where it is dropped or folded.
        why: The reason, where it is dropped or folded.
        folded: Whether its value is in another tensor of ours.
    """

    key: str
    to: str | None = None
    why: str = ""
    folded: bool = False

    @property
    def action(self) -> str:
        """``mapped``, ``dropped`` or ``folded``."""
        return "mapped" if self.to is not None else "folded" if self.folded else "dropped"


def look_up(
    keys: Iterable[str], rows: Sequence[Row], *, what: str, prefix: str = ""
) -> list[Entry]:
    """Look every key of a file up in a key map; ``prefix`` may stand before the names it knows.

    Raises:
        CheckpointError: Names ``what`` and the keys that no row knows, or two of the same tensor.
    """
    compiled = [(_pattern(theirs), ours, why) for theirs, ours, why in rows]
    entries, unknown = [], []
    for key in keys:
        name = key.removeprefix(prefix)
        for pattern, ours, why in compiled:
            if match := pattern.fullmatch(name):
                entries.append(Entry(key, None if ours is None else _fill(ours, match), why))
                break
        else:
            unknown.append(key)
    if unknown:
        shown = ", ".join(sorted(unknown)[:4]) + (" and more" if len(unknown) > 4 else "")
        raise CheckpointError(
            f"{what} holds {len(unknown)} tensors that its kind does not have: {shown}.",
            "The file is of another kind; m2f2 info PATH says what it is.",
        )
    first: dict[str, str] = {}
    for entry in entries:
        if entry.to is not None and first.setdefault(entry.to, entry.key) != entry.key:
            raise CheckpointError(
                f"{what} holds the same tensor twice: {first[entry.to]} and {entry.key}.",
                "The file was put together from two; take the original.",
            )
    return entries


def rename(state: Mapping[str, Tensor], rows: Sequence[Row], *, what: str) -> dict[str, Tensor]:
    """Give a published state dict our names; dropped keys are left out.

    Raises:
        CheckpointError: See ``look_up``.
    """
    return {e.to: state[e.key] for e in look_up(state, rows, what=what) if e.to is not None}


def to_published(state: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """Give one of our state dicts its published names; of several for one of ours the first.

    Raises:
        CheckpointError: See ``look_up``.
    """
    inverse = [(ours, theirs, "") for theirs, ours, _ in rows if ours is not None]
    return rename(state, inverse, what="The model")


def module_of(name: str, rows: Sequence[Row] = PUBLISHED) -> str | None:
    """Our path of a published module, such as ``model.layers.0.mlp.up_proj``; None if dropped.

    Raises:
        CheckpointError: The module is in no row.
    """
    weight = look_up([f"{name}.weight"], rows, what="The adapter")[0].to
    return weight.removesuffix(".weight") if weight else None


def detector_map(kind: str, backbone: str) -> KeyMap:
    """The key map of ``DETECTOR_A`` or ``DETECTOR_B`` with a backbone of ``backbone_of``."""
    own = next(layout.rows for layout in LAYOUTS if layout.kind == kind)
    return own + next(rows for name, _, rows in _BACKBONES if name == backbone)


def backbone_of(keys: Iterable[str], *, what: str) -> str:
    """Timm's name of a published detector's backbone, by its keys without prefix.

    Raises:
        CheckpointError: It is none of the published ones.
    """
    known = set(keys)
    for name, mark, _ in _BACKBONES:
        if mark in known:
            return name
    raise CheckpointError(
        f"The backbone of {what} is neither {' nor '.join(row[0] for row in _BACKBONES)}.",
        "m2f2 info PATH lists what the file holds.",
    )


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\}|#)", name)
    meaning = {"{}": r"(?P<rest>.+)", "#": r"(?P<number>\d+)"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))


def _fill(name: str, match: re.Match[str]) -> str:
    groups = match.groupdict()
    return name.replace("#", groups.get("number") or "").replace("{}", groups.get("rest") or "")


# --- detector A's bridge ------------------------------------------------------------------------


def bridge_constant(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What detector A's bridge gives for every picture, times its alpha: (bridge size,).

    Its tokens pass a linear layer to one value and a LayerNorm over that one value, which returns
    its bias; a linear layer and a LayerNorm over the tokens follow. ``state`` has published keys,
    without prefix; only ``FOLDED`` are read.
    """
    from torch.nn import functional

    alpha, bias, weight, offset, scale, shift = (state[key] for key in FOLDED)
    tokens = bias.reshape(1).expand(weight.shape[1])
    hidden = functional.linear(tokens, weight, offset)
    return alpha * functional.layer_norm(hidden, hidden.shape, scale, shift)


def fold_bridge(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fold detector A's constant bridge into the head's bias.

    The published head reads [alpha_vision · class token (H), alpha_text · bridge (D), backbone
    (H)]; the result's reads the first and the last: 2 · H inputs, without the keys in ``FOLDED``.

    Raises:
        CheckpointError: The head's width is not 2 · H + D.
    """
    import torch

    weight, bias = state["output.weight"], state["output.bias"]
    width = state["vision_proj.0.weight"].shape[0]
    size = state[FOLDED[2]].shape[0]
    if weight.shape[1] != 2 * width + size:
        raise CheckpointError(
            f"The head of this detector reads {weight.shape[1]} values, not "
            f"2 x {width} + {size}, so its bridge cannot be folded."
        )
    kept = {key: tensor for key, tensor in state.items() if key not in FOLDED}
    columns = weight[:, width : width + size].double()
    added = columns @ bridge_constant(state).double()
    kept["output.bias"] = (bias.double() + added).to(bias.dtype)
    kept["output.weight"] = torch.cat([weight[:, :width], weight[:, width + size :]], dim=1)
    return kept


# --- ImageNet classifiers -> timm ---------------------------------------------------------------

# The layout of EfficientNet-PyTorch (``efficientnet-b4-….pth``, ``efficientnet-lite0-….pth``).
_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_PLAIN_BLOCK = {  # without an expansion, as in the first stage
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_EXPANDED_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(.+)")
# torchvision's densenet files still say norm.1 where the network says norm1.
_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
_TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.")


# What the last layer of a classifier is called.
_HEADS = [[name] for name in ("head", "fc", "classifier", "last_linear", "cls_head", "linear")]


def to_timm(
    found: Mapping[str, Tensor], wanted: Sequence[str], classifier: Sequence[str]
) -> dict[str, Tensor]:
    """Rename a backbone's tensors to timm's names and drop its classifier.

    Args:
        found: A file's tensors: timm's or torchvision's densenet names, or EfficientNet-PyTorch's,
            perhaps inside a classifier of another name.
        wanted: The names timm's network has; checked only as far as renaming needs.
        classifier: The modules that are the classifier in timm's network.

    Raises:
        CheckpointError: A tensor's name is in no table.
    """
    found = without_wrappers(found)
    marks = tuple(f".{name}" for name in ("_conv_stem.weight", *wanted[:1]))
    mark = next((key for key in found if key.endswith(marks)), "")
    if prefix := next((mark.removesuffix(m[1:]) for m in marks if mark.endswith(m)), ""):
        # A whole classifier around the backbone: its head is not part of it.
        kept = [k for k in found if k.startswith(prefix) or k.split(".")[-2:-1] not in _HEADS]
        found = {key.removeprefix(prefix): found[key] for key in kept}
        if len(found) < len(kept):
            raise CheckpointError(
                f"These weights hold tensors both with '{prefix}' before their names and without.",
                "Save the wanted ones alone.",
            )
    found = {_DENSE_LAYER.sub(r"\1\2.", key): tensor for key, tensor in found.items()}
    if "_conv_stem.weight" in found:
        places = sorted({(int(s), int(b)) for s, b in _TIMM_BLOCK.findall(" ".join(wanted))})
        expanded = {key.split(".")[1] for key in found if "._expand_conv." in key}
        found = {_efficientnet_name(k, places, expanded): tensor for k, tensor in found.items()}
    return {
        key: tensor
        for key, tensor in found.items()
        if not any(key == name or key.startswith(f"{name}.") for name in classifier)
    }


def _efficientnet_name(key: str, places: Sequence[tuple[int, int]], expanded: set[str]) -> str:
    """EfficientNet-PyTorch numbers its blocks throughout, timm in each stage (``places``)."""
    if match := _BLOCK.fullmatch(key):
        number, part, rest = match.groups()
        table = _EXPANDED_BLOCK if number in expanded else _PLAIN_BLOCK
        if part in table and int(number) < len(places):
            stage, block = places[int(number)]
            return f"blocks.{stage}.{block}.{table[part]}.{rest}"
    else:
        module, _, rest = key.partition(".")
        if module in _STEM_AND_HEAD:
            return f"{_STEM_AND_HEAD[module]}.{rest}"
    raise CheckpointError(
        f"The tensor '{key}' has no place in this backbone.",
        "The weights are of another architecture than --backbone says.",
    )
