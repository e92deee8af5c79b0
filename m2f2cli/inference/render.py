"""Pictures for people: the forgery map over the picture, and boxes with scores. Pillow only."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m2f2cli.data.faces import Crop
from m2f2cli.errors import UsageError
from m2f2cli.files import atomic_write
from m2f2cli.inference.sources import Source
from m2f2cli.options.detect import DetectOptions
from m2f2cli.records import Box, Detection

if TYPE_CHECKING:
    from m2f2cli.inference.pipeline import Judged, Score, View

_COLORS = {"fake": (214, 40, 40), "real": (46, 139, 87), "uncertain": (232, 160, 32)}
# Dark blue, violet, orange, yellow: the map from its lowest to its highest value.
_SCALE = np.array([(13, 8, 80), (126, 3, 168), (240, 110, 60), (252, 253, 160)], dtype=np.float32)


class Renderer:
    """Draws what was asked for and notes the files in the record.

    ``DIR/sub/photo.jpg.heatmap.jpg`` belongs to ``photo.jpg`` of the sub-folder ``sub``. A video is
    shown by its sampled frame with the highest fake probability.

    Args:
        options: With the folders for forgery maps and boxes.
        sources: Every input of the run; none of them is ever written to.

    Attributes:
        draws: Whether anything is drawn, so that pixels must be kept.
    """

    def __init__(self, options: DetectOptions, sources: Sequence[Source]) -> None:
        self.heatmap, self.annotate = options.heatmap, options.annotate
        self.draws = bool(self.heatmap or self.annotate)
        self._inputs = {os.path.realpath(s.path) for s in sources} if self.draws else set()

    def check(self, config: Any) -> None:
        """Refuse what this model cannot give.

        Raises:
            UsageError: A heatmap is asked of a model without a forgery map.
        """
        if self.heatmap and not config.forgery_map:
            raise UsageError(
                "This model has no forgery map, so there is no heatmap to draw.",
                "Leave out --heatmap, or choose another --model.",
            )

    def draw(self, item: Judged) -> Detection:
        """Write the pictures of one judged item.

        Returns:
            The record with ``heatmap`` and ``annotated`` set.

        Raises:
            UsageError: The picture would take the place of an input.
            M2F2Error: It cannot be written.
        """
        record, scores = item.record, item.scores
        if record.status != "ok" or not self.draws:
            return record
        view = max(
            (view for view in item.prepared.views if view.crops),
            key=lambda view: max(scores[crop.digest].fake_probability for crop in view.crops),
        )
        assert view.pixels is not None  # they are kept when anything is drawn
        picture = Image.fromarray(view.pixels)
        name = item.prepared.source.name
        if self.heatmap:
            drawn = heat(picture, view.crops, scores, view.scale)
            file = self._save(drawn, self.heatmap / f"{name}.heatmap.jpg")
            record = replace(record, heatmap=file)
        if self.annotate:
            drawn = annotated(picture, _labels(record, view, scores), view.scale)
            file = self._save(drawn, self.annotate / f"{name}.annotated.jpg")
            record = replace(record, annotated=file)
        return record

    def _save(self, picture: Image.Image, path: Path) -> str:
        if os.path.realpath(path) in self._inputs:
            raise UsageError(
                f"'{path}' is one of the inputs, which are never written to.",
                "Choose another folder for --heatmap and --annotate.",
            )
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=90)
        atomic_write(path, data.getvalue())
        return str(path)


def _labels(
    record: Detection, view: View, scores: Mapping[bytes, Score]
) -> list[tuple[Box, str, str]]:
    """(box, verdict, words) of each crop of a view."""
    faces = {face.crop: face for face in record.faces}
    labels = []
    for crop in view.crops:
        score = scores[crop.digest].fake_probability
        face = faces.get(crop.crop)
        verdict = face.verdict if face else str(record.verdict)
        words = f"{verdict} {score:.2f}" if face else f"frame {view.index}: {score:.2f}"
        if face and face.forgery:
            words += f", {face.forgery}"
        labels.append((crop.crop, verdict, words))
    return labels


def annotated(
    picture: Image.Image, labels: Sequence[tuple[Box, str, str]], shrink: float
) -> Image.Image:
    """Draw boxes with words.

    Args:
        picture: RGB; not changed.
        labels: (box in original pixels, verdict, words) each.
        shrink: Picture pixels per original pixel.
    """
    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    size = max(11, max(drawn.size) // 45)
    font = ImageFont.load_default(size)
    for box, verdict, words in labels:
        x0, y0, x1, y1 = (round(value * shrink) for value in box)
        x0, y0 = max(x0, 0), max(y0, 0)
        x1, y1 = min(x1, drawn.width) - 1, min(y1, drawn.height) - 1
        if x1 <= x0 or y1 <= y0:
            continue
        color = _COLORS[verdict]
        pen.rectangle((x0, y0, x1, y1), outline=color, width=max(2, size // 6))
        left, top, right, bottom = pen.textbbox((0, 0), words, font=font)
        high = bottom - top + size // 2
        y = y0 - high if y0 >= high else y0
        pen.rectangle((x0, y, x0 + right - left + size // 2, y + high), fill=color)
        pen.text((x0 + size // 4, y + size // 4 - top), words, fill=(255, 255, 255), font=font)
    return drawn


def heat(
    picture: Image.Image, crops: Sequence[Crop], scores: Mapping[bytes, Score], shrink: float
) -> Image.Image:
    """Lay each crop's forgery map over it, dark where it is lowest and bright where highest.

    The colors are relative within one face: they tell where the model looks for its answer, not
    how sure it is.

    Args:
        picture: RGB; not changed.
        crops: The squares, in original pixels.
        scores: With ``forgery_map`` (g, g), by the crops' digests.
        shrink: Picture pixels per original pixel.
    """
    drawn = picture.copy()
    for crop in crops:
        values = scores[crop.digest].forgery_map
        if values is None:
            continue
        x0, y0, x1, y1 = (round(value * shrink) for value in crop.crop)
        layer = heat_layer(values, (max(x1 - x0, 1), max(y1 - y0, 1)))
        drawn.paste(layer, (x0, y0), layer)
    return drawn


def heat_layer(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A forgery map as a see-through picture, to be laid over its crop.

    Args:
        values: float32 (g, g), cosines in [-1, 1].
        size: (width, height) of the picture.

    Returns:
        RGBA; the more opaque, the higher the value.
    """
    spread = float(np.ptp(values))
    unit = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    smooth = Image.fromarray(unit.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(smooth), 0, 1)
    knots = np.linspace(0, 1, len(_SCALE))
    colors = np.stack([np.interp(level, knots, _SCALE[:, c]) for c in range(3)], axis=-1)
    layer = Image.fromarray(colors.astype(np.uint8))
    layer.putalpha(Image.fromarray((70 + 90 * level).astype(np.uint8)))
    return layer
