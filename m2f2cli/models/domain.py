"""The domain check: how far a picture's features lie from what the training pictures' vary along.

The features of face pictures vary along few directions; pictures of other things leave them. The
distance is what remains of a picture's standardized features beside those directions (the residual
of ViM, Wang et al., CVPR 2022, arXiv 2203.10807). Inside the directions other things lie no
farther out than faces, so Mahalanobis' distance there, tried first, tells nothing.
"""

from __future__ import annotations

import torch
from torch import nn

DIRECTIONS = 64
_PICTURES_A_DIRECTION = 8
_FLOOR = 1e-3  # of a feature's deviation


class Domain(nn.Module):
    """Distance of features from the training pictures' main directions.

    Args:
        features: Width F of the detector's features.
        size: Number of directions, r.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    basis: torch.Tensor

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("basis", torch.zeros(size, features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) to float32 (B,), 0 or more; 1 is the spread of the training pictures."""
        centered = (features.float() - self.mean.float()) * self.scale.float()
        rest = centered.square().sum(1) - (centered @ self.basis.float().T).square().sum(1)
        return (rest.clamp_min(0) / centered.shape[1]).sqrt()

    @classmethod
    def fit(cls, features: torch.Tensor) -> Domain:
        """Learn from the features (N, F) of training pictures, N at least 2."""
        features = features.float()
        size = min(DIRECTIONS, max(1, len(features) // _PICTURES_A_DIRECTION))
        domain = cls(features.shape[1], size)
        domain.mean.copy_(features.mean(0))
        domain.scale.copy_(1 / features.std(0).clamp_min(_FLOOR))
        centered = (features - domain.mean) * domain.scale
        # Eigenvectors of the pictures' Gram matrix (N, N) give the directions without F by F.
        values, vectors = torch.linalg.eigh(centered @ centered.T)
        values, vectors = values[-size:], vectors[:, -size:]
        domain.basis.copy_((centered.T @ vectors / values.clamp_min(_FLOOR).sqrt()).T)
        return domain
