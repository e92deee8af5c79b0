"""Safe reading of pictures: from a file or bytes to upright RGB pixels, or to a stated reason.

Files are only ever read. ICC profiles are not applied: the published system does not either.
"""

from __future__ import annotations

import hashlib
import io
import stat
import struct
import threading
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from m2f2cli.errors import InputError
from m2f2cli.files import sha256_of

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
# Imported here, once. Pillow would import them at the first file that needs them, and when several
# threads do that at the same time it can lose one for good.
for _plugin in ("Jpeg", "Mpo", "Png", "WebP", "Bmp", "Tiff"):
    import_module(f"PIL.{_plugin}ImagePlugin")
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff"}
)
MAX_PIXELS = 178_956_970 // 2
MAX_BYTES = 512 * 2**20
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"II*\0", b"MM\0*")
# What Pillow's decoders raise on damaged data.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, zlib.error, ZeroDivisionError, NotImplementedError, RuntimeError,
)  # fmt: skip
# ``warnings.catch_warnings`` is global: one thread at a time.
_warnings_lock = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """A decoded picture."""

    # uint8 (H, W, 3), RGB, upright: the EXIF orientation has been applied. Read-only.
    pixels: np.ndarray
    sha256: str  # of the file's bytes, hexadecimal
    format: str  # one of FORMATS
    note: str | None = None  # what a user should know about the reading; None mostly

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


def read_picture(source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a picture of an allowed format, whatever its name says.

    Transparent parts are laid over white; gray, palette, CMYK and 16-bit pictures become 8-bit
    RGB; of several pictures in one file the first is taken.

    Args:
        source: A file, or its bytes.
        max_pixels: Pictures with more are refused before they are decoded.

    Raises:
        InputError: With the status ``missing``, ``unreadable``, ``empty``, ``not_an_image``,
            ``truncated`` or ``too_large``.
    """
    if isinstance(source, bytes):
        name, data = "The picture", source
    else:
        name, data = f"'{source}'", read_bytes(Path(source))
    if not data:
        raise InputError(f"{name} is empty.", "empty", "Copy the file again.")
    with _open(name, data, max_pixels) as picture:
        # MPO is a JPEG with a second view behind it.
        format_ = "JPEG" if picture.format == "MPO" else str(picture.format)
        try:
            picture.load()
            several = picture.format != "MPO" and getattr(picture, "is_animated", False)
            upright = picture
            with suppress(*_DECODE_ERRORS):  # unreadable EXIF says nothing about which side is up
                upright = ImageOps.exif_transpose(picture)
            pixels = np.ascontiguousarray(_rgb(upright))
        except _DECODE_ERRORS as error:
            raise _damaged(name, data, error) from error
    pixels.flags.writeable = False
    note = "the first of several pictures in the file" if several else None
    return Picture(pixels, hashlib.sha256(data).hexdigest(), format_, note)


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file whole.

    Raises:
        InputError: With the status ``missing``, ``unreadable`` or ``too_large``.
    """
    size = check_file(path)
    if size > max_bytes:
        raise InputError(
            f"'{path}' has {size:,} bytes, more than the {max_bytes:,} that are read.",
            "too_large",
            "Save the picture smaller.",
        )
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise unreadable(path, error) from error


def file_sha256(path: Path) -> str:
    """Of a file's bytes, hexadecimal; it is read in parts.

    Raises:
        InputError: With the status ``missing`` or ``unreadable``.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise unreadable(path, error) from error


def check_file(path: Path) -> int:
    """Make sure that a path is a regular file and return its size in bytes.

    Raises:
        InputError: With the status ``missing`` or ``unreadable``.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"'{path}' is a folder, not a file.", "unreadable", "Name a file in it.")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"'{path}' is not a regular file.", "unreadable", "Copy it to a file.")
    return found.st_size


def unreadable(path: Path, error: Exception) -> InputError:
    """The input error for what the operating system answered."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return InputError(f"There is no file '{path}'.", "missing", "Check the path.")
    if isinstance(error, PermissionError):
        return InputError(f"'{path}' may not be read.", "unreadable", f"chmod u+r '{path}'")
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"'{path}' cannot be read: {reason}.", "unreadable")


def _open(name: str, data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only."""
    too_large = f"{name} has more than the {max_pixels:,} pixels that are decoded."
    hint = "Save the picture smaller."
    try:
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(too_large, "too_large", hint) from error
    except UnidentifiedImageError as error:
        if data.startswith(_MAGIC) and _ends_early(data):
            raise _damaged(name, data, error) from error
        raise InputError(
            f"{name} is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture.", "not_an_image"
        ) from error
    except _DECODE_ERRORS as error:
        raise _damaged(name, data, error) from error
    width, height = picture.size
    if width * height > max_pixels:
        picture.close()
        raise InputError(f"{too_large[:-1]}: {width}x{height}.", "too_large", hint)
    return picture


def _damaged(name: str, data: bytes, error: Exception) -> InputError:
    if "truncated" in str(error).lower() or _ends_early(data):
        return InputError(f"{name} ends too early: the picture is cut off.", "truncated")
    return InputError(f"{name} is damaged and cannot be decoded.", "unreadable")


def _ends_early(data: bytes) -> bool:
    """Whether a picture that failed to decode lacks its end, by its format's own marks."""
    if data.startswith(_MAGIC[0]):
        return not data.rstrip(b"\0").endswith(b"\xff\xd9")
    if data.startswith(_MAGIC[1]):
        return b"IEND" not in data[-64:]
    if data.startswith(b"RIFF"):
        return len(data) < 12 or int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(b"BM"):
        return len(data) < 54 or int.from_bytes(data[2:6], "little") > len(data)
    # Where a TIFF file says that its first directory begins.
    directory = int.from_bytes(data[4:8], "little" if data.startswith(b"II") else "big")
    return len(data) < 64 or directory + 2 > len(data)


def _rgb(picture: Image.Image) -> np.ndarray:
    """8-bit RGB pixels (H, W, 3) of a picture of any mode."""
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return np.asarray(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        return np.repeat(_eight_bits(np.asarray(picture))[..., None], 3, axis=2)
    if picture.has_transparency_data:
        colors = picture.convert("RGBA")
        if colors.getchannel("A").getextrema() != (255, 255):
            colors = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), colors)
        return np.asarray(colors.convert("RGB"))
    return np.asarray(picture.convert("RGB"))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale gray levels deeper than 8 bits; the depth is told by the type or the largest value."""
    if values.dtype.itemsize == 2:
        top = 65535.0
    else:
        values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
        largest = float(values.max(initial=0.0))
        steps = (1.0, 255.0, 65535.0, 2.0**32 - 1)
        usable = steps if values.dtype.kind == "f" and largest <= 1.0 else steps[1:]
        top = next((step for step in usable if largest <= step), largest)
    return np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)
