"""From one source to the crops the network sees: decode, find faces, cut, scale. No torch."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m2f2cli.data.domain import Domain
from m2f2cli.data.faces import crop_face, find_faces
from m2f2cli.data.transforms import padded_square, resize_and_crop
from m2f2cli.data.video import read_frames
from m2f2cli.errors import InputError, UsageError
from m2f2cli.inference.sources import Source
from m2f2cli.records import Box

FACES_MODES = ("auto", "all", "largest", "none")
# A picture without a face that is no larger than this and nearly square is most likely a face crop
# already, as the published data sets hold them; ``auto`` then judges it whole.
READY_CROP_SIDE = 400
READY_CROP_RATIO = 1.25


class Recipe(NamedTuple):
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
    def of(cls, config: Any, *, finds_faces: bool) -> Recipe:
        """Read it from a detector's configuration.

        Args:
            config: A ``DetectorConfig``.
            finds_faces: Whether faces are to be found, which takes the finder it was trained with.

        Raises:
            UsageError: The detector was trained on crops of a face finder that m2f2 lacks.
        """
        finder = config.crop.get("detector", "dlib")
        if finds_faces and finder != "dlib":
            raise UsageError(
                f"The model wants face crops of '{finder}', which m2f2 does not have.",
                "Crop the faces yourself and add --faces none.",
            )
        domain = Domain.from_config(config.domain) if config.domain else None
        return cls(config.image_size, float(config.crop.get("margin", 0.3)), domain)

    def crop(
        self, cut: np.ndarray, square: Box, box: Box | None = None, score: float | None = None
    ) -> Crop:
        """Describe a cut, scaled crop."""
        digest = hashlib.sha256(cut.tobytes()).digest()
        distance = None if self.domain is None else self.domain.distance(cut)
        return Crop(cut, digest, square, box, score, distance)


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
    """

    pixels: np.ndarray
    digest: bytes
    crop: Box
    box: Box | None = None
    finder_score: float | None = None
    domain_distance: float | None = None
    padded: np.ndarray | None = None


@dataclass(frozen=True)
class View:
    """A picture, or one frame of a video.

    Attributes:
        crops: What is to be judged in it.
        faces_found: Faces the finder saw.
        index: Number of the frame, from 0.
        time: Seconds from the start of the video.
    """

    crops: tuple[Crop, ...]
    faces_found: int
    index: int = 0
    time: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """A source, read; or the reason why it could not be.

    Attributes:
        source: Where it came from.
        status: A key of ``records.STATUSES``.
        message: What went wrong; None when ``status`` is ok.
        sha256: Of the file's bytes; None when they could not be read.
        size: (width, height) upright, pixels; None when not decoded.
        views: One for a picture, one a frame for a video.
        note: What to know about how the file was read; None mostly.
    """

    source: Source
    status: str = "ok"
    message: str | None = None
    sha256: str | None = None
    size: tuple[int, int] | None = None
    views: tuple[View, ...] = ()
    note: str | None = None


def prepare(source: Source, *, faces: str, frames: int, recipe: Future[Recipe]) -> Prepared:
    """Read a source and cut its crops. A bad file gives a status, never an exception.

    Args:
        source: A picture or a video.
        faces: One of ``FACES_MODES``.
        frames: Frames sampled from a video.
        recipe: Waited for after decoding and face search, which need no model.
    """
    try:
        if source.kind == "video":
            return _prepare_video(source, faces=faces, frames=frames, recipe=recipe)
        picture = source.picture()
        view = _view(picture.pixels, faces=faces, recipe=recipe)
        found = Prepared(source, "ok", None, picture.sha256, picture.size, (view,), picture.note)
    except InputError as error:
        return Prepared(source, error.status, error.message)
    except UnicodeDecodeError:  # PyAV, at texts inside a video that are not UTF-8
        message = f"'{source.path}' holds texts that are not UTF-8, so it cannot be decoded."
        return Prepared(source, "unreadable", message)
    return _without_face(found, "the picture")


def _prepare_video(source: Source, *, faces: str, frames: int, recipe: Future[Recipe]) -> Prepared:
    views = []
    size = None
    with read_frames(Path(source.path), count=frames) as video:
        for frame in video.frames:
            height, width = frame.pixels.shape[:2]
            size = (width, height)
            view = _view(frame.pixels, faces=faces, recipe=recipe)
            views.append(View(view.crops, view.faces_found, frame.index, frame.time))
        found = Prepared(source, "ok", None, video.sha256, size, tuple(views), video.note)
    return _without_face(found, f"any of the {len(views)} frames looked at")


def _without_face(found: Prepared, where: str) -> Prepared:
    if any(view.crops for view in found.views):
        return found
    message = f"No face was found in {where}."
    return replace(found, status="no_face", message=message)


def _view(pixels: np.ndarray, *, faces: str, recipe: Future[Recipe]) -> View:
    found = [] if faces == "none" else find_faces(pixels)
    wanted = recipe.result()
    if faces == "none" or (faces == "auto" and not found and _looks_like_a_crop(pixels)):
        return View((_whole(pixels, wanted),), len(found))
    chosen = found[:1] if faces == "largest" else found
    crops = []
    for face in chosen:
        square = face.crop(wanted.margin)
        cut = resize_and_crop(crop_face(pixels, square), wanted.size)
        crops.append(wanted.crop(cut, square, face.box, round(face.score, 4)))
    return View(tuple(crops), len(found))


def _looks_like_a_crop(pixels: np.ndarray) -> bool:
    sides = pixels.shape[:2]
    return max(sides) <= READY_CROP_SIDE and max(sides) <= READY_CROP_RATIO * min(sides)


def _whole(pixels: np.ndarray, wanted: Recipe) -> Crop:
    """The picture's centre square, which is what the preprocessing keeps of it."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    crop = wanted.crop(resize_and_crop(pixels, wanted.size), (left, top, left + side, top + side))
    padded = padded_square(pixels, wanted.size) if wanted.pads else None
    if padded is None:
        return crop
    digest = hashlib.sha256(crop.digest + padded.tobytes()).digest()
    return replace(crop, digest=digest, padded=padded)
