from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2f2cli.data.faces import (
    MARGIN,
    Face,
    crop_face,
    find_faces,
    find_landmarks,
    smallest_face,
    without_overlaps,
)
from m2f2cli.data.images import read_picture
from m2f2cli.errors import ConfigError
from tests.data.test_mtcnn import POINTS
from tests.parity.recipe import image_for

EXAMPLES = Path(__file__).parents[2] / "examples"
# Where the faces are: their boxes' centers and sides, by eye.
FOUND = {"astronaut.jpg": ((227, 126), 100), "grace_hopper.jpg": ((270, 235), 200)}


@pytest.fixture(scope="module")
def photos() -> dict[str, np.ndarray]:
    return {name: read_picture(EXAMPLES / name).pixels for name in FOUND}


def _center(box: tuple[int, int, int, int]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


@pytest.mark.parametrize("name", FOUND)
def test_each_example_shows_exactly_one_face(photos, name):
    (face,) = find_faces(photos[name])
    center, side = FOUND[name]
    assert np.abs(np.subtract(_center(face.box), center)).max() < 0.15 * side
    assert face.box[2] - face.box[0] == pytest.approx(side, rel=0.2)
    assert face.score > 0.25
    assert find_faces(photos[name]) == [face]


def test_several_faces_come_largest_first_and_small_ones_too(photos):
    scene = np.full((700, 1400, 3), 90, np.uint8)
    scene[50:650, 20:532] = photos["grace_hopper.jpg"]
    scene[100:612, 540:1052] = photos["astronaut.jpg"]
    faces = find_faces(scene)
    assert len(faces) == 2
    assert faces[0].area > faces[1].area
    assert _center(faces[0].box)[0] < 532 < _center(faces[1].box)[0]


def test_a_large_picture_gives_boxes_in_its_own_pixels(photos):
    (small,) = find_faces(photos["astronaut.jpg"])
    (large,) = find_faces(photos["astronaut.jpg"].repeat(4, 0).repeat(4, 1))
    assert np.abs(np.subtract(_center(large.box), np.multiply(_center(small.box), 4))).max() < 60
    assert large.box[2] - large.box[0] == pytest.approx(4 * (small.box[2] - small.box[0]), rel=0.25)


def test_a_tight_crop_still_shows_its_face(photos):
    (face,) = find_faces(photos["grace_hopper.jpg"])
    tight = crop_face(photos["grace_hopper.jpg"], face.crop(0.05))
    assert len(find_faces(tight)) == 1


def test_nothing_is_found_where_there_is_nothing():
    assert find_faces(np.full((300, 400, 3), 128, np.uint8)) == []
    assert find_faces(image_for("no face", 300, 200).numpy()) == []


@pytest.mark.parametrize("turn", [1, 2, 3])
@pytest.mark.parametrize("name", FOUND)
def test_turned_faces_are_found_and_cut_upright(photos, name, turn):
    (upright,) = find_faces(photos[name])
    turned = np.rot90(photos[name], turn)
    assert find_faces(turned, dlib_only=True) == []
    (face,) = find_faces(turned)
    assert face.turn == 4 - turn
    assert face.picture == (turned.shape[1], turned.shape[0])
    side = upright.box[2] - upright.box[0]
    center = np.subtract(_center(upright.box), np.divide(photos[name].shape[1::-1], 2))
    for _ in range(turn):
        center = np.array([center[1], -center[0]])
    center = center + np.divide(face.picture, 2)
    assert np.abs(center - _center(face.box)).max() < 0.1 * side
    cut = crop_face(turned, face.crop(), face.turn)
    expected = crop_face(photos[name], upright.crop())
    assert cut.shape == pytest.approx(expected.shape, abs=3)
    size = min(len(cut), len(expected)) - 8
    middle = expected[4 : 4 + size, 4 : 4 + size].astype(float)
    moves = [(y, x) for y in range(9) for x in range(9)]
    apart = [np.abs(cut[y : y + size, x : x + size] - middle).mean() for y, x in moves]
    assert min(apart) < 6


def test_what_dlib_misses_the_second_finder_finds_in_its_geometry(photos):
    tilted = Image.fromarray(photos["grace_hopper.jpg"]).rotate(40, Image.Resampling.BICUBIC)
    assert find_faces(np.asarray(tilted), dlib_only=True) == []
    (face,) = find_faces(np.asarray(tilted))
    assert (face.turn, face.finder) == (0, "mtcnn")
    assert 0.9 < face.score <= 1
    (upright,) = find_faces(photos["grace_hopper.jpg"])
    sides = [one.box[2] - one.box[0] for one in (face, upright)]
    assert sides[0] == pytest.approx(sides[1], rel=0.25)


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("name", FOUND)
def test_every_face_has_landmarks(photos, name, turn):
    pixels = np.rot90(photos[name], turn)
    (face,) = find_faces(pixels)
    found = find_landmarks(pixels, face)
    assert found.shape == (5, 2)
    points = np.array(POINTS[name])
    if turn:
        points = np.stack([points[:, 1], photos[name].shape[1] - points[:, 0]], 1)
    assert np.abs(found - points).max() < 0.1 * (face.box[2] - face.box[0])


def test_threads_agree(photos):
    pictures = list(photos.values()) * 3
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(find_faces, pictures))
    assert together == [find_faces(picture) for picture in pictures]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 80), st.integers(1, 80))
def test_any_size_can_be_searched(height, width):
    assert isinstance(find_faces(np.zeros((height, width, 3), np.uint8)), list)


def test_a_strip_can_be_searched():
    assert find_faces(np.zeros((1, 60_000, 3), np.uint8)) == []


@given(
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.tuples(st.integers(-300, 900), st.integers(-300, 900)),
    st.integers(1, 900),
    st.floats(0, 4),
)
def test_crops_are_square_and_inside(picture, corner, side, margin):
    box = (*corner, corner[0] + side, corner[1] + side)
    x0, y0, x1, y1 = Face(box, 1.0, picture).crop(margin)
    assert x1 - x0 == y1 - y0 >= 1
    assert x0 >= 0
    assert y0 >= 0
    assert x1 <= picture[0]
    assert y1 <= picture[1]


def test_a_crop_is_enlarged_shifted_and_shrunk_in_that_order():
    assert Face((100, 100, 200, 200), 1.0, (400, 400)).crop(0.3) == (85, 85, 215, 215)
    assert Face((-10, 100, 90, 200), 1.0, (400, 400)).crop(0.3) == (0, 85, 130, 215)
    assert Face((300, 320, 400, 420), 1.0, (400, 400)).crop(0.3) == (270, 270, 400, 400)
    assert Face((14, 14, 194, 194), 1.0, (224, 224)).crop(MARGIN) == (0, 0, 224, 224)
    with pytest.raises(ConfigError, match="margin"):
        Face((0, 0, 9, 9), 1.0, (9, 9)).crop(-0.1)


def test_crop_face_cuts_and_repeats_the_border():
    pixels = image_for("cut", 30, 20).numpy()
    inside = crop_face(pixels, (3, 4, 13, 14))
    assert np.array_equal(inside, pixels[4:14, 3:13])
    beyond = crop_face(pixels, (-5, 10, 15, 30))
    assert beyond.shape == (20, 20, 3)
    assert np.array_equal(beyond[:10, 5:], pixels[10:, :15])
    assert (beyond[:10, :5] == pixels[10:, :1]).all()
    assert (beyond[10:, 5:] == pixels[-1:, :15]).all()
    with pytest.raises(ConfigError, match="empty"):
        crop_face(pixels, (5, 5, 5, 9))


def test_of_overlapping_finds_the_surest_stays():
    sure = Face((0, 0, 100, 100), 2.0, (300, 300))
    inside = Face((20, 20, 60, 60), 1.0, (300, 300))
    beside = Face((80, 0, 180, 100), 0.5, (300, 300))
    assert without_overlaps([inside, beside, sure]) == [sure, beside]


def test_dlib_is_imported_only_when_a_face_is_sought():
    code = "import sys, m2f2cli.data.faces as f; assert 'dlib' not in sys.modules and f.MARGIN"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_small_faces_of_a_group_are_found_in_tiles_when_asked():
    face = Image.open(EXAMPLES / "astronaut.jpg").convert("RGB").crop((150, 30, 310, 190))
    group = Image.new("RGB", (1500, 700), (90, 110, 90))
    places = [(30, 20), (700, 300), (1300, 560), (1420, 15)]
    for place in places:
        group.paste(face.resize((72, 72)), place)
    pixels = np.asarray(group)
    assert smallest_face(1500) == 125
    found = find_faces(pixels, dlib_only=True, smallest=30)
    centers = {((f.box[0] + f.box[2]) // 2, (f.box[1] + f.box[3]) // 2) for f in found}
    assert len(found) == len(places)
    for x, y in places:
        assert any(abs(x + 36 - a) < 20 and abs(y + 36 - b) < 20 for a, b in centers)
    assert all(f.picture == (1500, 700) for f in found)
    assert find_faces(pixels[:400, :400], dlib_only=True, smallest=400) == find_faces(
        pixels[:400, :400], dlib_only=True
    )
