"""The bridge: fuses backbone taps with CLIP layers, level by level, inside each picture.

Follows section 3 of the M2F2-Det paper (arXiv 2503.20188). The published code keeps its blocks in
a plain list, attends over the batch and ends in a normalization of one value, so its output is a
constant; here the blocks are registered, attention stays inside one picture and the output is the
mean of the fused tokens, which works at any picture size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from m2f2cli.errors import ConfigError


class Bridge(nn.Module):
    """Joint attention over the tokens of backbone taps and CLIP layers.

    Args:
        tap_channels: Channels of the backbone taps, one per level.
        clip_width: Width of the CLIP hidden states, one per level.
        width: Width of the fused tokens.
        heads: Attention heads of each block.
        size: Width of the result.
    """

    def __init__(
        self, tap_channels: Sequence[int], clip_width: int, *, width: int, heads: int, size: int
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"Bridge width {width} is not a multiple of its {heads} heads.")
        levels = len(tap_channels)
        self.from_taps = nn.ModuleList([nn.Linear(channels, width) for channels in tap_channels])
        self.from_clip = nn.ModuleList([nn.Linear(clip_width, width) for _ in range(levels)])
        block: dict[str, Any] = {"dim_feedforward": 2 * width, "activation": "gelu"}
        self.blocks = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(
                    width, heads, dropout=0.0, batch_first=True, norm_first=True, **block
                )
                for _ in range(levels)
            ]
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size), nn.LayerNorm(size))

    def forward(self, taps: Sequence[torch.Tensor], states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse the levels.

        Args:
            taps: Backbone maps (B, c_i, s_i, s_i), one per level.
            states: CLIP hidden states (B, 1 + P, clip_width), class token first, one per level.

        Returns:
            (B, size).
        """
        fused: torch.Tensor | None = None
        for level, (tap, state) in enumerate(zip(taps, states, strict=True)):
            tokens = [
                self.from_taps[level](tap.flatten(2).transpose(1, 2)),
                self.from_clip[level](state[:, 1:]),
            ]
            if fused is not None:
                tokens.insert(0, fused)
            fused = self.blocks[level](torch.cat(tokens, dim=1))
        if fused is None:
            raise ConfigError("The bridge needs at least one level.")
        result: torch.Tensor = self.out(fused.mean(dim=1))
        return result
