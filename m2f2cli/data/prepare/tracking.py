"""From one video to its face crops: look at frames, follow the face, cut and scale.

Which of the faces found is the face, and where it was when none was found:

* The first face is the largest in its frame. From then on it is the face nearest to the last box
  among those that overlap it. No smoothing: each box is what the finder says, as ``m2f2 detect``
  cuts it.
* Faces that do not overlap the last box are not believed within ``MAX_GAP`` seconds of it; after
  that, as at the beginning, the largest counts.
* Frames without the face are filled by drawing a straight line between the boxes before and after,
  if these lie at most ``MAX_GAP`` seconds and ``MAX_FILLED`` frames apart. Other frames without
  the face are left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2f2cli.data.clips import ClipNotes
from m2f2cli.data.faces import MARGIN, MIN_SCORE, Box, Face, crop_face, find_faces, shared_area
from m2f2cli.data.images import read_bytes, read_picture
from m2f2cli.data.prepare.sources import Video
from m2f2cli.data.transforms import resize_and_crop
from m2f2cli.data.video import Frame, VideoFrames, evenly, read_frames
from m2f2cli.errors import InputError
from m2f2cli.options.fields import Options, option

MAX_GAP = 1.0
# Frames in waiting are held in memory.
MAX_FILLED = 12


@dataclass(frozen=True)
class Placed:
    """A frame in which the face is known to be.

    Attributes:
        frame: The frame.
        box: The face, without margin.
        interpolated: Whether the box was filled in.
    """

    frame: Frame
    box: Box
    interpolated: bool = False


class Track:
    """Follows one face; feed it every frame in order."""

    def __init__(self) -> None:
        self._last: Placed | None = None
        self._waiting: list[Frame] = []
        self._missed = 0

    def follow(self, frame: Frame, faces: list[Face]) -> list[Placed]:
        """Take the next frame.

        Args:
            frame: The frame.
            faces: The faces found in it, largest first.

        Returns:
            The frames that are now settled, in order: none while the face is lost; those in
            between and this one when it is found again.
        """
        last = self._last
        recent = last is not None and frame.time - last.frame.time <= MAX_GAP
        box = _pick(faces, last.box if last else None, recent)
        if box is None:
            self._missed += 1
            if recent and self._missed <= MAX_FILLED:
                self._waiting.append(frame)
            else:
                self._waiting.clear()
            return []
        found = Placed(frame, box)
        filled = []
        if last is not None and recent and self._missed <= MAX_FILLED:
            filled = [_between(last, found, waiting) for waiting in self._waiting]
        self._last, self._missed = found, 0
        self._waiting.clear()
        return [*filled, found]


def _pick(faces: list[Face], last: Box | None, recent: bool) -> Box | None:
    if last is not None:
        near = [face.box for face in faces if shared_area(face.box, last)]
        if near:
            return min(near, key=lambda box: (_distance(box, last), box))
        if recent:
            return None
    return faces[0].box if faces else None


def _distance(first: Box, second: Box) -> float:
    """Twice the distance of the centers, in pixels."""
    return math.hypot(
        first[0] + first[2] - second[0] - second[2], first[1] + first[3] - second[1] - second[3]
    )


def _between(before: Placed, after: Placed, frame: Frame) -> Placed:
    start, end = before.frame.index, after.frame.index
    share = (frame.index - start) / (end - start)
    x0, y0, x1, y1 = (
        round(a + share * (b - a)) for a, b in zip(before.box, after.box, strict=True)
    )
    return Placed(frame, (x0, y0, x1, y1), interpolated=True)


@dataclass(frozen=True)
class CropOptions(Options):
    """What the crops look like."""

    frames: int = option(100, "Frames looked at in a video, evenly spaced.", low=1, high=1000)
    size: int = option(224, "Side of a crop in pixels.", low=16, high=1024)
    margin: float = option(MARGIN, "Share by which a crop is larger than the face.", low=0, high=4)


@dataclass(frozen=True)
class Cut:
    """The crops of a video.

    Attributes:
        crops: uint8 (F, size, size, 3), RGB; F may be 0.
        notes: How they were made.
        remark: What a user should know about the reading; None mostly.
    """

    crops: np.ndarray
    notes: ClipNotes
    remark: str | None


def cut_faces(video: Video, options: CropOptions, boxes: ClipNotes | None = None) -> Cut:
    """Cut the face out of a video's frames.

    Args:
        video: The video.
        options: How many frames, and how to cut.
        boxes: The notes of a clip whose frame numbers and boxes are taken, as they are, instead of
            searching: those of the original that the video was forged from.

    Raises:
        InputError: The video cannot be read, or ``boxes`` are of a video of another size.
    """
    placed: list[tuple[int, tuple[int, int, int, int]]] = []
    crops: list[np.ndarray] = []
    looked_at = interpolated = 0
    size = (0, 0)
    with _open(video, options.frames, boxes) as feed:
        track = Track()
        given = _by_number(boxes)
        for frame in feed.frames:
            looked_at += 1
            size = _same_size(video, frame, boxes)
            for found in _settle(track, frame, given):
                face = Face(found.box, 0.0, size)
                cut = crop_face(found.frame.pixels, face.crop(options.margin))
                crops.append(resize_and_crop(cut, options.size))
                placed.append((found.frame.index, found.box))
                interpolated += found.interpolated
        remark, digest, fps = feed.note, feed.sha256, feed.fps
    notes = ClipNotes(
        source=video.name,
        source_sha256=digest,
        source_bytes=stored_bytes(video),
        detector=boxes.detector if boxes else detector_name(),
        margin=options.margin,
        fps=fps or 0.0,
        asked=boxes.asked if boxes else options.frames,
        looked_at=looked_at,
        interpolated=interpolated,
        boxes_from=boxes.source_sha256 if boxes else "",
        picture=np.array(size, np.int32),
        frames=np.array([number for number, _ in placed], np.int32),
        boxes=np.array([box for _, box in placed], np.int32).reshape(-1, 4),
    )
    empty = np.zeros((0, options.size, options.size, 3), np.uint8)
    return Cut(np.stack(crops) if crops else empty, notes, remark)


def detector_name() -> str:
    """What finds the faces, with what its answers depend on."""
    import dlib

    return f"dlib {dlib.__version__} frontal HOG, score {MIN_SCORE} and above"


def stored_bytes(video: Video) -> int:
    """The size of a video's files.

    Raises:
        InputError: One is gone.
    """
    try:
        return sum(path.stat().st_size for path in video.paths)
    except OSError as error:
        raise InputError(
            f"'{error.filename}' cannot be read: {error.strerror}.", "missing"
        ) from error


def _settle(track: Track, frame: Frame, given: Mapping[int, Any] | None) -> list[Placed]:
    if given is None:
        return track.follow(frame, find_faces(frame.pixels))
    return [Placed(frame, given[frame.index])] if frame.index in given else []


def _by_number(boxes: ClipNotes | None) -> dict[int, Any] | None:
    if boxes is None:
        return None
    corners = (tuple(int(edge) for edge in box) for box in boxes.boxes)
    return dict(zip((int(number) for number in boxes.frames), corners, strict=True))


def _same_size(video: Video, frame: Frame, boxes: ClipNotes | None) -> tuple[int, int]:
    height, width = frame.pixels.shape[:2]
    if boxes is not None and (width, height) != tuple(boxes.picture):
        raise InputError(
            f"'{video.paths[0]}' is {width}x{height}, but the boxes are for "
            f"{boxes.picture[0]}x{boxes.picture[1]}.",
            hint="Leave out --boxes-from, or give the boxes of the right original.",
        )
    return width, height


def _open(
    video: Video, count: int, boxes: ClipNotes | None
) -> AbstractContextManager[VideoFrames | _Pictures]:
    numbers = None if boxes is None else [int(number) for number in boxes.frames]
    if video.is_video:
        return read_frames(video.paths[0], count=count, numbers=numbers)
    return nullcontext(_Pictures(video.paths, count, numbers))


class _Pictures:
    """Pictures that stand for the frames of a video, 25 a second; or a single one."""

    def __init__(self, paths: Sequence[Path], count: int, numbers: Sequence[int] | None) -> None:
        self.total = len(paths)
        self.fps = None
        self._paths = paths
        self._notes: list[str] = []
        wanted = evenly(self.total, count) if numbers is None else numbers
        self.frames = self._read([number for number in wanted if number < self.total])

    def _read(self, wanted: Sequence[int]) -> Iterator[Frame]:
        for number in wanted:
            picture = read_picture(self._paths[number])
            if picture.note:
                self._notes.append(picture.note)
            yield Frame(number, number / 25.0, picture.pixels)

    @property
    def sha256(self) -> str:
        """Of the file's bytes, or of all files' digests in order."""
        digests = [hashlib.sha256(read_bytes(path)) for path in self._paths]
        if len(digests) == 1:
            return digests[0].hexdigest()
        return hashlib.sha256(b"".join(one.digest() for one in digests)).hexdigest()

    @property
    def note(self) -> str | None:
        """All notes in one line; None when there are none."""
        return "; ".join(dict.fromkeys(self._notes)) or None
