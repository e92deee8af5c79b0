"""From pixels to the network's input: the one preprocessing, bitwise that of the published system.

Pictures are uint8 RGB arrays of shape (H, W, 3). NumPy and Pillow only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from m2f2cli.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# A picture more than this many times longer than wide is cut to it before it is resized, so that
# a 1-pixel-wide strip cannot ask for gigabytes; what is cut lies far outside the center crop.
_LONGEST_RATIO = 16
# A longer picture is shrunk before it is padded: the square of its edge could fill the memory.
_LONGEST_PADDED = 4096


def resize_and_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """Scale the shortest edge to ``size`` (bicubic on uint8) and cut the center square.

    Returns:
        uint8 (size, size, 3).
    """
    if size < 1:
        raise ConfigError(f"The picture size must be at least 1 pixel, not {size}.")
    height, width = pixels.shape[:2]
    short, long = min(height, width), max(height, width)
    if long > _LONGEST_RATIO * short:
        long = _LONGEST_RATIO * short
        top, left = max(0, (height - long) // 2), max(0, (width - long) // 2)
        pixels = pixels[top : top + long, left : left + long]
        height, width = pixels.shape[:2]
    if short != size:
        stretched = int(size * long / short)
        target = (size, stretched) if width <= height else (stretched, size)
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        pixels = np.asarray(picture.resize(target, Image.Resampling.BICUBIC))
        height, width = pixels.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def normalize(
    pixels: np.ndarray, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> np.ndarray:
    """Turn uint8 pixels into the network's input, ``(float32(u8 * (1 / 255)) - mean) / std``.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        mean: Three means of the unit range.
        std: Three standard deviations of the unit range.

    Returns:
        float32 (3, H, W).
    """
    table = _levels(tuple(float(m) for m in mean), tuple(float(s) for s in std))
    result = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel in range(3):
        np.take(table[channel], pixels[..., channel], out=result[channel], mode="clip")
    return result


@lru_cache(maxsize=16)
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """The normalized value of each of the 256 levels, float32 (3, 256): exact, and faster."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ConfigError("Image mean and std must be three numbers each, std above 0.")
    unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    means = np.array(mean, dtype=np.float32)[:, None]
    return (unit - means) / np.array(std, dtype=np.float32)[:, None]


def preprocess(
    pixels: np.ndarray,
    *,
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> np.ndarray:
    """The preprocessing of the published system, bitwise: ``resize_and_crop``, ``normalize``.

    Shortest edge to ``size`` (Pillow bicubic on uint8, longest edge rounded down), center crop
    with offsets rounded down. uint8 (H, W, 3) of any size from 1x1 up to float32 (3, size, size).
    """
    return normalize(resize_and_crop(pixels, size), mean, std)


def pad_to_square(pixels: np.ndarray, fill: tuple[int, int, int] = (122, 116, 104)) -> np.ndarray:
    """Center the picture on a square of its longest edge; uint8 (H, W, 3) to (L, L, 3)."""
    height, width = pixels.shape[:2]
    if height == width:
        return pixels
    edge = max(height, width)
    square = np.empty((edge, edge, 3), dtype=np.uint8)
    square[:] = fill
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def padded_square(pixels: np.ndarray, size: int) -> np.ndarray | None:
    """All of a picture on a square, scaled: uint8 (H, W, 3) to (S, S, 3); None for a square one."""
    height, width = pixels.shape[:2]
    if height == width:
        return None
    if max(height, width) > _LONGEST_PADDED:
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        picture.thumbnail((_LONGEST_PADDED, _LONGEST_PADDED))
        pixels = np.asarray(picture)
    return resize_and_crop(pad_to_square(pixels), size)


def explainer_views(
    pixels: np.ndarray, *, size: int, mean: Sequence[float], std: Sequence[float], aspect: str
) -> tuple[np.ndarray, np.ndarray]:
    """What an explainer's CLIP tower and its backbone see of a picture.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        size: Edge of the network's input in pixels.
        mean: As for ``normalize``.
        std: As for ``normalize``.
        aspect: ``pad``: CLIP sees all of the picture on a square; ``square``: its center. The
            backbone always sees the center.

    Returns:
        Two float32 (3, size, size); one array twice where both see the same.
    """
    center = preprocess(pixels, size=size, mean=mean, std=std)
    padded = padded_square(pixels, size) if aspect == "pad" else None
    return (center if padded is None else normalize(padded, mean, std)), center
