"""Random changes of training pictures: geometry, color, blur, compression, erasing.

Pictures are uint8 RGB arrays of shape (H, W, 3). Random choices are drawn from the
``numpy.random.Generator`` that the caller passes, so equal generators give equal pictures.
"""

from __future__ import annotations

import fractions
import io
import math

import numpy as np
from PIL import Image, ImageFilter

from m2f2cli.errors import ConfigError
from m2f2cli.options.training_pictures import AugmentOptions

_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


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


def compress_h264(pixels: np.ndarray, crf: int = 40) -> np.ndarray:
    """Encode as an H.264 video of one still picture (libx264, 4:2:0) and decode it.

    FaceForensics++ calls crf 23 and 40 "c23" and "c40".

    Args:
        pixels: uint8 (H, W, 3), RGB.
        crf: Constant rate factor, 0 (lossless) to 51.
    """
    import av

    if not 0 <= crf <= 51:
        raise ConfigError(f"'crf' must be between 0 and 51, not {crf}.")
    height, width = pixels.shape[:2]
    # 4:2:0 needs even edges.
    coded = (max(2, round(width / 2) * 2), max(2, round(height / 2) * 2))
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height = coded
    encoder.pix_fmt = "yuv420p"
    encoder.time_base = fractions.Fraction(1, 25)
    encoder.options = {"crf": str(crf), "preset": "medium", "tune": "zerolatency"}
    decoder = av.CodecContext.create("h264", "r")
    encoder.thread_count = decoder.thread_count = 1
    still = av.VideoFrame.from_ndarray(resized(pixels, coded), format="rgb24")
    still = still.reformat(format="yuv420p")
    still.pts = 0
    packets = [*encoder.encode(still), *encoder.encode(None)]
    decoded = [frame for packet in packets for frame in decoder.decode(packet)]
    decoded += decoder.decode(None)
    return resized(decoded[-1].to_ndarray(format="rgb24"), (width, height))


def resized(
    pixels: np.ndarray,
    size: tuple[int, int],
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """Pixels at (width, height)."""
    if pixels.shape[1::-1] == size:
        return np.ascontiguousarray(pixels)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(picture.resize(size, resampling))


def screenshot(pixels: np.ndarray, change: float, rng: np.random.Generator) -> np.ndarray:
    """Show at another size, 1 - ``change`` to 1 + ``change`` times its own, and keep without loss.

    A PNG file holds what is shown, so none is written. The size of the result differs.
    """
    return _scaled(pixels, rng.uniform(1 - change, 1 + change), rng)


def messenger(pixels: np.ndarray, hops: int, rng: np.random.Generator) -> np.ndarray:
    """Shrink to 0.7 to 1 times its size, JPEG of quality 60 to 85, once a hop."""
    for _ in range(hops):
        small = _scaled(pixels, rng.uniform(0.7, 1.0), rng)
        pixels = compress_jpeg(small, int(rng.integers(60, 85, endpoint=True)))
    return pixels


def _scaled(pixels: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return resized(pixels, size, _FILTERS[int(rng.integers(len(_FILTERS)))])


def resend(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a messenger, a screenshot or a video makes of a picture, drawn by chance; same shape."""
    choice = int(rng.integers(3))
    if choice == 0:
        sent = messenger(pixels, int(rng.integers(1, 2, endpoint=True)), rng)
    elif choice == 1:
        sent = screenshot(pixels, rng.uniform(0.1, 0.5), rng)
    else:
        sent = compress_h264(pixels, int(rng.integers(20, 34, endpoint=True)))
    return resized(sent, (pixels.shape[1], pixels.shape[0]))


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
    """Scale brightness, contrast (about the mean) and saturation, and turn the hue of RGB pixels.

    All are factors that change nothing at 1, but the hue: turns of the color wheel, -0.5 to 0.5.
    """
    to_yiq = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32)
    cosine, sine = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    x, y = saturation * cosine, saturation * sine
    turn = np.array([[1, 0, 0], [0, x, -y], [0, y, x]], np.float32)
    matrix = np.linalg.inv(to_yiq) @ turn @ to_yiq * np.float32(brightness)
    values = pixels.reshape(-1, 3).astype(np.float32) @ matrix.T.astype(np.float32)
    if contrast != 1.0:
        gray = np.float32(float(values.mean(axis=0) @ _LUMA))
        values = gray + (values - gray) * np.float32(contrast)
    return to_uint8(values).reshape(pixels.shape)


def affine(
    pixels: np.ndarray,
    *,
    degrees: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Turn and scale about the center, then shift; the border is repeated outwards.

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


def augment(
    pixels: np.ndarray,
    mask: np.ndarray | None,
    options: AugmentOptions,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Change a picture at random; a mask moves along with it.

    Each change happens with its own probability (0 switches it off) and draws its strength evenly
    from its range.

    Args:
        pixels: uint8 (H, W, 3), RGB; not changed.
        mask: float32 (H, W), or None. Only the geometry touches it.
        options: Probabilities and ranges.
        rng: Source of every random choice.
    """
    pixels, mask = _move(pixels, mask, options, rng)
    if rng.random() < options.color:
        factors = {
            name: 1 + rng.uniform(-getattr(options, name), getattr(options, name))
            for name in ("brightness", "contrast", "saturation")
        }
        pixels = adjust_color(pixels, hue=rng.uniform(-options.hue, options.hue), **factors)
    if rng.random() < options.blur:
        pixels = gaussian_blur(pixels, rng.uniform(*options.blur_sigma))
    if rng.random() < options.rescale:
        pixels = rescale(pixels, rng.uniform(*options.rescale_factor))
    if rng.random() < options.noise:
        pixels = add_noise(pixels, rng.uniform(*options.noise_sigma), rng)
    if options.resend and rng.random() < options.resend:  # without it, the draws stay as they were
        pixels = resend(pixels, rng)
    if rng.random() < options.jpeg:
        quality = int(rng.integers(*options.jpeg_quality, endpoint=True))
        pixels = compress_jpeg(pixels, quality)
    if rng.random() < options.erase:
        pixels = _erase(pixels, rng.uniform(*options.erase_area), rng)
    return np.ascontiguousarray(pixels), mask


def _move(
    pixels: np.ndarray, mask: np.ndarray | None, options: AugmentOptions, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """The changes of geometry: flip, affine, crop."""
    if rng.random() < options.flip:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
        mask = None if mask is None else np.ascontiguousarray(mask[:, ::-1])
    if rng.random() < options.affine:
        degrees = rng.uniform(-options.degrees, options.degrees)
        scale = 1 + rng.uniform(-options.zoom, options.zoom)
        shift = tuple(rng.uniform(-options.shift, options.shift, 2))
        pixels = affine(pixels, degrees=degrees, scale=scale, shift=shift)
        if mask is not None:
            mask = affine(mask, degrees=degrees, scale=scale, shift=shift)
    if rng.random() < options.crop:
        height, width = pixels.shape[:2]
        scale = rng.uniform(*options.crop_scale)
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
