"""The published names of the detectors' tensors and ours, as literal tables.

Each table is a list of (published pattern, our name or None, why it is dropped). Functions take a
state dict and give one; a key that no table knows is an error. ``to_published`` is the inverse,
made from the same tables.

Detector B is the published explainer's detector, detector A the published stage-1 release.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from m2f2cli.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

# A name is split at the first "{}" only; "{}" stands for the rest of the key, "#" for a number.
Row = tuple[str, str | None, str]

_POSITION_IDS = "a constant (0, 1, 2, …), not a weight"
_WORDS = "word embeddings: the prompt's tokens are learnt, so no word is looked up"
_UNUSED_TEXT = "computed and unused in this detector"
_CONSTANT = "the bridge's output is a constant whatever these hold"

_CLIP_VISION: tuple[Row, ...] = (
    ("clip_vision_encoder.model.vision_model.embeddings.position_ids", None, _POSITION_IDS),
    ("clip_vision_encoder.model.vision_model.{}", "clip.vision.{}", ""),
)
_PROJECTIONS: tuple[Row, ...] = (
    ("clip_vision_alpha", "alpha_vision", ""),
    ("deepfake_proj.{}", "backbone_proj.{}", ""),
    ("vision_proj.{}", "vision_proj.{}", ""),
)
_DENSENET: tuple[Row, ...] = (("deepfake_encoder.{}", "backbone.net.features.{}", ""),)

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
_EFFICIENTNET: tuple[Row, ...] = (
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

_DETECTOR_B: tuple[Row, ...] = (
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
# What is folded into the head is removed before this table is read (``fold_bridge``).
_DETECTOR_A: tuple[Row, ...] = (
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
_KINDS = {"A": _DETECTOR_A, "B": _DETECTOR_B}
_BACKBONES = {"densenet121": _DENSENET, "efficientnet_b4": _EFFICIENTNET}
# Folded into head.bias, in the order of the arithmetic.
_BRIDGE = "bridge_adapter_proj."
FOLDED = (
    "clip_text_alpha",
    f"{_BRIDGE}bridge_adapter_proj.2.bias",
    f"{_BRIDGE}bridge_adapter_reduction.0.weight",
    f"{_BRIDGE}bridge_adapter_reduction.0.bias",
    f"{_BRIDGE}bridge_adapter_reduction.1.weight",
    f"{_BRIDGE}bridge_adapter_reduction.1.bias",
)


def table(kind: str, backbone: str) -> tuple[Row, ...]:
    """The table of one detector.

    Args:
        kind: ``A`` or ``B``.
        backbone: ``densenet121`` or ``efficientnet_b4``.
    """
    return _KINDS[kind] + _BACKBONES[backbone]


@dataclass(frozen=True)
class Fate:
    """What becomes of one published key.

    Args:
        key: As published, without prefix.
        action: ``mapped``, ``dropped`` or ``folded``.
        to: Our name, when mapped or folded.
        why: The reason, when dropped or folded.
    """

    key: str
    action: str
    to: str | None = None
    why: str = ""


def fates(
    keys: Iterable[str], rows: Sequence[Row], *, what: str, kind: str = "detector"
) -> list[Fate]:
    """Look every key up.

    Args:
        keys: Published keys, without ``module.`` or other prefixes.
        rows: What ``table`` gives.
        what: The file, for the message.
        kind: What the table describes, for the message.

    Raises:
        CheckpointError: Names the keys the table does not know.
    """
    found, unknown = [], []
    compiled = [(_pattern(published), ours, why) for published, ours, why in rows]
    for key in keys:
        for pattern, ours, why in compiled:
            if match := pattern.fullmatch(key):
                if ours is None:
                    found.append(Fate(key, "dropped", None, why))
                else:
                    found.append(Fate(key, "mapped", _fill(ours, match)))
                break
        else:
            unknown.append(key)
    if unknown:
        from m2f2cli.checkpoints.store import name_some

        raise CheckpointError(
            f"{what} holds {len(unknown)} tensors that this kind of {kind} does not have: "
            f"{name_some(unknown)}.",
            "The file is of another kind; m2f2 info PATH says what it is.",
        )
    return found


def refuse_twins(found: Iterable[Fate], *, what: str) -> None:
    """Refuse two keys that mean the same tensor of ours.

    Raises:
        CheckpointError: Names both.
    """
    first: dict[str, str] = {}
    for fate in found:
        if fate.to is not None and first.setdefault(fate.to, fate.key) != fate.key:
            raise CheckpointError(
                f"{what} holds the same tensor twice: {first[fate.to]} and {fate.key}.",
                "The file was put together from two; take the original.",
            )


def rename(state: Mapping[str, Any], rows: Sequence[Row], *, what: str) -> dict[str, Any]:
    """Give a published state dict our names; dropped keys are left out.

    Raises:
        CheckpointError: A key is unknown.
    """
    return {
        fate.to: state[fate.key] for fate in fates(state, rows, what=what) if fate.to is not None
    }


def to_published(state: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Give one of our state dicts its published names, by the same table read backwards.

    Raises:
        CheckpointError: A key is unknown.
    """
    return rename(state, inverse(rows), what="The model")


def inverse(rows: Sequence[Row]) -> list[Row]:
    """A table read backwards; of several published names for one of ours the first counts."""
    return [(ours, published, "") for published, ours, _ in rows if ours is not None]


def bridge_constant(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What detector A's bridge gives for every picture, before its alpha: (bridge size,).

    Its tokens pass a linear layer to one value and a LayerNorm over that one value, which returns
    its bias; a linear layer and a LayerNorm over the tokens follow.
    """
    from torch.nn import functional

    bias, weight, offset, scale, shift = (state[key] for key in FOLDED[1:])
    tokens = bias.reshape(1).expand(weight.shape[1])
    hidden = functional.linear(tokens, weight, offset)
    return functional.layer_norm(hidden, hidden.shape, scale, shift)


def fold_bridge(state: Mapping[str, torch.Tensor]) -> State:
    """Fold detector A's constant bridge into the head's bias.

    The published head reads [alpha_vision · class token (H), alpha_text · bridge (D), backbone
    (H)]; the result's head reads the first and the last.

    Args:
        state: Detector A with published keys, without prefix.

    Returns:
        The state without the keys in ``FOLDED``, with a head of 2 · H inputs.

    Raises:
        CheckpointError: The head's width is not 2 · H + D.
    """
    weight, bias = state["output.weight"], state["output.bias"]
    width = state["vision_proj.0.weight"].shape[0]
    size = state[FOLDED[2]].shape[0]
    if weight.shape[1] != 2 * width + size:
        raise CheckpointError(
            f"The head of this detector reads {weight.shape[1]} values, not "
            f"2 x {width} + {size}, so its bridge cannot be folded."
        )
    kept = {key: tensor for key, tensor in state.items() if key not in FOLDED}
    constant = (state["clip_text_alpha"] * bridge_constant(state)).double()
    columns = weight[:, width : width + size].double()
    kept["output.bias"] = (bias.double() + columns @ constant).to(bias.dtype)
    kept["output.weight"] = _without(weight, width, width + size)
    return kept


def _without(weight: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    import torch

    return torch.cat([weight[:, :begin], weight[:, end:]], dim=1)


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\}|#)", name)
    meaning = {"{}": r"(?P<rest>.+)", "#": r"(?P<number>\d+)"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))


def _fill(name: str, match: re.Match[str]) -> str:
    groups = match.groupdict()
    return name.replace("#", groups.get("number") or "").replace("{}", groups.get("rest") or "")
