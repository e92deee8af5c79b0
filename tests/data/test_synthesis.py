from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f2cli.data.augment import compress_h264
from m2f2cli.data.synthesis import (
    FACE,
    KINDS,
    MOUTH,
    blend,
    forge,
    match_color,
    soft_blob,
    warp,
)
from m2f2cli.errors import ConfigError
from tests.parity.recipe import image_for

EXAMPLES = Path(__file__).parents[2] / "examples"


def _face(name: str, box: tuple[int, int, int, int]) -> np.ndarray:
    with Image.open(EXAMPLES / name) as picture:
        return np.asarray(picture.convert("RGB").resize((160, 160), box=box))


@pytest.fixture(scope="module")
def faces() -> tuple[np.ndarray, np.ndarray]:
    return (
        _face("astronaut.jpg", (166, 70, 279, 183)),
        _face("grace_hopper.jpg", (128, 105, 408, 385)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_forgery_changes_what_its_mask_says_and_nothing_else(faces, kind):
    pixels, other = faces
    untouched = 0
    for seed in range(6):
        forged = forge(pixels, np.random.default_rng(seed), kind=kind, other=other)
        assert forged.kind == kind
        assert forged.pixels.shape == pixels.shape
        assert forged.pixels.dtype == np.uint8
        assert forged.mask.shape == pixels.shape[:2]
        assert forged.mask.dtype == np.float32
        assert forged.mask.min() >= 0
        assert 0.4 < forged.mask.max() <= 1
        assert 0.005 < (forged.mask > 0.25).mean() < 0.8
        outside = forged.mask == 0
        assert outside.mean() > 0.1
        change = np.abs(forged.pixels.astype(int) - pixels).mean(axis=2)
        assert change[forged.mask > 0.25].mean() > 0.3
        untouched += int(change[outside].max() == 0)
    # A self-blend may tint the picture around the mask instead of what is under it.
    assert untouched == 6 or kind == "self_blend"
    assert untouched > 0


def test_equal_generators_give_equal_forgeries(faces):
    pixels, other = faces
    before = pixels.copy()
    for seed in range(8):
        first = forge(pixels, np.random.default_rng(seed), other=other)
        again = forge(pixels, np.random.default_rng(seed), other=other)
        assert first.kind == again.kind
        assert np.array_equal(first.pixels, again.pixels)
        assert np.array_equal(first.mask, again.mask)
    assert np.array_equal(pixels, before)


def test_without_another_face_nothing_is_swapped(faces):
    rng = np.random.default_rng(0)
    kinds = {forge(faces[0], rng).kind for _ in range(30)}
    assert kinds == set(KINDS) - {"swap_blend"}
    with pytest.raises(ConfigError, match="another person"):
        forge(faces[0], rng, kind="swap_blend")
    with pytest.raises(ConfigError, match="Unknown forgery 'morph'"):
        forge(faces[0], rng, kind="morph")


def test_a_swap_takes_a_face_of_any_size(faces):
    forged = forge(faces[0], np.random.default_rng(1), kind="swap_blend", other=faces[1][:90, :120])
    assert forged.pixels.shape == faces[0].shape


def test_masks_lie_on_their_region():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        face, mouth = soft_blob((200, 100), FACE, rng), soft_blob((200, 100), MOUTH, rng)
        assert face[104, 50] == 1
        assert face[0].max() == 0
        assert (mouth * np.arange(200)[:, None]).sum() / mouth.sum() == pytest.approx(132, abs=14)
        assert mouth.sum() < 0.5 * face.sum()


def test_warp_moves_pixels_and_repeats_the_border():
    pixels = image_for("warp", 40, 30).numpy()
    still, right = np.zeros((30, 40), np.float32), np.full((30, 40), 5, np.float32)
    assert np.array_equal(warp(pixels, still, still), pixels)
    moved = warp(pixels, right, still)
    assert np.array_equal(moved[:, :35], pixels[:, 5:])
    assert (moved[:, 35:] == pixels[:, -1:]).all()


def test_blend_and_color_match_at_their_ends(faces):
    pixels, other = faces
    mask = np.zeros(pixels.shape[:2], np.float32)
    assert np.array_equal(blend(pixels, other, mask), pixels)
    assert np.array_equal(blend(pixels, other, mask + 1), other)
    assert np.array_equal(match_color(other, pixels, mask + 1, 0.0), other)
    matched = match_color(other, pixels, mask + 1, 1.0).mean(axis=(0, 1))
    assert np.abs(matched - pixels.mean(axis=(0, 1))).max() < 6


def test_h264_loses_more_at_a_higher_crf(faces):
    pixels = faces[0]
    errors = {}
    for crf in (0, 23, 40):
        coded = compress_h264(pixels, crf)
        assert coded.shape == pixels.shape
        assert coded.dtype == np.uint8
        errors[crf] = np.abs(coded.astype(int) - pixels).mean()
    assert errors[0] < 3
    assert errors[0] < errors[23] < errors[40] < 15
    assert np.array_equal(compress_h264(pixels, 40), compress_h264(pixels, 40))


@pytest.mark.parametrize(("height", "width"), [(2, 2), (33, 47), (100, 64)])
def test_h264_takes_odd_sizes(height, width):
    pixels = image_for("video", width, height).numpy()
    assert compress_h264(pixels, 30).shape == pixels.shape


def test_h264_refuses_an_impossible_crf(faces):
    with pytest.raises(ConfigError, match="crf"):
        compress_h264(faces[0], 60)
