"""Random changes of training pictures: geometry, colour, blur, compression, erasing.

Pictures are uint8 RGB arrays of shape (H, W, 3). Random choices are drawn from the
``numpy.random.Generator`` that the caller passes, so equal generators give equal pictures.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageFilter

from m2f2cli.errors import ConfigError

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_PROBABILITIES = (
    "flip", "affine", "crop", "color", "blur", "rescale", "noise", "jpeg", "erase",
)  # fmt: skip


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Round and clip float pixels on the 0-255 scale to uint8."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a standard deviation of ``sigma`` pixels (Pillow's three-box approximation)."""
    if sigma <= 0:
        return pixels
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def compress_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Write as JPEG of the given quality (1-100, 4:2:0) in memory and read it back."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    buffer.seek(0)
    with Image.open(buffer) as picture:
        return np.asarray(picture.convert("RGB"))


def rescale(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Shrink by ``factor`` (0 to 1) and enlarge back: the loss of a small or distant face."""
    height, width = pixels.shape[:2]
    small = (max(1, round(width * factor)), max(1, round(height * factor)))
    picture = Image.fromarray(pixels).resize(small, Image.Resampling.BILINEAR)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def add_noise(pixels: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise with a standard deviation of ``sigma`` levels (of 255)."""
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    return to_uint8(pixels + noise * sigma)


def adjust_color(
    pixels: np.ndarray,
    *,
    brightness: float = 1.0,
    contrast: float = 1.0,
    saturation: float = 1.0,
    hue: float = 0.0,
) -> np.ndarray:
    """Scale brightness, contrast (about the mean) and saturation, and turn the hue.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        brightness: Factor, 1 changes nothing.
        contrast: Factor, 1 changes nothing.
        saturation: Factor, 0 is grey, 1 changes nothing.
        hue: Turn of the colour wheel, in turns (-0.5 to 0.5).
    """
    to_yiq = np.array(
        [_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=np.float32
    )
    cosine, sine = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    turn = np.array(
        [
            [1, 0, 0],
            [0, saturation * cosine, -saturation * sine],
            [0, saturation * sine, saturation * cosine],
        ],
        dtype=np.float32,
    )
    matrix = np.linalg.inv(to_yiq) @ turn @ to_yiq * np.float32(brightness)
    values = pixels.reshape(-1, 3).astype(np.float32) @ matrix.T.astype(np.float32)
    if contrast != 1.0:
        grey = np.float32(float(values.mean(axis=0) @ _LUMA))
        values = grey + (values - grey) * np.float32(contrast)
    return to_uint8(values).reshape(pixels.shape)


def affine(
    pixels: np.ndarray,
    *,
    degrees: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Turn and scale about the centre, then shift; the border is repeated outwards.

    Args:
        pixels: uint8 (H, W, 3) or float32 (H, W).
        degrees: Turn, counter-clockwise.
        scale: Enlargement, 1 changes nothing.
        shift: Right and down, as fractions of the width and height.
    """
    height, width = pixels.shape[:2]
    margin = math.ceil(
        max(height, width)
        * (0.5 * (abs(math.sin(math.radians(degrees))) + abs(1 / scale - 1)) + max(map(abs, shift)))
    )
    border = ((margin, margin), (margin, margin), (0, 0))[: pixels.ndim]
    padded = Image.fromarray(np.pad(pixels, border, mode="edge"))
    cosine = math.cos(math.radians(degrees)) / scale
    sine = math.sin(math.radians(degrees)) / scale
    x, y = width / 2, height / 2
    to_x, to_y = x + shift[0] * width, y + shift[1] * height
    matrix = (
        cosine, -sine, x + margin - cosine * to_x + sine * to_y,
        sine, cosine, y + margin - sine * to_x - cosine * to_y,
    )  # fmt: skip
    moved = padded.transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(moved)


def crop_and_resize(pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Cut (x0, y0, x1, y1) and enlarge it to the shape of the input."""
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels)
    resampling = Image.Resampling.BICUBIC if pixels.ndim == 3 else Image.Resampling.BILINEAR
    return np.asarray(picture.resize((width, height), resampling, box=box))


@dataclass(frozen=True)
class Augment:
    """A chain of random changes: geometry, colour, blur, rescaling, noise, JPEG, erasing.

    Each change happens with its own probability (0 switches it off) and draws its strength evenly
    from its range. The defaults are the published training's: blur, JPEG and flip.

    Args:
        flip: Probability of mirroring left and right.
        affine: Probability of a small turn, scaling and shift.
        degrees: Largest turn either way, in degrees.
        zoom: Largest relative change of scale either way.
        shift: Largest move, as a fraction of the edge.
        crop: Probability of cutting a random square and enlarging it.
        crop_scale: Edge of that square as a fraction of the picture's edge (low, high).
        color: Probability of the colour jitter.
        brightness: Largest relative change of brightness.
        contrast: Largest relative change of contrast.
        saturation: Largest relative change of saturation.
        hue: Largest turn of the hue, in turns.
        blur: Probability of a Gaussian blur.
        blur_sigma: Its standard deviation in pixels (low, high).
        rescale: Probability of shrinking and enlarging back.
        rescale_factor: The shrunk size as a fraction (low, high).
        noise: Probability of Gaussian noise.
        noise_sigma: Its standard deviation in levels of 255 (low, high).
        jpeg: Probability of JPEG compression.
        jpeg_quality: Its quality (low, high), 1-100.
        erase: Probability of overwriting a rectangle with its mean colour and noise.
        erase_area: The rectangle's area as a fraction (low, high).
    """

    flip: float = 0.5
    affine: float = 0.0
    degrees: float = 8.0
    zoom: float = 0.05
    shift: float = 0.03
    crop: float = 0.0
    crop_scale: tuple[float, float] = (0.8, 1.0)
    color: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02
    blur: float = 0.1
    blur_sigma: tuple[float, float] = (0.0, 3.0)
    rescale: float = 0.0
    rescale_factor: tuple[float, float] = (0.4, 0.9)
    noise: float = 0.0
    noise_sigma: tuple[float, float] = (1.0, 8.0)
    jpeg: float = 0.1
    jpeg_quality: tuple[int, int] = (30, 100)
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.1)

    def __post_init__(self) -> None:
        for name in (
            "flip",
            "affine",
            "crop",
            "color",
            "blur",
            "rescale",
            "noise",
            "jpeg",
            "erase",
        ):
            _check(name, getattr(self, name), 0.0, 1.0)
        for name, limit in (("zoom", 0.5), ("shift", 0.5), ("degrees", 180.0), ("hue", 0.5)):
            _check(name, getattr(self, name), 0.0, limit)
        for name in ("brightness", "contrast", "saturation"):
            _check(name, getattr(self, name), 0.0, 1.0)
        for name, low, high in (
            ("crop_scale", 0.05, 1.0),
            ("blur_sigma", 0.0, 100.0),
            ("rescale_factor", 0.01, 1.0),
            ("noise_sigma", 0.0, 255.0),
            ("jpeg_quality", 1, 100),
            ("erase_area", 0.0, 1.0),
        ):
            pair = getattr(self, name)
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or pair[0] > pair[1]:
                raise ConfigError(f"'{name}' must be two numbers, low then high, not {pair!r}.")
            for value in pair:
                _check(name, value, low, high)
            object.__setattr__(self, name, tuple(pair))

    @classmethod
    def none(cls) -> Augment:
        """A chain that changes nothing."""
        return cls(flip=0.0, blur=0.0, jpeg=0.0)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Augment:
        """Build from a configuration mapping.

        Raises:
            ConfigError: A name is unknown or a value is out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(
                f"Unknown augmentation '{unknown[0]}'.", f"Use one of: {', '.join(known)}."
            )
        return cls(**values)  # type: ignore[arg-type]

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a changed copy of uint8 (H, W, 3), same shape."""
        return self.apply(pixels, None, rng)[0]

    def apply(
        self, pixels: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Change the pixels and move a mask along with them.

        Args:
            pixels: uint8 (H, W, 3), RGB.
            mask: float32 (H, W), or None. Only the geometry touches it.
            rng: Source of every random choice.

        Returns:
            The changed pixels and mask, same shapes.
        """
        pixels, mask = self._geometry(pixels, mask, rng)
        if rng.random() < self.color:
            factors = {
                name: 1 + rng.uniform(-getattr(self, name), getattr(self, name))
                for name in ("brightness", "contrast", "saturation")
            }
            pixels = adjust_color(pixels, hue=rng.uniform(-self.hue, self.hue), **factors)
        if rng.random() < self.blur:
            pixels = gaussian_blur(pixels, rng.uniform(*self.blur_sigma))
        if rng.random() < self.rescale:
            pixels = rescale(pixels, rng.uniform(*self.rescale_factor))
        if rng.random() < self.noise:
            pixels = add_noise(pixels, rng.uniform(*self.noise_sigma), rng)
        if rng.random() < self.jpeg:
            low, high = self.jpeg_quality
            pixels = compress_jpeg(pixels, int(rng.integers(low, high, endpoint=True)))
        if rng.random() < self.erase:
            pixels = _erase(pixels, rng.uniform(*self.erase_area), rng)
        return np.ascontiguousarray(pixels), mask

    def _geometry(
        self, pixels: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        if rng.random() < self.flip:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
            mask = None if mask is None else np.ascontiguousarray(mask[:, ::-1])
        if rng.random() < self.affine:
            degrees = rng.uniform(-self.degrees, self.degrees)
            scale = 1 + rng.uniform(-self.zoom, self.zoom)
            shift = tuple(rng.uniform(-self.shift, self.shift, 2))
            pixels = affine(pixels, degrees=degrees, scale=scale, shift=shift)
            if mask is not None:
                mask = affine(mask, degrees=degrees, scale=scale, shift=shift)
        if rng.random() < self.crop:
            height, width = pixels.shape[:2]
            scale = rng.uniform(*self.crop_scale)
            rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
            top = int(rng.integers(0, height - rows, endpoint=True))
            left = int(rng.integers(0, width - columns, endpoint=True))
            box = (left, top, left + columns, top + rows)
            pixels = crop_and_resize(pixels, box)
            mask = None if mask is None else crop_and_resize(mask, box)
        return pixels, mask


def _erase(pixels: np.ndarray, area: float, rng: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    ratio = math.exp(rng.uniform(-0.7, 0.7))
    rows = min(height, max(1, round(math.sqrt(area * ratio) * height)))
    columns = min(width, max(1, round(math.sqrt(area / ratio) * width)))
    top = int(rng.integers(0, height - rows, endpoint=True))
    left = int(rng.integers(0, width - columns, endpoint=True))
    result = pixels.copy()
    window = result[top : top + rows, left : left + columns]
    fill = np.broadcast_to(window.mean(axis=(0, 1), dtype=np.float32), window.shape)
    result[top : top + rows, left : left + columns] = to_uint8(
        fill + rng.standard_normal(window.shape, dtype=np.float32) * 16
    )
    return result


def _check(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"'{name}' must be between {low} and {high}, not {value!r}.")
