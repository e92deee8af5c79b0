from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f2cli.data.augment import (
    add_noise,
    adjust_color,
    affine,
    augment,
    compress_jpeg,
    gaussian_blur,
    rescale,
)
from m2f2cli.errors import ConfigError
from m2f2cli.options.train_detector import TrainDetectorOptions
from m2f2cli.options.training_pictures import AugmentOptions
from tests.parity.recipe import image_for

EVERYTHING = AugmentOptions(
    flip=1, affine=1, crop=1, color=1, blur=1, rescale=1, noise=1, jpeg=1, erase=1
)  # fmt: skip


def change(pixels, options, seed):
    return augment(pixels, None, options, np.random.default_rng(seed))[0]


@pytest.fixture
def pixels():
    return image_for("augment", 96, 80).numpy()


def _detail(pixels: np.ndarray) -> float:
    return float(np.abs(np.diff(pixels.astype(np.float32), axis=1)).mean())


def test_equal_generators_give_equal_pictures(pixels):
    before = pixels.copy()
    first = change(pixels, EVERYTHING, 3)
    assert np.array_equal(first, change(pixels, EVERYTHING, 3))
    assert not np.array_equal(first, change(pixels, EVERYTHING, 4))
    assert np.array_equal(pixels, before)


@settings(deadline=None, max_examples=25)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(0, 2**32 - 1))
def test_shape_and_type_are_kept(height, width, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = rng.random((height, width), dtype=np.float32)
    changed, moved = augment(pixels, mask, EVERYTHING, rng)
    assert changed.shape == pixels.shape
    assert changed.dtype == np.uint8
    assert moved.shape == mask.shape
    assert moved.dtype == np.float32
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_no_change_is_asked_for(pixels):
    assert np.array_equal(change(pixels, AugmentOptions(flip=0, blur=0, jpeg=0), 0), pixels)


@pytest.mark.parametrize(
    "chain",
    [
        "flip", "affine", "crop", "color", "blur", "rescale", "noise", "jpeg", "erase",
    ],
)  # fmt: skip
def test_each_probability_switches_its_change(pixels, chain):
    off = {"flip": 0.0, "blur": 0.0, "jpeg": 0.0}
    changed = change(pixels, AugmentOptions(**{**off, chain: 1.0}), 1)
    assert not np.array_equal(changed, pixels)


def test_the_mask_moves_with_the_pixels():
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[10:30, 40:60] = 255
    mask = (pixels[..., 0] / 255).astype(np.float32)
    chain = AugmentOptions(flip=1, blur=0, jpeg=0, affine=1, degrees=20, crop=1)
    for seed in range(5):
        changed, moved = augment(pixels, mask, chain, np.random.default_rng(seed))
        assert moved is not None
        overlap = np.abs(changed[..., 0] / 255.0 - moved).mean()
        assert overlap < 0.02, seed


def test_the_published_defaults_happen_as_often_as_stated(pixels):
    chain = AugmentOptions(flip=0)
    rng = np.random.default_rng(0)
    pictures = [augment(pixels, None, chain, rng)[0] for _ in range(400)]
    changed = sum(not np.array_equal(picture, pixels) for picture in pictures)
    assert 45 <= changed <= 110  # 1 - 0.9 * 0.9 = 19 % of 400


def test_simple_changes_do_what_they_say(pixels):
    assert _detail(gaussian_blur(pixels, 2.0)) < 0.6 * _detail(pixels)
    assert gaussian_blur(pixels, 0.0) is pixels
    assert _detail(rescale(pixels, 0.3)) < _detail(pixels)
    noisy = add_noise(np.full((64, 64, 3), 128, np.uint8), 5.0, np.random.default_rng(0))
    assert noisy.std() == pytest.approx(5.0, abs=0.3)
    errors = [np.abs(compress_jpeg(pixels, q).astype(int) - pixels).mean() for q in (20, 95)]
    assert errors[0] > errors[1]


def test_color_factors(pixels):
    assert np.abs(adjust_color(pixels).astype(int) - pixels).max() <= 1
    gray = adjust_color(pixels, saturation=0.0).astype(int)
    assert np.abs(gray[..., 0] - gray[..., 2]).max() <= 2
    assert adjust_color(pixels, brightness=0.5).mean() == pytest.approx(pixels.mean() / 2, abs=1)
    turned = adjust_color(np.full((2, 2, 3), (200, 100, 100), np.uint8), hue=1 / 3)
    assert turned[0, 0].argmax() != 0


def test_affine_turns_about_the_centre_and_repeats_the_border():
    pixels = np.full((65, 65, 3), 200, np.uint8)
    pixels[30:35, 50:55] = 0
    assert affine(pixels, degrees=30, scale=0.8, shift=(0.1, 0.1)).max() == 200
    turned = affine(pixels, degrees=90)
    assert turned[10:15, 30:35].mean() < 20  # from the right to the top
    moved = affine(pixels, shift=(-10 / 65, 10 / 65))
    assert moved[40:45, 40:45].mean() < 20


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"blur": 1.5}, "blur"),
        ({"jpeg_quality": (100, 30)}, "jpeg-quality"),
        ({"jpeg_quality": (0, 30)}, "jpeg-quality"),
        ({"flip": "often"}, "flip"),
        ({"blur_sigma": 2}, "blur-sigma"),
        ({"blurr": 0.5}, "blurr"),
    ],
)
def test_wrong_values_are_named(values, word):
    with pytest.raises(ConfigError, match=word):
        TrainDetectorOptions.from_flat({"data": "d", "output": "o", **values})
