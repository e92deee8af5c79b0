"""One face through a video: which of the faces found it is, and where it was when none was found.

The rule, frame by frame in order of time:

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

import math
from dataclasses import dataclass

from m2f2cli.data.faces import Box, Face, shared_area
from m2f2cli.data.video import Frame

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
    """Twice the distance of the centres, in pixels."""
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
