"""Learnable forgery prompts: a few free tokens that CLIP's text part turns into one feature."""

from __future__ import annotations

import torch
from torch import nn


class ForgeryPrompt(nn.Module):
    """Learnable token embeddings in the place of a written prompt.

    Args:
        tokens: How many tokens.
        width: The text part's width; without one, that of the projected patches.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, tokens, width))

    def forward(self, text: nn.Module | None) -> torch.Tensor:
        """The prompt's feature, (1, width): through the text part, or the tokens' mean without."""
        feature: torch.Tensor = self.tokens.mean(1) if text is None else text(self.tokens)
        return feature


def forgery_map(patches: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every projected patch with the projected prompt.

    Args:
        patches: (B, P, H) projected patch features.
        text: (1, H) projected prompt feature.

    Returns:
        (B, P), each in [-1, 1].
    """
    return torch.nn.functional.cosine_similarity(patches, text[:, None], dim=-1)
