"""The backbone: any timm network by name, asked for its channels and stages.

An installed package adds one through the entry-point group ``m2f2cli.backbones``: the name of the
entry point is the network's, the object it points to the function that timm's ``register_model``
decorates.

Source: timm (https://github.com/huggingface/pytorch-image-models). The published detectors use
``densenet121`` (B) and ``efficientnet_b4`` (A): torchvision's networks under timm's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from m2f2cli.errors import ConfigError
from m2f2cli.registry import Registry

BACKBONES = Registry("backbone", {}, group="m2f2cli.backbones")


def check_backbone(name: str, side: int | None) -> None:
    """Refuse a network that timm does not have or that does not take pictures of a side.

    ``side`` is in pixels; None leaves it open. Nothing takes storage.

    Raises:
        ConfigError: See ``Backbone``.
    """
    with torch.device("meta"):
        backbone = Backbone(name)
    if side is not None:
        backbone.check_side(side)


class Backbone(nn.Module):
    """A timm network without its classifier.

    DenseNet ends in a normalization whose activation timm adds and the published detector does
    not have; it is taken out here.

    Args:
        name: A timm architecture, for example ``densenet121``, or one of ``BACKBONES``.
        kwargs: Further arguments of ``timm.create_model``.
        stages: Feature stages (one per stride, finest first, negative from the end) whose maps
            ``forward`` returns beside the pooled features.

    Raises:
        ConfigError: timm has no such architecture, or not all of the ``stages``.
    """

    def __init__(
        self, name: str, kwargs: dict[str, Any] | None = None, *, stages: Sequence[int] = ()
    ) -> None:
        super().__init__()
        if not timm.is_model(name) and name in BACKBONES.names():
            BACKBONES.get(name)  # registers it with timm
        if not timm.is_model(name):
            near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
            raise ConfigError(
                f"timm has no backbone named '{name}'.",
                f"Near names: {', '.join(near)}." if near else "See timm.list_models().",
            )
        kwargs = kwargs or {}
        net: Any = timm.create_model(name, pretrained=False, num_classes=0, **kwargs)
        self.net: Any = net
        self._name = name
        known = net.default_cfg if isinstance(getattr(net, "default_cfg", None), dict) else {}
        free = kwargs.get("dynamic_img_size") or kwargs.get("strict_img_size") is False
        self.side: int | None = None
        """The side of the pictures it takes; None where it takes any."""
        if known.get("fixed_input_size") and not free:
            self.side = np.ravel(kwargs.get("img_size", known["input_size"][-1])).tolist()[-1]
        features = getattr(net, "features", None)
        if features is not None and hasattr(features, "norm5"):
            features.norm5.act = nn.Identity()
        self.channels: int = getattr(net, "head_hidden_size", net.num_features)
        channels = [stage["num_chs"] for stage in net.feature_info]
        if any(not -len(channels) <= stage < len(channels) for stage in stages):
            raise ConfigError(
                f"Backbone '{name}' has {len(channels)} feature stages, not {list(stages)}."
            )
        self._stages = [stage % len(channels) for stage in stages]
        self.stage_channels: list[int] = [channels[stage] for stage in self._stages]

    def check_side(self, side: int) -> None:
        """Refuse pictures of a side that the network was not made for.

        Raises:
            ConfigError: It takes another side alone.
        """
        if self.side not in (None, side):
            raise ConfigError(
                f"The backbone '{self._name}' takes pictures of {self.side} pixels, not {side}.",
                f"Set --image-size {self.side}, or choose another --backbone.",
            )

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute pooled features and the maps of the chosen stages.

        Args:
            pixel_values: (B, 3, S, S), normalized RGB.

        Returns:
            pooled: (B, C), the features timm would hand to its classifier.
            maps: (B, c_i, s_i, s_i) of the stages asked for, in that order.
        """
        if not self._stages:
            return self.net(pixel_values), []
        wanted = sorted(set(self._stages))
        last, maps = self.net.forward_intermediates(pixel_values, indices=wanted)
        return self.net.forward_head(last), [maps[wanted.index(stage)] for stage in self._stages]
