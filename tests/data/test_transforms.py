from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2f2cli.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    normalize,
    pad_to_square,
    preprocess,
    resize_and_crop,
)
from m2f2cli.errors import ConfigError
from tests.parity.recipe import image_for

# sha256 of the pixels and of the published preprocessing of them at 336, as float32 bytes.
SYNTHETIC = {
    ("square", 224, 224): (
        "be7d94bea98cc1c44279ee72f50b116ec233144d4ce82838a09864a06f66f6fc",
        "6ead189a59dd728e053c1ccd26cb8dddbaf9d4a22267cdb4f274788a9b7b4c09",
    ),
    ("wide", 301, 200): (
        "a7c5910d5bb1dfa1cd01148f4a1ab931e978bccd21123e9c6b1d7a27428833b2",
        "6cd144cf3fce92e7560fc4f10724b3aa2ea98974023dba9ddb23ad83bbc50da4",
    ),
}
REAL = {
    "0_024_073.jpg": "4949adb73d3c138bc3493bcf678af42d871c944241824d3229bbb01e445afec0",
    "1_035_036.jpg": "f16febde1c1187786b734dede53497d42bd0a38493c34dbb19b8b7a10739ebb8",
    "3_044_945.jpg": "167765193b4bb99b18d8e417b100d529e15c444e5ececfa404777a279467ddf4",
    "5_000.jpg": "fb49b6441bafc688840896f7317592866705e0daa061b09b1de7615f91c6cc5f",
    "5_012.jpg": "1ac802c20510892119a1dc47a997c2d92594a49ef893e4bd8b98a9ac0e8b45e6",
    "6_102_114.jpg": "ace7ee6f2fdeba1f3a142e7969b39cd275e81aeca3bd2898d51ac036c08891a8",
}


def _sha(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("picture", SYNTHETIC)
def test_preprocess_equals_the_published_one_bitwise(picture):
    pixels = image_for(*picture).numpy()
    pixels_sha, values_sha = SYNTHETIC[picture]
    assert _sha(pixels) == pixels_sha
    assert _sha(preprocess(pixels, size=336)) == values_sha


@pytest.mark.skipif("M2F2_DDVQA" not in os.environ, reason="M2F2_DDVQA names no DD-VQA folder")
@pytest.mark.parametrize("name", REAL)
def test_preprocess_equals_the_published_one_on_real_crops(name):
    path = Path(os.environ["M2F2_DDVQA"]) / "images" / "c40" / "test" / name
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert _sha(preprocess(pixels, size=336)) == REAL[name]


def test_levels_equal_the_formula():
    pixels = _noise(16, 16)
    unit = (pixels * (1 / 255)).astype(np.float32)
    expected = (unit - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    assert np.array_equal(normalize(pixels), expected.transpose(2, 0, 1))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 96))
def test_any_size_gives_a_square(height, width, size):
    values = preprocess(_noise(height, width), size=size)
    assert values.shape == (3, size, size)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()


def test_a_strip_does_not_ask_for_gigabytes():
    strip = np.zeros((1, 200_000, 3), dtype=np.uint8)
    strip[:, 99_990:100_010] = 255
    assert resize_and_crop(strip, 336).min() == 255
    assert resize_and_crop(np.ascontiguousarray(strip.transpose(1, 0, 2)), 336).min() == 255


def test_a_picture_of_the_right_size_is_not_resampled():
    pixels = _noise(64, 80)
    assert np.array_equal(resize_and_crop(pixels, 64), pixels[:, 8:72])


def test_pad_to_square_centres_on_the_fill():
    padded = pad_to_square(np.full((2, 5, 3), 9, dtype=np.uint8))
    assert padded.shape == (5, 5, 3)
    assert (padded[1:3] == 9).all()
    assert (padded[0] == (122, 116, 104)).all()
    assert (padded[3:] == (122, 116, 104)).all()


def test_bad_numbers_are_named():
    with pytest.raises(ConfigError, match="at least 1 pixel"):
        preprocess(_noise(4, 4), size=0)
    with pytest.raises(ConfigError, match="three numbers"):
        preprocess(_noise(4, 4), size=4, std=(1.0, 1.0, 0.0))
