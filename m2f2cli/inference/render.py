"""Pictures for people: the forgery map over the picture, and boxes with scores. Pillow only."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m2f2cli.data.faces import Crop
from m2f2cli.errors import UsageError
from m2f2cli.files import atomic_write, remove_stale_below
from m2f2cli.inference.sources import DRAWING
from m2f2cli.options.detect import DetectOptions
from m2f2cli.records import Box, Detection

if TYPE_CHECKING:
    from m2f2cli.inference.pipeline import Judged, Score, View

_LONGEST_NAME = 180  # bytes of 255
_COLORS = {"fake": (214, 40, 40), "real": (46, 139, 87), "uncertain": (232, 160, 32)}
# Dark blue, violet, orange, yellow: the map from its lowest to its highest value.
_SCALE = np.array([(13, 8, 80), (126, 3, 168), (240, 110, 60), (252, 253, 160)], dtype=np.float32)


class Renderer:
    """Draws what was asked for and notes the files in the record.

    ``DIR/sub/photo.jpg.HASH.heatmap.jpg`` belongs to ``photo.jpg`` of the sub-folder ``sub``, HASH
    being the first twelve digits of its ``sha256``. No file is ever replaced by one that differs:
    such a drawing gets a number, so that each record keeps its own. A video is shown by its sampled
    frame with the highest fake probability.

    Args:
        options: With the folders for forgery maps and boxes.

    Attributes:
        draws: Whether anything is drawn, so that pixels must be kept.
    """

    def __init__(self, options: DetectOptions) -> None:
        self.heatmap, self.annotate = options.heatmap, options.annotate
        self.draws = bool(self.heatmap or self.annotate)
        for folder in filter(None, {self.heatmap, self.annotate}):
            remove_stale_below(folder)

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
        named = name.with_name(f"{_shortened(name.name)}.{str(record.sha256)[:12]}")
        if self.heatmap:
            drawn = heat(picture, view.crops, scores, view.scale)
            record = replace(record, heatmap=_save(drawn, self.heatmap / named, "heatmap"))
        if self.annotate:
            drawn = annotated(picture, _labels(record, view, scores), view.scale)
            record = replace(record, annotated=_save(drawn, self.annotate / named, "annotated"))
        return record


def _shortened(name: str) -> str:
    """A file's name with room for what is put behind it."""
    while len(os.fsencode(name)) > _LONGEST_NAME:
        name = name[:-1]
    return name


def _save(picture: Image.Image, named: Path, kind: str) -> str:
    """Write a drawing under the first name that is free, or that holds the very same one."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=90, comment=DRAWING)
    for number in count(1):
        path = named.with_name(f"{named.name}.{kind}{f'-{number}' if number > 1 else ''}.jpg")
        if not os.path.lexists(path):
            atomic_write(path, data.getvalue())
            break
        if path.is_file() and path.read_bytes() == data.getvalue():
            break
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
