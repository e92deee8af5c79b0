"""What happens to pictures on their way.

``CORRUPTIONS``: JPEG, blur, noise, scaling, light, in five severities each. ``CHAINS``: what people
and their programs do to a picture that they pass on, each in one severity.

The severities of corruptions are published ones:

* DeeperForensics-1.0 (Jiang et al., CVPR 2020, arXiv 2001.03024), by its code, ``perturbation/`` in
  github.com/EndlessSora/DeeperForensics-1.0, which LipForensics and later robustness studies of
  deepfake detectors use: Gaussian blur, Gaussian noise in color components, scaling down and up
  (its type "JPEG", which in that code is no JPEG but this), contrast and saturation.
* ImageNet-C (Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261), by its code, ``ImageNet-C/``
  in github.com/hendrycks/robustness: JPEG quality and brightness.

Pictures are uint8 RGB arrays of shape (H, W, 3), changed at the size they have: sigmas are in their
own pixels. NumPy and Pillow only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from m2f2cli.data.augment import (
    adjust_color,
    compress_h264,
    compress_jpeg,
    gaussian_blur,
    messenger,
    rescale,
    screenshot,
    to_uint8,
)
from m2f2cli.errors import ConfigError

SEVERITIES = (1, 2, 3, 4, 5)
# BT.601 video range: 8-bit levels to luma and the two chroma components, and back, in levels.
_TO_RGB = np.array(
    [[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]], dtype=np.float32
)
_RANGE = np.array([255 / 219, 255 / 224, 255 / 224], dtype=np.float32)

Change = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Corruption:
    """One way of making pictures worse."""

    name: str  # as reports spell it
    parameter: str  # what the numbers are
    values: tuple[float, ...]  # one for each severity from 1 on, mildest first
    source: str  # DeeperForensics-1.0, ImageNet-C or m2f2
    change: Change  # gives the changed picture for pixels, a number and a source of random draws

    def value(self, severity: int) -> float:
        """The number of a severity.

        Raises:
            ConfigError: There is no such severity.
        """
        if not 1 <= severity <= len(self.values):
            last = len(self.values)
            raise ConfigError(f"A severity of '{self.name}' is from 1 to {last}, not {severity}.")
        return self.values[severity - 1]

    def apply(self, pixels: np.ndarray, severity: int, seed: str) -> np.ndarray:
        """Corrupt a picture, always in the same way.

        Args:
            pixels: uint8 (H, W, 3), RGB; not changed.
            severity: From 1 to the number of ``values``.
            seed: Decides the random draws together with the name and the severity; the sha256 of
                the picture gives every picture its own.

        Returns:
            uint8 (H, W, 3); of a screenshot or a messenger with another height and width.
        """
        value = self.value(severity)
        digest = hashlib.sha256(f"{self.name} {severity} {seed}".encode()).digest()
        return self.change(pixels, value, np.random.default_rng(list(digest)))


def _noise(pixels: np.ndarray, variance: float, rng: np.random.Generator) -> np.ndarray:
    """Independent noise in luma and chroma, whose variance is given for the unit range."""
    drawn = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(255 * variance**0.5)
    return to_uint8(pixels + (drawn * _RANGE) @ _TO_RGB.T)


def _scaling(pixels: np.ndarray, factor: float, _: np.random.Generator) -> np.ndarray:
    """Down by the factor and up again, both bilinear without smoothing, as OpenCV does it."""
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels)
    for size in ((max(1, int(width / factor)), max(1, int(height / factor))), (width, height)):
        matrix = (picture.width / size[0], 0, 0, 0, picture.height / size[1], 0)
        picture = picture.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _brightness(pixels: np.ndarray, more: float, _: np.random.Generator) -> np.ndarray:
    """Raise the value of HSV (the largest channel) by a share of the range; hue and chroma stay."""
    values = pixels.astype(np.float32)
    brightest = values.max(axis=2, keepdims=True)
    wanted = np.minimum(brightest + np.float32(255 * more), 255)
    scaled = values * (wanted / np.maximum(brightest, 1))
    return to_uint8(np.where(brightest > 0, scaled, wanted))


def _contrast(pixels: np.ndarray, factor: float, _: np.random.Generator) -> np.ndarray:
    """Scale every value towards black, which is what DeeperForensics-1.0 calls contrast."""
    return to_uint8(pixels.astype(np.float32) * np.float32(factor))


_FORENSICS, _IMAGENET, _OWN = "DeeperForensics-1.0", "ImageNet-C", "m2f2"
_TABLE = (
    Corruption(
        "jpeg", "quality", (25, 18, 15, 10, 7), _IMAGENET,
        lambda pixels, quality, _: compress_jpeg(pixels, int(quality)),
    ),
    # The published kernels are 7, 9, 13, 17 and 21 pixels wide, sigma a sixth of that.
    Corruption(
        "blur", "sigma in pixels", (7 / 6, 9 / 6, 13 / 6, 17 / 6, 21 / 6), _FORENSICS,
        lambda pixels, sigma, _: gaussian_blur(pixels, sigma),
    ),
    Corruption("noise", "variance", (0.001, 0.002, 0.005, 0.01, 0.05), _FORENSICS, _noise),
    Corruption("scaling", "down and up by", (2, 3, 4, 5, 6), _FORENSICS, _scaling),
    Corruption("brightness", "raised by", (0.1, 0.2, 0.3, 0.4, 0.5), _IMAGENET, _brightness),
    Corruption("contrast", "scaled to", (0.85, 0.725, 0.6, 0.475, 0.35), _FORENSICS, _contrast),
    Corruption(
        "saturation", "scaled to", (0.4, 0.3, 0.2, 0.1, 0.0), _FORENSICS,
        lambda pixels, factor, _: adjust_color(pixels, saturation=factor),
    ),
)  # fmt: skip
CORRUPTIONS = {corruption.name: corruption for corruption in _TABLE}
_CHAINS = (
    Corruption(
        "jpeg-75", "quality", (75,), _OWN,
        lambda pixels, quality, _: compress_jpeg(pixels, int(quality)),
    ),
    Corruption(
        "half-size", "shrunk to", (0.5,), _OWN, lambda pixels, factor, _: rescale(pixels, factor)
    ),
    Corruption("screenshot", "resized by at most", (0.4,), _OWN, screenshot),
    Corruption(
        "messenger", "hops", (2,), _OWN,
        lambda pixels, hops, rng: messenger(pixels, int(hops), rng),
    ),
    Corruption(
        "h264-28", "constant rate factor", (28,), _OWN,
        lambda pixels, crf, _: compress_h264(pixels, int(crf)),
    ),
)  # fmt: skip
CHAINS = {chain.name: chain for chain in _CHAINS}
GROUPS = {"corruptions": tuple(CORRUPTIONS), "chains": tuple(CHAINS)}


def find_corruptions(names: Iterable[str]) -> dict[str, Corruption]:
    """Corruptions and chains by their names, or by those of ``GROUPS`` for all of a table.

    Raises:
        ConfigError: There is none of a name.
    """
    every = CORRUPTIONS | CHAINS
    single = [one for name in names for one in GROUPS.get(name, (name,))]
    if unknown := [name for name in single if name not in every]:
        raise ConfigError(
            f"There is no corruption '{unknown[0]}'.",
            f"Use some of: {', '.join([*GROUPS, *every])}.",
        )
    return {name: every[name] for name in single}
