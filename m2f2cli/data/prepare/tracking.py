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
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m2f2cli.data.clips import ClipNotes
from m2f2cli.data.faces import Box, Face, crop_face, find_faces, finder_name, shared_area
from m2f2cli.data.images import file_sha256, read_picture
from m2f2cli.data.prepare.sources import Video
from m2f2cli.data.transforms import resize_and_crop
from m2f2cli.data.video import Frame, VideoFrames, evenly, read_frames
from m2f2cli.errors import InputError

MAX_GAP = 1.0
# Frames in waiting are held in memory.
MAX_FILLED = 12


class Placed(NamedTuple):
    """A frame with the face's box, without margin, and whether that was filled in."""

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
            return min(near, key=lambda box: (math.dist(_center(box), _center(last)), box))
        if recent:
            return None
    return faces[0].box if faces else None


def _center(box: Box) -> tuple[int, int]:
    """Twice the center, so that it is whole."""
    return box[0] + box[2], box[1] + box[3]


def _between(before: Placed, after: Placed, frame: Frame) -> Placed:
    start, end = before.frame.index, after.frame.index
    share = (frame.index - start) / (end - start)
    x0, y0, x1, y1 = (
        round(a + share * (b - a)) for a, b in zip(before.box, after.box, strict=True)
    )
    return Placed(frame, (x0, y0, x1, y1), interpolated=True)


def cut_faces(
    video: Video, *, frames: int, size: int, margin: float, boxes: ClipNotes | None = None
) -> tuple[np.ndarray, ClipNotes, str | None]:
    """Cut the face out of a video's frames.

    Args:
        video: The video.
        frames: How many are looked at, evenly spaced.
        size: Side of a crop in pixels.
        margin: Share by which a crop is larger than the face.
        boxes: The notes of a clip whose frame numbers and boxes are taken, as they are, instead of
            searching: those of the original that the video was forged from.

    Returns:
        uint8 (F, size, size, 3), RGB, F may be 0; how they were made; and what a user should know
        about the reading, None mostly.

    Raises:
        InputError: The video cannot be read, or ``boxes`` are of a video of another size.
    """
    numbers: list[int] | None = None
    given: dict[int, Any] = {}
    if boxes is not None:
        numbers = [int(number) for number in boxes.frames]
        given = dict(zip(numbers, ((*map(int, box),) for box in boxes.boxes), strict=True))
    placed: list[tuple[int, Box]] = []
    crops: list[np.ndarray] = []
    looked_at = interpolated = 0
    picture = (0, 0)
    track = Track()
    with _open(video, frames, numbers) as feed:
        for frame in feed.frames:
            looked_at += 1
            picture = frame.pixels.shape[1], frame.pixels.shape[0]
            if boxes is None:
                settled = track.follow(frame, find_faces(frame.pixels, dlib_only=True))
            else:
                _check_size(video, picture, boxes)
                settled = [Placed(frame, given[frame.index])] if frame.index in given else []
            for one in settled:
                square = Face(one.box, 0.0, picture).crop(margin)
                crops.append(resize_and_crop(crop_face(one.frame.pixels, square), size))
                placed.append((one.frame.index, one.box))
                interpolated += one.interpolated
        remark, digest, fps = feed.note, feed.sha256, feed.fps
    notes = ClipNotes(
        source=video.name,
        source_sha256=digest,
        source_bytes=video.stored_bytes,
        detector=boxes.detector if boxes else finder_name(),
        margin=margin,
        fps=fps or 0.0,
        asked=boxes.asked if boxes else frames,
        looked_at=looked_at,
        interpolated=interpolated,
        boxes_from=boxes.source_sha256 if boxes else "",
        picture=np.array(picture, np.int32),
        frames=np.array([number for number, _ in placed], np.int32),
        boxes=np.array([box for _, box in placed], np.int32).reshape(-1, 4),
    )
    empty = np.zeros((0, size, size, 3), np.uint8)
    return np.stack(crops) if crops else empty, notes, remark


def _check_size(video: Video, picture: tuple[int, int], boxes: ClipNotes) -> None:
    if picture != tuple(boxes.picture):
        raise InputError(
            f"'{video.paths[0]}' is {picture[0]}x{picture[1]}, but the boxes are for "
            f"{boxes.picture[0]}x{boxes.picture[1]}.",
            hint="Leave out --boxes-from, or give the boxes of the right original.",
        )


def _open(
    video: Video, count: int, numbers: Sequence[int] | None
) -> AbstractContextManager[VideoFrames | _Pictures]:
    if video.is_video:
        return read_frames(video.paths[0], count=count, numbers=numbers)
    return nullcontext(_Pictures(video.paths, count, numbers))


class _Pictures:
    """Pictures that stand for the frames of a video, 25 a second; or a single one."""

    fps = None

    def __init__(self, paths: Sequence[Path], count: int, numbers: Sequence[int] | None) -> None:
        self._paths = paths
        self._notes: dict[str, None] = {}
        wanted = evenly(len(paths), count) if numbers is None else numbers
        self.frames = self._read([number for number in wanted if number < len(paths)])

    def _read(self, wanted: Sequence[int]) -> Iterator[Frame]:
        for number in wanted:
            picture = read_picture(self._paths[number])
            if picture.note:
                self._notes[picture.note] = None
            yield Frame(number, number / 25.0, picture.pixels)

    @property
    def sha256(self) -> str:
        """Of the file's bytes, or of all files' digests in order."""
        digests = [file_sha256(path) for path in self._paths]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()

    @property
    def note(self) -> str | None:
        """All notes in one line; None when there are none."""
        return "; ".join(self._notes) or None
