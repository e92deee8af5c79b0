"""Generated videos with a real face moving in them, and where it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from m2f2cli.data.faces import find_faces

PHOTO = Path(__file__).parents[3] / "examples" / "astronaut.jpg"
FPS = 25


class Scene:
    """A face on a smooth path over a quiet background.

    Args:
        width: Of a frame, in pixels.
        height: Of a frame, in pixels.
        face: Side of the face box, in pixels, on average; it breathes by a tenth.
        seconds: For one round of the path.
    """

    def __init__(self, width: int, height: int, *, face: int, seconds: float) -> None:
        photo = Image.open(PHOTO).convert("RGB")
        x0, y0, x1, y1 = find_faces(np.asarray(photo))[0].box
        side = x1 - x0
        around = (x0 - side // 2, y0 - side // 2, x1 + side // 2, y1 + side // 2)
        self._head = photo.crop(around)
        self._width, self._height = width, height
        self._face, self._seconds = face, seconds
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        gray = 110 + 50 * np.sin(x / width * 3) * np.cos(y / height * 2)
        self._background = np.repeat(gray[..., None], 3, axis=2).astype(np.uint8)

    def place(self, number: int) -> tuple[float, float, float]:
        """The center (x, y) and side of the face box in a frame."""
        turn = 2 * math.pi * number / (FPS * self._seconds)
        side = self._face * (1 + 0.1 * math.sin(3 * turn))
        x = self._width * (0.5 + 0.28 * math.sin(turn))
        y = self._height * (0.5 + 0.12 * math.sin(2 * turn))
        return x, y, side

    def draw(self, number: int, *, face: bool = True) -> np.ndarray:
        """A frame: uint8 (height, width, 3)."""
        canvas = Image.fromarray(self._background)
        if face:
            x, y, half = self.place(number)  # the cut-out is twice as wide as the face
            box = (round(x - half), round(y - half), round(x + half), round(y + half))
            head = self._head.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
            canvas.paste(head, box[:2])
        return np.asarray(canvas)

    def record(
        self,
        path: Path,
        frames: int,
        *,
        face: Callable[[int], bool] = lambda number: True,
        shift: int = 0,
    ) -> Path:
        """Write a video.

        Args:
            path: The file.
            frames: How many.
            face: Whether the face is seen in a frame.
            shift: Begin the path at this frame.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = self._width, self._height, "yuv420p"
            stream.codec_context.time_base = Fraction(1, FPS)
            for number in range(frames):
                pixels = self.draw(number + shift, face=face(number))
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, FPS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path
