"""The second face finder: where faces are, their landmarks, and that nothing is one in noise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from m2f2cli.data import mtcnn
from m2f2cli.data.images import read_picture
from tests.parity.recipe import image_for

EXAMPLES = Path(__file__).parents[2] / "examples"
# Eyes, nose and corners of the mouth, by eye.
POINTS = {
    "astronaut.jpg": [(205, 101), (246, 103), (226, 128), (204, 141), (243, 142)],
    "grace_hopper.jpg": [(221, 192), (307, 188), (267, 237), (232, 279), (307, 275)],
}


@pytest.mark.parametrize("name", POINTS)
def test_each_example_shows_one_face_with_its_landmarks(name):
    pixels = read_picture(EXAMPLES / name).pixels
    (face,) = mtcnn.find(pixels, smallest=40, score=0.9)
    assert face.score > 0.99
    side = (face.box[2:] - face.box[:2]).mean()
    assert np.abs(face.landmarks - POINTS[name]).max() < 0.06 * side
    again = mtcnn.mark(pixels, face.box)
    assert again.score > 0.99
    assert np.abs(again.landmarks - face.landmarks).max() < 0.06 * side


def test_where_nothing_is_nothing_is_found():
    assert mtcnn.find(image_for("no face", 200, 150).numpy(), smallest=20, score=0.9) == []
    for height, width in ((1, 1), (5, 300), (300, 5), (40, 40)):
        flat = np.full((height, width, 3), 128, np.uint8)
        assert mtcnn.find(flat, smallest=20, score=0.9) == []


def test_several_faces_are_found_the_surest_first():
    first, second = (read_picture(EXAMPLES / name).pixels for name in POINTS)
    scene = np.full((600, 1024, 3), 90, np.uint8)
    scene[:512, :512], scene[:, 512:] = first, second
    faces = mtcnn.find(scene, smallest=60, score=0.9)
    assert sorted(face.box[0] > 512 for face in faces) == [False, True]
    assert faces[0].score >= faces[1].score


def test_torch_is_imported_only_when_a_face_is_sought():
    code = "import sys, m2f2cli.data.mtcnn, m2f2cli.data.faces; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
