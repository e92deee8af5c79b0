"""Faces in a picture, and the crops of them that a model judges.

dlib's frontal HOG detector finds them, which the published crops were made with. Where it finds
nothing, MTCNN seeks faces upright and turned by 90, 180 and 270 degrees, its boxes brought to
dlib's geometry. Coordinates are (x0, y0, x1, y1) in pixels of the upright picture, x1 and y1
exclusive.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from m2f2cli.data.domain import Domain
from m2f2cli.data.transforms import padded_square, resize_and_crop
from m2f2cli.errors import ConfigError, UsageError

Box = tuple[int, int, int, int]
# The side of a crop is that of the face box, enlarged by this share. FaceForensics++'s own code
# uses 1.3; the boxes found in the DD-VQA crops fit 1.27 (median; half of them 1.23 to 1.30).
MARGIN = 0.3
# dlib calls a face what scores above 0. Of real faces under crf-40 compression 99 % score above
# 0.39 (300 crops measured); the folds of a space suit that it takes for a face score 0.15 at most.
MIN_SCORE = 0.25
# dlib searches a copy whose longest side is at most this many pixels. It sees faces from 80 pixels
# on, so a face is found from 1/12 of the longest side on.
MAX_SIDE = 960
_SMALLEST_FACE = 80
_LARGEST_ENLARGEMENT = 1.5
_SMALLEST_SIDE = 320
# The border is repeated outwards by this share of the shortest side: faces in tight crops touch it.
_BORDER = 0.1
# MTCNN searches a smaller copy for faces of the same share of it.
_MTCNN_SIDE, _MTCNN_SHARE = 480, 12
# Above it lie 131 of 136 faces that dlib misses (crops of DFDC and FFHQ), and 7 of 84 pictures
# without a face, most of them faces cut into 16 shuffled pieces.
_MTCNN_SCORE = 0.95
# From MTCNN's box to dlib's: how far the center moves right and down, and how large the side
# becomes, in mean sides of MTCNN's box. Medians over 525 faces that both find, of portraits (FFHQ,
# StyleGAN; alone 0.08 and 0.89) and tight video crops (DFDC; 0.11 and 0.82).
_SHIFT, _SCALE = (0.0, 0.09), 0.87
# A picture without a face that is no larger than this and nearly square is most likely a face crop
# already, as the published data sets hold them; ``auto`` then judges it whole.
READY_CROP_SIDE = 400
READY_CROP_RATIO = 1.25
_local = threading.local()


@dataclass(frozen=True)
class Face:
    """A face as found."""

    box: Box  # tight square around brows and chin; may reach beyond the picture
    score: float  # the finder's confidence: about 0 to 3 of dlib, below 1 of MTCNN
    picture: tuple[int, int]  # (width, height) of the picture it was found in
    turn: int = 0  # quarter turns, counter-clockwise, that make it upright
    finder: str = "dlib"  # or "mtcnn"

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
    pixels: np.ndarray, *, dlib_only: bool = False, smallest: int | None = None
) -> list[Face]:
    """Find roughly frontal faces. Equal pixels give equal answers; safe in threads.

    Args:
        pixels: uint8 (H, W, 3), RGB, upright.
        dlib_only: As the published crops were made.
        smallest: Side in pixels of the smallest face looked for, in enlarged tiles where the search
            of the whole picture does not see it; None for that search alone.

    Returns:
        The faces, largest first, without overlaps; all of one finder and one turn.
    """
    found = _by_dlib(pixels)
    if smallest is not None:
        found = without_overlaps([*found, *_in_tiles(pixels, smallest)])
    if not found and not dlib_only:
        # The turn in which MTCNN is surest: it takes some faces for others upside down.
        turns = [_by_mtcnn(pixels, turn) for turn in range(4)]
        found = max(turns, key=lambda faces: max((face.score for face in faces), default=0.0))
        if found and found[0].turn:
            found = _by_dlib(pixels, found[0].turn) or found
    return sorted(found, key=lambda face: (-face.area, -face.score, face.box))


def smallest_face(longest: int) -> int:
    """Side of the smallest face seen in a picture whose longest side has so many pixels."""
    return math.ceil(_SMALLEST_FACE / _scale(longest))


def finder_name() -> str:
    """What finds upright faces, with what its answers depend on."""
    import dlib

    return f"dlib {dlib.__version__} frontal HOG, score {MIN_SCORE} and above"


def find_landmarks(pixels: np.ndarray, face: Face) -> np.ndarray:
    """Eyes, nose and corners of the mouth of a face, by MTCNN.

    Args:
        pixels: uint8 (H, W, 3), RGB: the picture that the face was found in.
        face: From ``find_faces``.

    Returns:
        float64 (5, 2), x and y; left comes first, as seen when the face is upright.
    """
    from m2f2cli.data import mtcnn

    x0, y0, x1, y1 = _turn_box(face.box, face.picture, face.turn)
    side = (x1 - x0) / _SCALE
    center = np.array([x0 + x1, y0 + y1]) / 2 - np.multiply(_SHIFT, side)
    turned = np.rot90(pixels, face.turn)
    points = mtcnn.mark(turned, (*(center - side / 2), *(center + side / 2))).landmarks
    size = (turned.shape[1], turned.shape[0])
    return np.array([_turn_point(point, size, -face.turn) for point in points.tolist()])


def crop_face(pixels: np.ndarray, box: Box, turn: int = 0) -> np.ndarray:
    """Cut a box out; a square box gives a square.

    Args:
        pixels: uint8 (H, W, 3).
        box: Where; parts beyond the picture repeat its border. ``Face.crop`` never reaches there.
        turn: Quarter turns, counter-clockwise, of what was cut out.

    Returns:
        uint8 (y1 - y0, x1 - x0, 3), contiguous.
    """
    x0, y0, x1, y1 = box
    height, width = pixels.shape[:2]
    if x1 <= x0 or y1 <= y0:
        raise ConfigError(f"The box {box} is empty.", "Give x0 < x1 and y0 < y1.")
    if x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height:
        cut = pixels[y0:y1, x0:x1]
    else:
        rows = np.clip(np.arange(y0, y1), 0, height - 1)
        cut = pixels[rows][:, np.clip(np.arange(x0, x1), 0, width - 1)]
    return np.ascontiguousarray(np.rot90(cut, turn))


class CropRule(NamedTuple):
    """How a model wants its crops.

    Attributes:
        size: Side of the network's input in pixels.
        margin: Share of the face box's side added around it.
        domain: The model's domain check, if it has one.
        pads: Whether its CLIP tower sees all of a picture that is taken whole, on a square.
    """

    size: int
    margin: float
    domain: Domain | None = None
    pads: bool = False

    @classmethod
    def of(cls, config: Any, *, finds_faces: bool) -> CropRule:
        """Read it from a ``DetectorConfig``.

        Raises:
            UsageError: Faces are to be found, and it was trained on those of a finder that m2f2
                lacks.
        """
        finder = config.crop.get("detector", "dlib")
        if finds_faces and finder != "dlib":
            raise UsageError(
                f"The model wants face crops of '{finder}', which m2f2 does not have.",
                "Crop the faces yourself and add --faces none.",
            )
        domain = Domain.from_config(config.domain) if config.domain else None
        return cls(config.image_size, float(config.crop.get("margin", 0.3)), domain)

    def crops(self, pixels: np.ndarray, found: Sequence[Face], faces: str) -> tuple[Crop, ...]:
        """Cut and scale what is to be judged in a picture.

        Args:
            pixels: uint8 (H, W, 3), RGB, upright.
            found: Its faces, largest first.
            faces: A mode of ``DetectOptions.faces``.
        """
        sides = pixels.shape[:2]
        ready = max(sides) <= READY_CROP_SIDE and max(sides) <= READY_CROP_RATIO * min(sides)
        if faces == "none" or (faces == "auto" and not found and ready):
            return (self._whole(pixels),)
        return tuple(
            self._of(pixels, face) for face in (found[:1] if faces == "largest" else found)
        )

    def _of(self, pixels: np.ndarray, face: Face) -> Crop:
        square = face.crop(self.margin)
        cut = resize_and_crop(crop_face(pixels, square, face.turn), self.size)
        crop = self._described(cut, square)
        crop = replace(crop, box=face.box, finder_score=round(face.score, 4))
        if not face.turn:
            return crop
        # Its map is turned, too: another score than of the same pixels upright.
        digest = hashlib.sha256(crop.digest + bytes([face.turn])).digest()
        return replace(crop, digest=digest, turn=face.turn)

    def _whole(self, pixels: np.ndarray) -> Crop:
        """A picture's center square, which is what the preprocessing keeps of it."""
        height, width = pixels.shape[:2]
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        square = (left, top, left + side, top + side)
        crop = self._described(resize_and_crop(pixels, self.size), square)
        padded = padded_square(pixels, self.size) if self.pads else None
        if padded is None:
            return crop
        digest = hashlib.sha256(crop.digest + padded.tobytes()).digest()
        return replace(crop, digest=digest, padded=padded)

    def _described(self, cut: np.ndarray, square: Box) -> Crop:
        distance = None if self.domain is None else self.domain.distance(cut)
        digest = hashlib.sha256(cut.tobytes()).digest()
        return Crop(cut, digest, square, domain_distance=distance)


@dataclass(frozen=True)
class Crop:
    """One square to judge.

    Attributes:
        pixels: uint8 (size, size, 3), RGB.
        digest: Of the pixels; equal crops are judged once.
        crop: (x0, y0, x1, y1) in the upright picture or frame.
        box: The face as found; None when the picture was taken whole.
        finder_score: The face finder's confidence; None as above.
        domain_distance: From the training crops; None where the model has no check.
        padded: uint8 as ``pixels``: the whole of a picture that is not square, on a square; None
            where the model does not look at it.
        turn: Quarter turns, counter-clockwise, that made the face in it upright.
    """

    pixels: np.ndarray
    digest: bytes
    crop: Box
    box: Box | None = None
    finder_score: float | None = None
    domain_distance: float | None = None
    padded: np.ndarray | None = None
    turn: int = 0


def _scale(longest: int) -> float:
    """How much larger dlib's copy of a picture is."""
    return min(MAX_SIDE / longest, max(_LARGEST_ENLARGEMENT, _SMALLEST_SIDE / longest))


def _in_tiles(pixels: np.ndarray, smallest: int) -> list[Face]:
    """Faces between ``smallest`` and those that the search of the whole picture sees.

    A tile is as large a part of the picture as dlib's copy holds at the scale for a size of faces;
    the next size is three times that, and tiles share a border wide enough for those in between.
    """
    height, width = pixels.shape[:2]
    found = []
    while smallest < smallest_face(max(height, width)):
        scale = _SMALLEST_FACE / smallest
        side = round(MAX_SIDE / scale)
        step = side - 4 * smallest
        for top in range(0, max(height - side, 0) + step, step):
            for left in range(0, max(width - side, 0) + step, step):
                tile = pixels[top : top + side, left : left + side]
                if min(tile.shape[:2]) < smallest:
                    continue
                for face in _by_dlib(tile, scale=scale):
                    x0, y0, x1, y1 = face.box
                    box = (x0 + left, y0 + top, x1 + left, y1 + top)
                    found.append(replace(face, box=box, picture=(width, height)))
        smallest *= 3
    return found


def _by_dlib(pixels: np.ndarray, turn: int = 0, scale: float | None = None) -> list[Face]:
    copy, place = _copy(pixels, turn, scale or _scale(max(pixels.shape[:2])), "dlib")
    rectangles, scores, _ = _detector().run(copy, 0, MIN_SCORE)
    found = [
        place((r.left(), r.top(), r.right() + 1, r.bottom() + 1), float(score))
        for r, score in zip(rectangles, scores, strict=True)
    ]
    return without_overlaps(found)


def _by_mtcnn(pixels: np.ndarray, turn: int) -> list[Face]:
    from m2f2cli.data import mtcnn

    copy, place = _copy(pixels, turn, min(1.0, _MTCNN_SIDE / max(pixels.shape[:2])), "mtcnn")
    finds = mtcnn.find(copy, smallest=max(copy.shape) / _MTCNN_SHARE, score=_MTCNN_SCORE)
    found = []
    for find in finds:
        center = (find.box[:2] + find.box[2:]) / 2
        side = (find.box[2:] - find.box[:2]).mean()
        center, half = center + np.multiply(_SHIFT, side), side * _SCALE / 2
        found.append(place((*(center - half), *(center + half)), find.score))
    return without_overlaps(found)


def _copy(
    pixels: np.ndarray, turn: int, scale: float, finder: str
) -> tuple[np.ndarray, Callable[[Sequence[float], float], Face]]:
    """A turned, scaled copy with a border, and what makes a face of a box and score in it."""
    turned = np.rot90(pixels, turn)
    height, width = turned.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(np.ascontiguousarray(turned))
    picture = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    border = round(_BORDER * min(size))
    copy = np.pad(np.asarray(picture), ((border, border), (border, border), (0, 0)), mode="edge")
    to_x, to_y = width / size[0], height / size[1]

    def place(edges: Sequence[float], score: float) -> Face:
        x0, y0, x1, y1 = (
            round((edge - border) * factor)
            for edge, factor in zip(edges, (to_x, to_y, to_x, to_y), strict=True)
        )
        box = _turn_box((x0, y0, x1, y1), (width, height), -turn)
        return Face(box, score, (pixels.shape[1], pixels.shape[0]), turn, finder)

    return copy, place


def _turn_point(point: Sequence[Any], picture: tuple[int, int], turn: int) -> tuple[Any, Any]:
    """A point of a (width, height) picture after quarter turns, counter-clockwise."""
    x, y = point
    width, height = picture
    for _ in range(turn % 4):
        x, y, width, height = y, width - x, height, width
    return x, y


def _turn_box(box: Box, picture: tuple[int, int], turn: int) -> Box:
    (x0, y0), (x1, y1) = (_turn_point(corner, picture, turn) for corner in (box[:2], box[2:]))
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _detector() -> Any:
    """One dlib detector a thread: its scanner keeps the picture it works on."""
    if not hasattr(_local, "detector"):
        import dlib

        _local.detector = dlib.get_frontal_face_detector()
    return _local.detector


def without_overlaps(faces: Sequence[Face]) -> list[Face]:
    """Those inside the picture, the surer one of two that share much of one of them."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: (-face.score, face.box)):
        x0, y0, x1, y1 = face.box
        width, height = face.picture
        inside = max(0, x0) < min(x1, width) and max(0, y0) < min(y1, height)
        shared = (shared_area(face.box, other.box) / min(face.area, other.area) for other in kept)
        if inside and all(share < 0.5 for share in shared):
            kept.append(face)
    return kept


def shared_area(first: Box, second: Box) -> int:
    """Of two boxes, in square pixels; 0 where they do not overlap."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0, width) * max(0, height)
