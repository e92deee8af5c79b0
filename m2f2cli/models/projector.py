"""The projectors that carry pictures into the language model: Linear, GELU, Linear.

Two are in an explainer: ``mm_projector`` turns a patch feature into a token (LLaVA-1.5's
``mlp2x_gelu``), ``forgery_projector`` turns the detector's two probabilities into one.
"""

from __future__ import annotations

from torch import nn


class Projector(nn.Sequential):
    """Two linear layers with a GELU between them; state-dict keys ``0`` and ``2``.

    Args:
        inputs: Width of what comes in.
        width: Width of the language model's embeddings.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))
