"""Safe reading of pictures: from a file or bytes to upright RGB pixels, or to a stated reason.

Files are only ever read. ICC profiles are not applied: the published system does not either.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from m2f2cli.compat import silence_tiff
from m2f2cli.errors import InputError
from m2f2cli.files import sha256_of

_HEIF = find_spec("pillow_heif") is not None
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", *(("HEIF",) if _HEIF else ()))
# Imported here, once. Pillow would import them at the first file that needs them, and when several
# threads do that at the same time it can lose one for good.
for _plugin in ("Jpeg", "Mpo", "Png", "WebP", "Bmp", "Tiff", "Gif", "Avif"):
    import_module(f"PIL.{_plugin}ImagePlugin")
if _HEIF:
    import_module("pillow_heif").register_heif_opener()
silence_tiff()
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs is raised, too
# HEIC is among them without the package that reads it, so that it becomes a record that says so.
IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif",
        ".tiff", ".gif", ".avif", ".avifs", ".heic", ".heif", ".hif",
    }
)  # fmt: skip
MAX_PIXELS = 178_956_970 // 2
MAX_BYTES = 512 * 2**20
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF8")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_PICTURE_BRANDS = (b"avif", b"avis", *_HEIC_BRANDS)
_BAND = 1 << 20  # pixels that are brought to RGB at a time
# What decoders and finders raise on damaged data, beside the errors of their own.
DECODE_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError,
    MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error,
    zlib.error,
)  # fmt: skip
# What EXIF's orientations 2 to 8 do to pixels (H, W, 3).
_UPRIGHT = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: lambda p: np.rot90(p),
}
# Pixels of the picture or frame that each thread in ``sharing_memory`` works on.
_in_flight: dict[int, int] = {}
_room = threading.Condition()
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
        take_memory(picture.width * picture.height)
        try:
            picture.load()
            return _decoded(picture, hashlib.sha256(data).hexdigest())
        except DECODE_ERRORS as error:
            raise _damaged(name, data, error) from error


def picture_of(pixels: Image.Image | np.ndarray) -> Picture:
    """A picture that is in memory; ``sha256`` is that of its pixels as they are read.

    Args:
        pixels: A Pillow image; or uint8 (H, W, 3), RGB, or (H, W), gray.

    Raises:
        InputError: It is neither, or empty, or damaged.
    """
    if isinstance(pixels, np.ndarray):
        gray = pixels.ndim == 2
        if pixels.dtype != np.uint8 or not (gray or (pixels.ndim == 3 and pixels.shape[2] == 3)):
            raise InputError(
                f"An array of {pixels.dtype} {pixels.shape} is no picture: uint8 (H, W, 3), RGB, "
                "or (H, W) is.",
                "not_an_image",
            )
        if not pixels.size:
            raise InputError("The picture has no pixels.", "empty")
        pixels = Image.fromarray(np.ascontiguousarray(pixels))
    try:
        found = _decoded(pixels, "")
    except DECODE_ERRORS as error:
        raise InputError("The picture cannot be decoded.", "unreadable") from error
    if not found.pixels.size:
        raise InputError("The picture has no pixels.", "empty")
    return replace(found, sha256=hashlib.sha256(found.pixels.tobytes()).hexdigest())


def _decoded(picture: Image.Image, sha256: str) -> Picture:
    # MPO is a JPEG with a second view behind it.
    format_ = "JPEG" if picture.format == "MPO" else str(picture.format)
    several = picture.format != "MPO" and getattr(picture, "is_animated", False)
    orientation = None
    with suppress(*DECODE_ERRORS):  # unreadable EXIF says nothing about which side is up
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    pixels = _rgb(picture)
    if orientation in _UPRIGHT:
        pixels = np.ascontiguousarray(_UPRIGHT[orientation](pixels))
    pixels.flags.writeable = False
    note = "the first of several pictures in the file" if several else None
    return Picture(pixels, sha256, format_, note)


@contextmanager
def sharing_memory() -> Iterator[None]:
    """What a thread decodes in the block counts against ``MAX_PIXELS`` of all such threads.

    Reading waits until the others leave room, so that many small files of many pixels do not fill
    the memory. A single picture or frame always has room.
    """
    me = threading.get_ident()
    _in_flight[me] = 0
    try:
        yield
    finally:
        with _room:
            del _in_flight[me]
            _room.notify_all()


def take_memory(pixels: int) -> None:
    """Wait for room for a picture or frame of so many pixels; see ``sharing_memory``."""
    me = threading.get_ident()
    if me not in _in_flight:
        return
    with _room:
        if not _in_flight[me]:
            _room.wait_for(
                lambda: not (held := sum(_in_flight.values())) or held + pixels <= MAX_PIXELS
            )
        _in_flight[me] = max(_in_flight[me], pixels)


def looks_like_picture(head: bytes) -> bool:
    """Whether the first 32 bytes of a file are those of a picture that is known by sight."""
    if head[4:8] == b"ftyp":
        return head[8:12] in _PICTURE_BRANDS
    if head.startswith(b"RIFF"):
        return head[8:12] == b"WEBP"
    return head.startswith((_MAGIC[0], _MAGIC[1], b"GIF87a", b"GIF89a"))


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
    if stat.S_ISDIR(found.st_mode) and not os.access(path, os.R_OK | os.X_OK):
        raise InputError(
            f"The folder '{path}' may not be read.", "unreadable", "Change its permissions."
        )
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"'{path}' is a folder, not a file.", "unreadable", "Name a file in it.")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"'{path}' is not a regular file.", "unreadable", "Copy it to a file.")
    return found.st_size


def unreadable(path: Path, error: Exception) -> InputError:
    """The input error for what the operating system answered."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        if address := re.match(r"([a-z][a-z0-9+.-]+):/+(.+)", str(path), re.IGNORECASE):
            return InputError(
                f"'{address[1]}://{address[2]}' is an address, not a file: download it first.",
                "missing",
            )
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
        if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS and not _HEIF:
            raise InputError(
                f"{name} is a HEIC picture, which is read after: pip install 'm2f2cli[heic]'",
                "not_an_image",
            ) from error
        known = data.startswith(_MAGIC) or (data[4:8] == b"ftyp" and looks_like_picture(data))
        if known and _ends_early(data):
            raise _damaged(name, data, error) from error
        raise InputError(
            f"{name} is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture.", "not_an_image"
        ) from error
    except DECODE_ERRORS as error:
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
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b";")
    if data[4:8] == b"ftyp":
        return _boxes_end(data) > len(data)
    if data.startswith(b"BM"):
        return len(data) < 54 or int.from_bytes(data[2:6], "little") > len(data)
    # Where a TIFF file says that its first directory begins.
    directory = int.from_bytes(data[4:8], "little" if data.startswith(b"II") else "big")
    return len(data) < 64 or directory + 2 > len(data)


def _boxes_end(data: bytes) -> int:
    """Where the top boxes of an AVIF or HEIC file say that it ends."""
    place = 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size < 8:  # 0 is a box to the end of the file
            return len(data)
        place += size
    return place


def _rgb(picture: Image.Image) -> np.ndarray:
    """8-bit RGB pixels (H, W, 3) of a picture of any mode, made band by band to save memory."""
    width, height = picture.size
    rows = max(1, _BAND // max(width, 1))
    starts = range(0, height, rows)

    def band(start: int) -> Image.Image:
        if len(starts) == 1:
            return picture
        return picture.crop((0, start, width, min(start + rows, height)))

    deep = picture.mode.startswith("I") or picture.mode == "F"
    white = _white(np.asarray(band(start)) for start in starts) if deep else 0.0
    pixels = np.empty((height, width, 3), np.uint8)
    for start in starts:
        part = band(start)
        if deep:
            found = _eight_bits(np.asarray(part), white)[..., None]
        elif picture.has_transparency_data:
            colors = part.convert("RGBA")
            if colors.getchannel("A").getextrema() != (255, 255):
                colors = Image.alpha_composite(Image.new("RGBA", part.size, "white"), colors)
            found = np.asarray(colors.convert("RGB"))
        else:
            found = np.asarray(part if part.mode == "RGB" else part.convert("RGB"))
        pixels[start : start + rows] = found
    return pixels


def _white(bands: Iterable[np.ndarray]) -> float:
    """The gray level that becomes 255: told by the type, or by the largest value."""
    largest, kind = 0.0, "u"
    for values in bands:
        if values.dtype.itemsize == 2:
            return 65535.0
        kind = values.dtype.kind
        largest = max(largest, float(_finite(values).max(initial=0.0)))
    steps = (1.0, 255.0, 65535.0, 2.0**32 - 1)
    usable = steps if kind == "f" and largest <= 1.0 else steps[1:]
    return next((step for step in usable if largest <= step), largest)


def _eight_bits(values: np.ndarray, white: float) -> np.ndarray:
    """Gray levels deeper than 8 bits, scaled so that ``white`` becomes 255."""
    scaled: np.ndarray = np.clip(np.rint(_finite(values) * (255.0 / white)), 0, 255)
    return scaled.astype(np.uint8)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
