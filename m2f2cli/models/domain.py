"""The domain check: how far a picture lies from the pictures a detector was trained on.

The description of a picture is what the backbone makes of it: mean and log-deviation of each
channel of one early stage (texture, sharpness, compression) and the pooled last features. Its
distance is the root mean square of the description after centring, scaling and whitening along the
training set's principal directions, with the part outside those directions as one more term.
"""

from __future__ import annotations

import torch
from torch import nn


class DomainCheck(nn.Module):
    """Distance from the training pictures, from statistics stored with the checkpoint.

    Args:
        features: Length of a description.
        components: Principal directions kept.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    basis: torch.Tensor
    spread: torch.Tensor

    def __init__(self, features: int, components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("basis", torch.zeros(components, features))
        self.register_buffer("spread", torch.ones(components + 1))

    def forward(self, description: torch.Tensor) -> torch.Tensor:
        """Distances (B,) of descriptions (B, features); about 1 inside the domain."""
        centred = (description.float() - self.mean.float()) / self.scale.float()
        along = centred @ self.basis.float().T
        rest = (centred.square().sum(1) - along.square().sum(1)).clamp_min(0).sqrt()
        whitened = torch.cat([along, rest[:, None]], dim=1) / self.spread.float()
        return whitened.square().mean(1).sqrt()

    @torch.no_grad()
    def fit(self, descriptions: torch.Tensor) -> None:
        """Set the statistics from the training pictures' descriptions (N, features)."""
        self.mean.copy_(descriptions.mean(0))
        self.scale.copy_(descriptions.std(0).clamp_min(1e-6))
        centred = (descriptions.float() - self.mean) / self.scale
        directions = torch.linalg.svd(centred, full_matrices=False).Vh[: len(self.basis)]
        self.basis.zero_()
        self.basis[: len(directions)] = directions
        along = centred @ self.basis.T
        rest = (centred.square().sum(1) - along.square().sum(1)).clamp_min(0).sqrt()
        spread = torch.cat([along, rest[:, None]], dim=1).square().mean(0).sqrt()
        self.spread.copy_(spread.clamp_min(1e-6))


def describe(early: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """A picture's description from an early map (B, c, s, s) and pooled features (B, C).

    Returns:
        (B, 2c + C), float32.
    """
    early = early.float().flatten(2)
    deviation = early.std(dim=2).clamp_min(1e-6).log()
    return torch.cat([early.mean(dim=2), deviation, pooled.float()], dim=1)
