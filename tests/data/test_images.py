from __future__ import annotations

import builtins
import hashlib
import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2f2cli.data import images
from m2f2cli.data.images import FORMATS, check_file, read_picture
from m2f2cli.errors import InputError
from tests.conftest import TURNS
from tests.parity.recipe import image_for

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return image_for("read", 41, 30).numpy()


def _saved(picture: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=format_, **options)
    return buffer.getvalue()


def _status(source: bytes | Path) -> str:
    with pytest.raises(InputError) as caught:
        read_picture(source)
    assert "\n" not in caught.value.message
    return caught.value.status


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format_", FORMATS)
def test_each_format_is_read_whatever_its_name(pixels, format_, tmp_path):
    fine = {"quality": 95, "subsampling": 0}
    options = {
        "WEBP": {"lossless": True}, "JPEG": fine, "AVIF": {"quality": 95, "subsampling": "4:4:4"}
    }  # fmt: skip
    stored = Image.fromarray(pixels)
    if format_ == "GIF":
        stored = stored.quantize(256)
        pixels = np.asarray(stored.convert("RGB"))
    data = _saved(stored, format_, **options.get(format_, {}))
    path = tmp_path / "picture.txt"
    path.write_bytes(data)
    before = path.stat().st_mtime_ns
    picture = read_picture(path)
    assert picture.format == format_
    assert picture.size == (41, 30)
    assert picture.sha256 == hashlib.sha256(data).hexdigest()
    assert picture.note is None
    difference = np.abs(picture.pixels.astype(int) - pixels)
    assert difference.mean() < 6 if format_ in ("JPEG", "AVIF", "HEIF") else difference.max() == 0
    assert path.read_bytes() == data
    assert path.stat().st_mtime_ns == before
    assert np.array_equal(read_picture(data).pixels, picture.pixels)
    assert not picture.pixels.flags.writeable


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_exactly_once(pixels, format_, orientation):
    stored = Image.fromarray(pixels)
    if orientation in TURNS:
        back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
        stored = stored.transpose(back.get(orientation, TURNS[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if format_ == "WEBP" else {}
    if format_ == "TIFF":
        data = _saved(stored, format_, tiffinfo={274: orientation})
    else:
        data = _saved(stored, format_, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as check:
        assert check.getexif()[274] == orientation
    assert np.array_equal(read_picture(data).pixels, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_jpeg_turns_the_decoded_pixels(orientation):
    plain = (EXAMPLES / "astronaut.jpg").read_bytes()
    exif = Image.Exif()
    exif[274] = orientation
    block = exif.tobytes()
    marked = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    decoded = read_picture(plain).pixels
    turned = Image.fromarray(decoded)
    if orientation in TURNS:
        # Image.transpose turns counter-clockwise, EXIF counts clockwise.
        forward = {6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
        turned = turned.transpose(forward.get(orientation, TURNS[orientation]))
    assert np.array_equal(read_picture(marked).pixels, np.asarray(turned))


def test_unreadable_exif_changes_nothing(pixels):
    plain = _saved(Image.fromarray(pixels), "JPEG")
    block = b"Exif\0\0II*\0\xff\xff\xff\xff"
    marked = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    assert np.array_equal(read_picture(marked).pixels, read_picture(plain).pixels)


def test_transparent_parts_lie_over_white():
    layers = np.zeros((4, 4, 4), np.uint8)
    layers[0] = (200, 100, 0, 255)
    layers[1] = (200, 100, 0, 51)
    read = read_picture(_saved(Image.fromarray(layers), "PNG")).pixels
    assert (read[0] == (200, 100, 0)).all()
    assert np.abs(read[1].astype(int) - (244, 224, 204)).max() <= 1
    assert (read[2:] == 255).all()
    gray = Image.fromarray(layers).convert("LA")
    assert (read_picture(_saved(gray, "PNG")).pixels[2:] == 255).all()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    read = read_picture(_saved(palette, "PNG", transparency=1)).pixels
    assert read.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_grey_palette_bilevel_and_cmyk(pixels):
    picture = Image.fromarray(pixels)
    for mode in ("L", "1", "P"):
        converted = picture.convert(mode)
        read = read_picture(_saved(converted, "PNG")).pixels
        assert np.array_equal(read, np.asarray(converted.convert("RGB"))), mode
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for format_ in ("TIFF", "JPEG"):
        read = read_picture(_saved(red, format_)).pixels.astype(int)
        assert np.abs(read - (255, 0, 0)).max() <= 3, format_


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_cut(format_):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    read = read_picture(_saved(Image.fromarray(ramp), format_)).pixels
    assert np.array_equal(read, np.arange(256)[None, :, None].repeat(4, 0).repeat(3, 2))


def test_sixteen_bit_color_png_keeps_its_high_bytes():
    row = np.array([[0, 0x8000, 0xFFFF], [0x1234, 0xABCD, 0x00FF]], ">u2")
    body = zlib.compress(b"\0" + row.tobytes())

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body)
    read = read_picture(data + chunk(b"IEND", b"")).pixels[0].astype(int)
    assert np.abs(read - row.astype(int) / 257).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0, np.nan]], np.float32), [0, 128, 255, 0]),
        (np.array([[-5.0, 0.0, 100.0, 255.0]], np.float32), [0, 0, 100, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
    ],
)
def test_deeper_tiff_grey_is_scaled(values, expected):
    read = read_picture(_saved(Image.fromarray(values), "TIFF")).pixels
    assert read[0, :, 0].tolist() == expected


@pytest.mark.parametrize("format_", ["WEBP", "TIFF", "PNG", "GIF", "AVIF"])
def test_the_first_of_several_pictures_is_taken_and_noted(pixels, format_):
    first, second = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    options = {"lossless": True} if format_ == "WEBP" else {}
    data = _saved(first, format_, save_all=True, append_images=[second], **options)
    picture = read_picture(data)
    difference = np.abs(picture.pixels.astype(int) - pixels)
    assert difference.mean() < 25 if format_ in ("GIF", "AVIF") else not difference.any()
    assert picture.note == "the first of several pictures in the file"


def test_a_huge_header_is_refused_before_decoding():
    assert _status(_png_header(20_000, 20_000)) == "too_large"
    assert _status(_png_header(10_000, 10_000)) == "too_large"
    with pytest.raises(InputError, match="41x30") as caught:
        read_picture(_saved(Image.new("RGB", (41, 30)), "PNG"), max_pixels=1000)
    assert caught.value.status == "too_large"


@pytest.mark.parametrize("format_", FORMATS)
def test_cut_files_are_truncated(pixels, format_):
    data = _saved(Image.fromarray(pixels), format_)
    assert _status(data[: len(data) * 6 // 10]) == "truncated"


@pytest.mark.parametrize("keep", [2, 11, 150, 600])
def test_a_jpeg_cut_in_its_header_is_truncated_or_no_image(keep):
    data = (EXAMPLES / "astronaut.jpg").read_bytes()[:keep]
    assert _status(data) == ("not_an_image" if keep == 2 else "truncated")


def test_what_is_no_picture(tmp_path, pixels):
    text = tmp_path / "photo.jpg"
    text.write_text("This is not a photo.")
    assert _status(text) == "not_an_image"
    assert _status(_saved(Image.fromarray(pixels), "PPM")) == "not_an_image"
    empty = tmp_path / "empty.jpg"
    empty.touch()
    assert _status(empty) == "empty"
    assert _status(b"") == "empty"
    assert _status(tmp_path / "nothing.jpg") == "missing"
    assert _status(empty / "below.jpg") == "missing"
    assert _status(tmp_path) == "unreadable"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert _status(tmp_path / "pipe.jpg") == "unreadable"
    assert _status(Path("a\0b.jpg")) == "unreadable"


def test_a_damaged_picture_is_unreadable(pixels):
    data = bytearray(_saved(Image.fromarray(pixels), "PNG"))
    start = data.index(b"IDAT") + 4
    data[start : start + 40] = bytes(40)
    assert _status(bytes(data)) == "unreadable"


def test_no_permission(tmp_path, monkeypatch):
    path = tmp_path / "locked.png"
    path.write_bytes(_png_header(1, 1))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(InputError, match="may not be read") as caught:
        read_picture(path)
    assert caught.value.status == "unreadable"
    assert "chmod" in str(caught.value.hint)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "huge.png"
    path.write_bytes(_png_header(1, 1))
    with pytest.raises(InputError) as caught:
        images.read_bytes(path, max_bytes=10)
    assert caught.value.status == "too_large"


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damage_gives_a_picture_or_a_status(data):
    format_ = data.draw(st.sampled_from(FORMATS))
    good = bytearray(_saved(Image.fromarray(image_for("damage", 24, 20).numpy()), format_))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(good[: data.draw(st.integers(0, len(good)))])
    try:
        pixels = read_picture(cut, max_pixels=4_000_000).pixels
    except InputError as error:
        assert error.status in {"empty", "not_an_image", "truncated", "unreadable", "too_large"}  # noqa: PT017
    else:
        assert pixels.ndim == 3
        assert pixels.dtype == np.uint8


def test_every_format_is_there_before_threads_ask_for_it():
    code = (
        "from m2f2cli.data.images import FORMATS\n"
        "from PIL import Image\n"
        "assert set(FORMATS) <= set(Image.OPEN), sorted(Image.OPEN)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_heic_picture_says_what_reads_it(monkeypatch):
    monkeypatch.setattr(images, "_HEIF", False)
    with pytest.raises(InputError, match=r"HEIC picture.*pip install 'm2f2cli\[heic\]'") as caught:
        read_picture(b"\0\0\0\x18ftypheic" + bytes(200))
    assert caught.value.status == "not_an_image"


def test_an_address_says_that_it_is_to_be_downloaded():
    with pytest.raises(
        InputError, match=r"'https://a\.org/b\.jpg' is an address.*download it first"
    ):
        read_picture(Path("https://a.org/b.jpg"))


def test_bands_give_the_pixels_of_the_whole(pixels, monkeypatch):
    picture = Image.fromarray(pixels)
    faded = picture.copy()
    faded.putalpha(Image.fromarray(np.arange(41 * 30, dtype=np.uint8).reshape(30, 41)))
    deep = Image.fromarray(np.arange(41 * 30, dtype=np.int32).reshape(30, 41) * 50)
    files = [_saved(p, "TIFF") for p in (picture, faded, deep, picture.convert("CMYK"))]
    files.append(_saved(picture.convert("P"), "PNG", transparency=3))
    whole = [read_picture(data).pixels for data in files]
    monkeypatch.setattr(images, "_BAND", 41 * 7)
    for data, expected in zip(files, whole, strict=True):
        assert np.array_equal(read_picture(data).pixels, expected)


def test_pictures_that_are_decoded_side_by_side_share_the_memory(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    data = _saved(Image.new("RGB", (25, 25)), "PNG")
    order, first, leave = [], threading.Event(), threading.Event()

    def work(name: str) -> None:
        with images.sharing_memory():
            read_picture(data)
            order.append(name)
            first.set()
            leave.wait(30)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    threads[0].start()
    assert first.wait(30)
    threads[1].start()
    threads[1].join(0.3)
    assert order == ["a"]
    read_picture(data)  # outside of such a block nothing waits
    leave.set()
    for thread in threads:
        thread.join(30)
    assert order == ["a", "b"]


def test_what_is_in_memory_becomes_a_picture(pixels):
    array, picture = images.picture_of(pixels), images.picture_of(Image.fromarray(pixels))
    assert np.array_equal(array.pixels, pixels)
    assert array.sha256 == picture.sha256 == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert images.picture_of(pixels[..., 0]).size == (41, 30)
    for wrong in (pixels.astype(float), pixels[None], pixels[:0], np.array("x")):
        with pytest.raises(InputError):
            images.picture_of(wrong)


def test_a_folder_that_may_not_be_read_is_called_that(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=r"The folder '.*' may not be read"):
        check_file(tmp_path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="is a folder, not a file"):
        check_file(tmp_path)
