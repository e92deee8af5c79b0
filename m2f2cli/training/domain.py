"""The domain check of a new detector, learnt from the pictures it was trained and measured on."""

from __future__ import annotations

from typing import Any

import numpy as np

from m2f2cli.data.domain import Domain, describe_texture
from m2f2cli.data.transforms import resize_and_crop
from m2f2cli.data.video import evenly
from m2f2cli.training.picture_store import PictureStore

# Six numbers are learnt from each set: more pictures than these add minutes, not knowledge.
_PICTURES = 2048


def fit_domain(
    train: PictureStore, held: PictureStore, *, size: int, quantile: float
) -> dict[str, Any] | None:
    """Describe where the training pictures lie.

    Args:
        train: The pictures trained on.
        held: The pictures measured on; they set the limit.
        size: The network's input size in pixels.
        quantile: Share of ``held`` that shall lie inside, in [0, 1]; 0 for no check.

    Returns:
        The ``domain`` field of a detector's configuration; None without a check.
    """
    if not quantile:
        return None
    return Domain.fit(
        _described(train, size), _described(held, size), quantile=quantile
    ).to_config()


def _described(pictures: PictureStore, size: int) -> np.ndarray:
    """Describe up to 2,048 pictures (N, 6), evenly spread; of a video the middle frame."""
    chosen = evenly(len(pictures.samples), _PICTURES)
    return np.stack([describe_texture(resize_and_crop(pictures.read(i), size)) for i in chosen])
