"""Faces in a picture: dlib's frontal HOG detector, which the published crops were made with.

Coordinates are (x0, y0, x1, y1) in pixels of the upright picture, x1 and y1 exclusive.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from m2f2cli.errors import ConfigError

Box = tuple[int, int, int, int]
# The side of a crop is that of the face box, enlarged by this share. FaceForensics++'s own code
# uses 1.3; the boxes found in the DD-VQA crops fit 1.27 (median; half of them 1.23 to 1.30).
MARGIN = 0.3
# dlib calls a face what scores above 0. Of real faces under crf-40 compression 99 % score above
# 0.39 (300 crops measured); the folds of a space suit that it takes for a face score 0.15 at most.
MIN_SCORE = 0.25
# The search runs on a copy whose longest side is at most this many pixels. dlib sees faces from
# 80 pixels on, so a face is found from 1/12 of the longest side on.
MAX_SIDE = 960
_LARGEST_ENLARGEMENT = 1.5
_SMALLEST_SIDE = 320
# The border is repeated outwards by this share of the shortest side: faces in tight crops touch it.
_BORDER = 0.1
_local = threading.local()


@dataclass(frozen=True)
class Face:
    """A face as found."""

    box: Box  # tight square around brows and chin; may reach beyond the picture
    score: float  # the detector's confidence, about 0 to 3
    picture: tuple[int, int]  # (width, height) of the picture it was found in

    @property
    def area(self) -> int:
        """Of the box, in square pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    def crop(self, margin: float = MARGIN) -> Box:
        """The square to judge: the box enlarged by ``margin`` about its center.

        A square that would reach beyond the picture is shifted inwards, and shrunk to the shortest
        side when it is larger than that, as FaceForensics++ does: no pixel is invented.

        Raises:
            ConfigError: The margin is below 0 or above 4.
        """
        if not 0 <= margin <= 4:
            raise ConfigError(f"The crop's margin must be between 0 and 4, not {margin}.")
        x0, y0, x1, y1 = self.box
        width, height = self.picture
        side = min(max(1, round(max(x1 - x0, y1 - y0) * (1 + margin))), width, height)
        left = min(max(0, (x0 + x1 - side) // 2), width - side)
        top = min(max(0, (y0 + y1 - side) // 2), height - side)
        return left, top, left + side, top + side


def find_faces(
    pixels: np.ndarray, *, max_side: int = MAX_SIDE, min_score: float = MIN_SCORE
) -> list[Face]:
    """Find upright, roughly frontal faces. Equal pixels give equal answers; safe in threads.

    Args:
        pixels: uint8 (H, W, 3), RGB, upright.
        max_side: Longest side of the copy that is searched, in pixels.
        min_score: Finds below this score are dropped.

    Returns:
        The faces, largest first, without overlaps.
    """
    height, width = pixels.shape[:2]
    longest = max(height, width)
    enlargement = max(_LARGEST_ENLARGEMENT, _SMALLEST_SIDE / longest)
    scale = min(max_side / longest, enlargement)
    searched = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture = picture.resize(searched, Image.Resampling.BILINEAR, reducing_gap=2.0)
    border = round(_BORDER * min(searched))
    copy = np.pad(np.asarray(picture), ((border, border), (border, border), (0, 0)), mode="edge")
    rectangles, scores, _ = _detector().run(copy, 0, float(min_score))
    to_x, to_y = width / searched[0], height / searched[1]
    found = []
    for rectangle, score in zip(rectangles, scores, strict=True):
        box = (
            round((rectangle.left() - border) * to_x),
            round((rectangle.top() - border) * to_y),
            round((rectangle.right() + 1 - border) * to_x),
            round((rectangle.bottom() + 1 - border) * to_y),
        )
        inside = box[2] > 0 and box[3] > 0 and box[0] < width and box[1] < height
        if inside and box[2] > box[0] and box[3] > box[1]:
            found.append(Face(box, float(score), (width, height)))
    return sorted(_without_overlaps(found), key=lambda face: (-face.area, -face.score, face.box))


def finder_name() -> str:
    """What finds the faces, with what its answers depend on."""
    import dlib

    return f"dlib {dlib.__version__} frontal HOG, score {MIN_SCORE} and above"


def crop_face(pixels: np.ndarray, box: Box) -> np.ndarray:
    """Cut a box out; a square box gives a square.

    Args:
        pixels: uint8 (H, W, 3).
        box: Where; parts beyond the picture repeat its border. ``Face.crop`` never reaches there.

    Returns:
        uint8 (y1 - y0, x1 - x0, 3), contiguous.
    """
    x0, y0, x1, y1 = box
    height, width = pixels.shape[:2]
    if x1 <= x0 or y1 <= y0:
        raise ConfigError(f"The box {box} is empty.", "Give x0 < x1 and y0 < y1.")
    if x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height:
        return np.ascontiguousarray(pixels[y0:y1, x0:x1])
    rows = np.clip(np.arange(y0, y1), 0, height - 1)
    columns = np.clip(np.arange(x0, x1), 0, width - 1)
    return np.ascontiguousarray(pixels[rows][:, columns])


def _detector() -> Any:
    """One detector a thread: its scanner keeps the picture it works on."""
    if not hasattr(_local, "detector"):
        import dlib

        _local.detector = dlib.get_frontal_face_detector()
    return _local.detector


def _without_overlaps(faces: list[Face]) -> list[Face]:
    """Keep the higher score of two faces that share much of one of them."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: (-face.score, face.box)):
        shared = (shared_area(face.box, other.box) / min(face.area, other.area) for other in kept)
        if all(share < 0.5 for share in shared):
            kept.append(face)
    return kept


def shared_area(first: Box, second: Box) -> int:
    """Of two boxes, in square pixels; 0 where they do not overlap."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0, width) * max(0, height)
