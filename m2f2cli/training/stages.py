"""What trains in which stage: one table, and the proof that it covers the model.

Names are those of ``Detector.named_parameters()``; what only exists while training (heads of
auxiliary tasks) stands under ``heads.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from m2f2cli.options.train_detector import ModelOptions, OptimizerOptions

if TYPE_CHECKING:
    from torch import nn

    from m2f2cli.models.backbone import Backbone

# Group of parameters -> how their names begin. Every parameter is in exactly one group.
PARAMETER_GROUPS: dict[str, tuple[str, ...]] = {
    "backbone": ("backbone.",),
    "projections": ("backbone_proj.", "vision_proj.", "text_proj.", "bridge.", "head."),
    "prompt_tokens": ("forgery_prompt.",),
    "alpha_vision": ("alpha_vision",),
    "alpha_text": ("alpha_text",),
    "clip": ("clip.",),
    "auxiliary": ("heads.",),
}

_LIGHT = ("prompt_tokens", "alpha_vision", "alpha_text")

# --train -> the groups that move; all others stay as they are, BatchNorm statistics included.
STAGES: dict[str, tuple[str, ...]] = {
    "published": ("backbone", "projections", *_LIGHT, "auxiliary"),
    "head": ("projections", *_LIGHT, "auxiliary"),
    "prompt": (*_LIGHT, "auxiliary"),
    "everything": tuple(PARAMETER_GROUPS),
}


def group_of(name: str) -> str:
    """The group a parameter belongs to.

    Args:
        name: As ``Detector.named_parameters()`` gives it.

    Raises:
        LookupError: The table has no group for it, or two.
    """
    homes = [group for group, starts in PARAMETER_GROUPS.items() if name.startswith(starts)]
    if len(homes) != 1:
        raise LookupError(f"Parameter '{name}' is in {len(homes)} groups of PARAMETER_GROUPS.")
    return homes[0]


def backbone_layers(backbone: Backbone | None) -> dict[str, int]:
    """Number each backbone parameter by its stage: 0 the stem, then 1 for the first stage on.

    Args:
        backbone: Its timm network says which of its parts are stages; None has no parameter.

    Returns:
        Parameter names, as in ``Detector``, to numbers.
    """
    if backbone is None:
        return {}
    from timm.models import group_parameters

    matcher = backbone.net.group_matcher(coarse=True)
    layers = group_parameters(backbone.net, matcher)
    return {
        f"backbone.net.{name}": int(number) for number, names in layers.items() for name in names
    }


def freeze(
    named: Mapping[str, nn.Parameter], backbone: Backbone | None, options: ModelOptions
) -> None:
    """Let exactly the parameters of a stage train.

    Args:
        named: Every parameter of the model in training, by name.
        backbone: The detector's backbone.
        options: ``train`` and ``freeze_stages``.
    """
    moving = STAGES[options.train]
    layers = backbone_layers(backbone) if options.freeze_stages else {}
    for name, parameter in named.items():
        frozen_stage = layers.get(name, options.freeze_stages + 1) <= options.freeze_stages
        parameter.requires_grad_(group_of(name) in moving and not frozen_stage)


def optimiser_groups(
    named: Mapping[str, nn.Parameter], backbone: Backbone | None, options: OptimizerOptions
) -> list[dict[str, Any]]:
    """The optimiser's parameter groups: every trainable parameter exactly once.

    Args:
        named: Every parameter of the model in training, by name.
        backbone: The detector's backbone.
        options: Learning rates and weight decay.

    Returns:
        Dictionaries with ``params``, ``names``, ``group``, ``lr`` and ``weight_decay``.
    """
    head_lr = options.learning_rate if options.head_lr is None else options.head_lr
    rates = {
        "backbone": options.learning_rate,
        "projections": head_lr,
        "prompt_tokens": options.prompt_lr,
        "alpha_vision": options.vision_alpha_lr,
        "alpha_text": options.text_alpha_lr,
        "clip": options.clip_lr,
        "auxiliary": head_lr,
    }
    layers = backbone_layers(backbone) if options.layer_decay < 1 else {}
    last = max(layers.values(), default=0)
    found: dict[tuple[str, float, float], dict[str, Any]] = {}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        group = group_of(name)
        rate = rates[group] * options.layer_decay ** (last - layers.get(name, last))
        decay = options.weight_decay if options.decay_all or parameter.ndim > 1 else 0.0
        entry = found.setdefault(
            (group, rate, decay),
            {"params": [], "names": [], "group": group, "lr": rate, "weight_decay": decay},
        )
        entry["params"].append(parameter)
        entry["names"].append(name)
    return list(found.values())
