"""What the page shows of a verdict: sentences, boxes, forgery maps, timeline and answers as HTML.

The markup is in ``assets/demo/parts.html``, which escapes everything; this module works out what
stands in it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2

from m2f2cli.inference.pipeline import Score
from m2f2cli.inference.render import heat_layer
from m2f2cli.inference.verdict import Rule
from m2f2cli.records import (
    Box,
    Detection,
    Explanation,
    FaceScore,
    FrameScore,
    Settings,
    to_csv,
    to_line,
)
from m2f2cli.serving.worker import Look, Said

HEADLINES = {
    "fake": "Looks forged",
    "real": "No forgery found",
    "uncertain": "Cannot tell",
}
OPINION = (
    "This is the opinion of one program about one face, not proof. "
    "“No forgery found” does not mean that the picture is genuine."
)
MAP_LEGEND = (
    "Bright parts of the map are where the model found most of what it looks for, compared with "
    "the rest of the same face. It does not say how sure the model is."
)
_MAP_SIDE = 336  # pixels of the picture of a forgery map
# Of the timeline, in units of its drawing.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 230, 46, 706, 12, 196


def percent(probability: float) -> str:
    """A probability as people say it; never 0 % or 100 %, which no model can promise."""
    if probability > 0.995:
        return "over 99 %"
    if probability < 0.005:
        return "under 1 %"
    return f"{100 * probability:.0f} %"


def headline(record: Detection, face: FaceScore | None = None) -> str:
    """The verdict in two or three words; of an item without one, that there is none."""
    verdict = face.verdict if face else record.verdict
    return HEADLINES[verdict] if verdict else "No verdict"


def verdict(look: Look, face: int = 0) -> str:
    """The verdict on a face of a picture, on a video, or why there is none."""
    record = look.record
    chosen = record.faces[face] if record.faces else None
    scale = None
    if record.fake_probability is not None:
        low, high = record.settings.uncertain or (0.0, 0.0)
        score = (chosen or record).fake_probability or 0.0
        scale = {"score": score, "threshold": record.settings.threshold, "low": low, "high": high}
    return _part(
        "verdict",
        kind=(chosen.verdict if chosen else record.verdict) or "none",
        headline=headline(record, chosen),
        scale=scale,
        sentences=sentences(record, chosen),
        opinion=OPINION if record.verdict else "",
    )


def sentences(record: Detection, face: FaceScore | None = None) -> list[str]:
    """What the verdict is based on, about one face or about the item as a whole."""
    if record.fake_probability is None:
        return [record.message or ""]
    about = face or record
    video = record.kind == "video"
    subject = "these frames, on average," if video else "this face"
    said = [
        f"The model gives {subject} a probability of {percent(about.fake_probability or 0.0)} of "
        f"being forged. {_limits(record.settings)}"
    ]
    if about.in_domain is False:
        said.append(
            f"{'Most of these frames are' if video else 'This face is'} unlike the pictures the "
            "model has learned from (sharper, blurred or compressed in another way), so the "
            "probability means little here and the model does not decide."
        )
    elif about.verdict == "uncertain":
        said.append("It lies in that band.")
    elif about.forgery:
        said.append(
            f"Of the kinds of forgery that it knows, this looks most like: {about.forgery}."
        )
    if video:
        judged = sum(frame.fake_probability is not None for frame in record.frames)
        said.append(f"{judged} of the {len(record.frames)} frames looked at show a face.")
    elif record.crop_source == "picture":
        said.append("No face was searched for: the picture was taken as a face cut out already.")
    elif len(record.faces) > 1:
        said.append(f"It shows {len(record.faces)} faces; the most suspicious one decides.")
    if record.note:
        said.append(f"About the file: {record.note}.")
    return said


def _limits(settings: Settings) -> str:
    words = f"From {percent(settings.threshold)} on it says “forged”"
    if settings.uncertain is None:
        return words + "."
    low, high = (percent(value) for value in settings.uncertain)
    return f"{words}; between {low} and {high} it is wrong too often to say either."


def stage(look: Look, face: int = 0) -> str:
    """The picture with a button around each face, the forgery maps, and their slider."""
    record = look.record
    if not look.shown or not record.width or not record.height:
        return ""
    size = (record.width, record.height)
    faces = [
        {
            "map": _map(look.judged.scores[look.judged.crop(found.crop).digest]),
            "place": _place(found.crop, size),
            "verdict": found.verdict,
            "score": found.fake_probability,
            "chosen": number == face,
            "label": f"Face {number + 1} of {len(record.faces)}: {HEADLINES[found.verdict]}, "
            f"{percent(found.fake_probability)}",
        }
        for number, found in enumerate(record.faces)
    ]
    photo = look.shown[0]
    return _part("stage", name=record.path, photo=photo, size=size, faces=faces, legend=MAP_LEGEND)


def _map(score: Score) -> bytes:
    if score.forgery_map is None:
        return b""
    data = io.BytesIO()
    heat_layer(score.forgery_map, (_MAP_SIDE, _MAP_SIDE)).save(data, "PNG")
    return data.getvalue()


def _place(box: Box, size: tuple[int, int]) -> str:
    """A box as shares of the picture, cut at its borders."""
    x0, x1 = (min(max(box[n] / size[0], 0.0), 1.0) for n in (0, 2))
    y0, y1 = (min(max(box[n] / size[1], 0.0), 1.0) for n in (1, 3))
    return f"left:{x0:.3%};top:{y0:.3%};width:{x1 - x0:.3%};height:{y1 - y0:.3%}"


def timeline(record: Detection) -> str:
    """The fake probability of each frame of a video over its time, and the same as a table."""
    if not record.frames:
        return ""
    last = max(record.frames[-1].time, 1e-3)

    def x(time: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * time / last

    def y(probability: float) -> float:
        return _TOP + (_BOTTOM - _TOP) * (1 - probability)

    line, pen = [], "M"
    for frame in record.frames:
        if frame.fake_probability is None:
            pen = "M"
            continue
        line.append(f"{pen}{x(frame.time):.1f} {y(frame.fake_probability):.1f}")
        pen = "L"
    return _part(
        "timeline",
        frames=[_frame(frame, record.settings) for frame in record.frames],
        last=last,
        settings=record.settings,
        line=" ".join(line),
        x=x,
        y=y,
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_RIGHT,
    )


def _frame(frame: FrameScore, settings: Settings) -> dict[str, Any]:
    score = frame.fake_probability
    rule = Rule(settings.threshold, settings.uncertain)
    kind = None if score is None else rule.judge(score, None).verdict
    return {"time": frame.time, "index": frame.index, "score": score, "kind": kind}


def worst(look: Look) -> str:
    """The frames of a video with the highest fake probability."""
    record = look.record
    known = {frame.index: frame for frame in record.frames}
    size = (record.width or 1, record.height or 1)
    frames = []
    for number, picture in look.shown.items():
        crop = known[number].crop
        place = _place(crop, size) if crop else ""
        frames.append(_frame(known[number], record.settings) | {"picture": picture, "place": place})
    return _part("worst", frames=frames, size=size)


def answers(said: Sequence[Said], record: Explanation | None = None) -> str:
    """The language model's answers so far; with the record, at the end, whether it agrees."""
    explained = record.explanations[0] if record and record.explanations else None
    return _part("answers", said=said, explained=explained, done=record is not None)


def table(records: Sequence[Detection]) -> str:
    """Several items, one a row."""
    rows = [
        {
            "kind": record.verdict or "none",
            "path": record.path,
            "headline": headline(record),
            "score": record.fake_probability,
            "why": record.message or record.reason or record.forgery or record.note or "",
        }
        for record in records
    ]
    return _part("table", rows=rows)


def downloads(records: Sequence[Detection]) -> str:
    """The records as files that never lie on the server: they are in the links."""
    lines = b"".join(to_line(record.to_dict()) for record in records)
    rows = to_csv(records).encode("utf-8", "replace")
    return _part("downloads", lines=lines, rows=rows)


def progress(done: int, total: int) -> str:
    """How far a batch is."""
    return _part("progress", done=done, total=total)


def _part(macro: str, **given: Any) -> str:
    return str(getattr(_parts(), macro)(**given)).strip()


@cache
def _parts() -> Any:
    """The macros of the template."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("m2f2cli", "assets/demo"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = percent
    environment.filters["share"] = lambda value, digits: f"{value:.{digits}%}"
    environment.filters["data_uri"] = lambda content, kind: (
        f"data:{kind};base64,{base64.b64encode(content).decode()}"
    )
    return environment.get_template("parts.html").module
