"""Pseudo-forgeries made from real face crops, for training a detector that knows few manipulations.

Each maker takes aligned face crops, uint8 RGB (H, W, 3), as ``crop_face`` cuts them (the face fills
most of the square), and returns the forged pixels and a float32 (H, W) mask in [0, 1] that says
where and how strongly they were changed. Nothing looks for landmarks: the parts of a face sit at
their usual places in such a crop, jittered. Equal generators give equal forgeries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from m2f2cli.data.augment import (
    add_noise,
    adjust_color,
    affine,
    compress_jpeg,
    gaussian_blur,
    rescale,
    resized,
    to_uint8,
)
from m2f2cli.errors import ConfigError

KINDS = ("self_blend", "swap_blend", "mouth_warp", "expression_warp")


class Region(NamedTuple):
    """An ellipse in a crop: center and radii as fractions of the width and height."""

    x: float
    y: float
    width: float
    height: float

    def grown(self, factor: float) -> Region:
        """The same with longer radii."""
        return self._replace(width=self.width * factor, height=self.height * factor)

    def jittered(self, rng: np.random.Generator) -> Region:
        """A little elsewhere and of another size."""
        x, y = self.x + rng.normal(0, 0.012), self.y + rng.normal(0, 0.012)
        return Region(x, y, self.width * rng.uniform(0.9, 1.1), self.height * rng.uniform(0.9, 1.1))


FACE = Region(0.50, 0.52, 0.34, 0.42)
INNER_FACE = Region(0.50, 0.50, 0.27, 0.33)
LOWER_FACE = Region(0.50, 0.68, 0.28, 0.24)
UPPER_FACE = Region(0.50, 0.32, 0.32, 0.18)
MOUTH = Region(0.49, 0.66, 0.20, 0.13)
NOSE = Region(0.49, 0.50, 0.12, 0.14)
EYES = (Region(0.32, 0.31, 0.13, 0.09), Region(0.66, 0.31, 0.13, 0.09))


class Forgery(NamedTuple):
    """A pseudo-forgery: uint8 (H, W, 3) pixels, float32 (H, W) mask in [0, 1], its kind."""

    pixels: np.ndarray
    mask: np.ndarray
    kind: str


def forge(
    pixels: np.ndarray,
    rng: np.random.Generator,
    *,
    kind: str | None = None,
    other: np.ndarray | None = None,
) -> Forgery:
    """Make a pseudo-forgery of one kind.

    Args:
        pixels: A real face crop, uint8 (H, W, 3).
        rng: Source of every random choice.
        kind: One of ``KINDS``; by default any of them, ``swap_blend`` only if there is ``other``.
        other: A crop of another person for ``swap_blend``, any size.

    Raises:
        ConfigError: The kind is unknown, or needs another face and there is none.
    """
    if kind is None:
        possible = [name for name in KINDS if name != "swap_blend" or other is not None]
        kind = possible[int(rng.integers(len(possible)))]
    if kind not in KINDS:
        raise ConfigError(f"Unknown forgery '{kind}'.", f"Use one of: {', '.join(KINDS)}.")
    if kind != "swap_blend":
        makers = {
            "self_blend": self_blend,
            "mouth_warp": mouth_warp,
            "expression_warp": expression_warp,
        }
        return Forgery(*makers[kind](pixels, rng), kind)
    if other is None:
        raise ConfigError("'swap_blend' needs a face of another person.")
    return Forgery(*swap_blend(pixels, other, rng), kind)


def self_blend(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Blend two differently treated copies of one face through a soft mask.

    One copy gets other colors, another sharpness and a slight move: the seams of a face swap
    without its new identity.
    """
    treated, plain = _recolor(pixels, rng), pixels
    if rng.random() < 0.5:
        treated, plain = plain, treated
    treated = affine(
        _resharpen(treated, rng),
        degrees=rng.uniform(-3, 3),
        scale=rng.uniform(0.95, 1.05),
        shift=(rng.uniform(-0.03, 0.03), rng.uniform(-0.015, 0.015)),
    )
    if rng.random() < 0.5:
        treated = warp(treated, *_elastic(pixels.shape[:2], rng, 0.008))
    regions = (FACE, FACE, INNER_FACE, INNER_FACE, LOWER_FACE, UPPER_FACE, MOUTH, NOSE)
    mask = soft_blob(pixels.shape[:2], regions[int(rng.integers(len(regions)))], rng)
    strength = (0.5, 0.75, 1.0, 1.0)[int(rng.integers(4))]
    return blend(plain, treated, mask * np.float32(strength)), mask * np.float32(strength)


def swap_blend(
    pixels: np.ndarray, other: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Put the face of ``other``, a crop of any size, or a part of it on this head.

    Its colors are partly matched.
    """
    height, width = pixels.shape[:2]
    other = resized(other, (width, height))
    if rng.random() < 0.5:
        other = np.ascontiguousarray(other[:, ::-1])
    other = affine(
        other,
        degrees=rng.uniform(-4, 4),
        scale=rng.uniform(0.94, 1.06),
        shift=(rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02)),
    )
    regions = (FACE, FACE, INNER_FACE, INNER_FACE, LOWER_FACE, UPPER_FACE, MOUTH, NOSE)
    region = regions[int(rng.integers(len(regions)))]
    mask = soft_blob((height, width), region, rng)
    other = match_color(other, pixels, mask, rng.uniform(0.4, 1.0))
    # Most often as if decoded by a network of few pixels.
    low_resolution = rng.random() < 0.6
    other = rescale(other, rng.uniform(0.3, 0.8)) if low_resolution else _resharpen(other, rng)
    return blend(pixels, other, mask), mask


def mouth_warp(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Reshape the mouth and draw it again a little softer, as neural re-rendering does."""
    region = MOUTH.jittered(rng)
    dx, dy = _mouth_field(pixels.shape[:2], region, rng)
    moved = _rendered(warp(pixels, dx, dy), rng)
    mask = soft_blob(pixels.shape[:2], region.grown(rng.uniform(1.1, 1.7)), rng)
    return blend(pixels, moved, mask), mask


def expression_warp(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Move mouth, eyes and brows a little and draw the whole face again, as reenactment does."""
    shape = pixels.shape[:2]
    dx, dy = _elastic(shape, rng, rng.uniform(0.002, 0.008))
    steps = [_mouth_field(shape, MOUTH.jittered(rng), rng)]
    lift, squint = rng.uniform(-0.03, 0.03), rng.uniform(-0.35, 0.35)
    for eye in EYES:
        region = eye.jittered(rng)
        weight, _, v = _bump(shape, region)
        one_eye = weight * np.float32(lift * shape[0])
        steps.append((np.zeros_like(one_eye), one_eye + weight * v * np.float32(squint)))
    for step_x, step_y in steps:
        dx, dy = dx + step_x, dy + step_y
    moved = _rendered(warp(pixels, dx, dy), rng)
    mask = soft_blob(shape, FACE, rng)
    return blend(pixels, moved, mask), mask


def blend(base: np.ndarray, over: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``over`` where the (H, W) mask is 1, ``base`` where it is 0; uint8 in and out."""
    weight = mask[..., None]
    return to_uint8(base + weight * (over.astype(np.float32) - base))


def warp(pixels: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Fetch each pixel from (x + dx, y + dy), bilinear, the border repeated outwards.

    ``dx`` and ``dy`` are float32 (H, W), in pixels.
    """
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x = np.clip(x + dx, 0, width - 1)
    y = np.clip(y + dy, 0, height - 1)
    left, top = x.astype(np.int32), y.astype(np.int32)
    right, low = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    wx, wy = (x - left)[..., None], (y - top)[..., None]
    values = pixels.astype(np.float32)
    upper = values[top, left] * (1 - wx) + values[top, right] * wx
    lower = values[low, left] * (1 - wx) + values[low, right] * wx
    return to_uint8(upper * (1 - wy) + lower * wy)


def soft_blob(shape: tuple[int, int], region: Region, rng: np.random.Generator) -> np.ndarray:
    """A jittered, elastically deformed ellipse with a soft edge; float32 (H, W) in [0, 1]."""
    height, width = shape
    region = region.grown(rng.uniform(0.85, 1.12)).jittered(rng)
    dx, dy = _elastic(shape, rng, rng.uniform(0.008, 0.026))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u = np.abs((x + dx) / width - region.x) / region.width
    v = np.abs((y + dy) / height - region.y) / region.height
    power = np.float32(rng.uniform(1.8, 3.0))
    distance = (u**power + v**power) ** (1 / power)
    edge = rng.uniform(0.04, 0.35)
    ramp = np.clip((1 - distance) / edge + 0.5, 0, 1)
    return (ramp * ramp * (3 - 2 * ramp)).astype(np.float32)


def match_color(
    pixels: np.ndarray, like: np.ndarray, mask: np.ndarray, strength: float
) -> np.ndarray:
    """Shift each channel's mean and spread under the mask towards those of ``like``.

    Both are uint8 (H, W, 3), the mask float32 (H, W); strength 0 changes nothing, 1 matches fully.
    """
    where = mask > 0.5
    if where.sum() < 16:
        return pixels
    own, wanted = pixels[where].astype(np.float32), like[where].astype(np.float32)
    mean, spread = own.mean(axis=0), own.std(axis=0) + 1.0
    gain = np.clip((wanted.std(axis=0) + 1.0) / spread, 0.5, 2.0)
    matched = (pixels - mean) * gain + wanted.mean(axis=0)
    return to_uint8(pixels + np.float32(strength) * (matched - pixels))


def _recolor(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A visible but believable change of colors."""
    changed = adjust_color(
        pixels,
        brightness=rng.uniform(0.88, 1.12),
        contrast=rng.uniform(0.88, 1.12),
        saturation=rng.uniform(0.75, 1.25),
        hue=rng.uniform(-0.025, 0.025),
    )
    return to_uint8(changed + rng.uniform(-12, 12, 3).astype(np.float32))


def _resharpen(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    choice = int(rng.integers(5))
    if choice == 0:
        return gaussian_blur(pixels, rng.uniform(0.4, 1.6))
    if choice == 1:
        return rescale(pixels, rng.uniform(0.4, 0.8))
    if choice == 2:
        sharper = ImageFilter.UnsharpMask(rng.uniform(1, 3), int(rng.integers(40, 120)), 0)
        return np.asarray(Image.fromarray(pixels).filter(sharper))
    if choice == 3:
        return compress_jpeg(pixels, int(rng.integers(25, 70)))
    return pixels


def _rendered(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a renderer leaves: softer detail, a slight tint, sometimes other noise."""
    if rng.random() < 0.5:
        pixels = gaussian_blur(pixels, rng.uniform(0.4, 1.4))
    else:
        pixels = rescale(pixels, rng.uniform(0.4, 0.8))
    if rng.random() < 0.6:
        tint = rng.uniform(-6, 6, 3).astype(np.float32)
        pixels = to_uint8(pixels * np.float32(rng.uniform(0.96, 1.04)) + tint)
    if rng.random() < 0.3:
        pixels = add_noise(pixels, rng.uniform(1, 4), rng)
    return pixels


def _elastic(
    shape: tuple[int, int], rng: np.random.Generator, amplitude: float
) -> tuple[np.ndarray, np.ndarray]:
    """A smooth random displacement in pixels; ``amplitude`` is its spread in picture widths."""
    height, width = shape
    knots = int(rng.integers(4, 8))
    fields = []
    for edge in (width, height):
        grid = rng.standard_normal((knots, knots), dtype=np.float32) * np.float32(amplitude * edge)
        smooth = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        fields.append(np.asarray(smooth))
    return fields[0], fields[1]


def _bump(shape: tuple[int, int], region: Region) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A smooth hill over the region, and the signed distances from its center in pixels."""
    height, width = shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u, v = x - np.float32(region.x * width), y - np.float32(region.y * height)
    square = (u / (region.width * width)) ** 2 + (v / (region.height * height)) ** 2
    return np.exp(-square).astype(np.float32), u, v


def _mouth_field(
    shape: tuple[int, int], region: Region, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Displacements that open, close, widen, purse, bend or push the mouth."""
    weight, u, v = _bump(shape, region)
    height, width = shape
    stretch_x, stretch_y = rng.uniform(-0.3, 0.3), rng.uniform(-0.45, 0.45)
    bend = rng.uniform(-0.05, 0.05) * height
    push_x, push_y = rng.uniform(-0.02, 0.02) * width, rng.uniform(-0.02, 0.02) * height
    skew = rng.uniform(-0.15, 0.15)
    corner = (u / (region.width * width)) ** 2
    dx = weight * (np.float32(stretch_x) * u + np.float32(push_x) + np.float32(skew) * v)
    dy = weight * (np.float32(stretch_y) * v + np.float32(bend) * corner + np.float32(push_y))
    limit = np.float32(0.08 * math.hypot(height, width) / math.sqrt(2))
    return np.clip(dx, -limit, limit), np.clip(dy, -limit, limit)
