"""The page's pictures: boxes, forgery map, verdict, timeline and answers as HTML.

Everything from outside (names, messages, answers) is escaped here.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from m2f2cli.inference.render import heat_layer
from m2f2cli.inference.scoring import Score
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
from m2f2cli.serving import wording
from m2f2cli.serving.service import Look, Said

_MAP_SIDE = 336  # pixels of the picture of a forgery map
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 230, 46, 12, 34  # of the timeline


def verdict(look: Look, face: int = 0) -> str:
    """The verdict on a face of a picture, on a video, or why there is none."""
    record = look.record
    chosen = record.faces[face] if record.faces else None
    kind = (chosen.verdict if chosen else record.verdict) or "none"
    words = "".join(f"<p>{escape(text)}</p>" for text in wording.sentences(record, chosen))
    scale = _scale(record, chosen) if record.fake_probability is not None else ""
    opinion = f'<p class="m2-small">{escape(wording.OPINION)}</p>' if record.verdict else ""
    return (
        f'<section class="m2-card m2-{kind}" role="status"><h2>'
        f"{escape(wording.headline(record, chosen))}</h2>{scale}{words}{opinion}</section>"
    )


def failure(sentence: str) -> str:
    """That something could not be done."""
    return f'<section class="m2-card m2-none" role="alert"><p>{escape(sentence)}</p></section>'


def _scale(record: Detection, face: FaceScore | None) -> str:
    """The probability on a line from 0 to 100 % with threshold and uncertain band."""
    score = (face or record).fake_probability or 0.0
    low, high = record.settings.uncertain or (0.0, 0.0)
    threshold = record.settings.threshold
    label = (
        f"Probability of being forged: {wording.percent(score)}; "
        f"threshold {wording.percent(threshold)}"
    )
    return (
        f'<div class="m2-scale" role="img" aria-label="{escape(label)}">'
        f'<i class="m2-band" style="left:{low:.2%};width:{high - low:.2%}"></i>'
        f'<i class="m2-fill" style="width:{score:.2%}"></i>'
        f'<i class="m2-tick" style="left:{threshold:.2%}"></i>'
        f'<b style="left:{min(max(score, 0.07), 0.93):.2%}">{escape(wording.percent(score))}</b>'
        '</div><div class="m2-ends"><span>genuine</span><span>forged</span></div>'
    )


def stage(look: Look, face: int = 0) -> str:
    """The picture with a button around each face, the forgery maps, and their slider."""
    record = look.record
    if not look.shown or not record.width or not record.height:
        return ""
    size = (record.width, record.height)
    total = len(record.faces)
    layers, boxes = [], []
    for number, found in enumerate(record.faces):
        place = _place(found.crop, size)
        layers.append(_layer(look.judged.scores[look.judged.crop(found.crop).digest], place))
        chosen = "true" if number == face else "false"
        label = escape(wording.face_label(found, number + 1, total))
        tag = f"{number + 1}: " if total > 1 else ""
        boxes.append(
            f'<button type="button" class="m2-box m2-{found.verdict}" data-face="{number}" '
            f'aria-pressed="{chosen}" aria-label="{label}" style="{place}">'
            f"<span>{tag}{escape(wording.percent(found.fake_probability))}</span></button>"
        )
    name = escape(record.path)
    photo = _data("jpeg", look.shown[0])
    return (
        f'<div class="m2-stage"><div class="m2-canvas" style="aspect-ratio:{size[0]}/{size[1]}">'
        f'<img class="m2-photo" src="{photo}" alt="The picture {name}">'
        f"{''.join(layers)}{''.join(boxes)}</div>{_slider() if any(layers) else ''}</div>"
    )


def _layer(score: Score, place: str) -> str:
    if score.forgery_map is None:
        return ""
    data = io.BytesIO()
    heat_layer(score.forgery_map, (_MAP_SIDE, _MAP_SIDE)).save(data, "PNG")
    return f'<img class="m2-map" src="{_data("png", data.getvalue())}" alt="" style="{place}">'


def _slider() -> str:
    return (
        '<label class="m2-slider"><span>Forgery map: hidden</span>'
        '<input type="range" min="0" max="100" value="60" '
        'aria-label="How strongly the forgery map is laid over the picture">'
        f'<span>strong</span></label><p class="m2-small">{escape(wording.MAP_LEGEND)}</p>'
    )


def _place(box: Box, size: tuple[int, int]) -> str:
    """A box as shares of the picture, cut at its borders."""
    x0, x1 = (min(max(box[n] / size[0], 0.0), 1.0) for n in (0, 2))
    y0, y1 = (min(max(box[n] / size[1], 0.0), 1.0) for n in (1, 3))
    return f"left:{x0:.3%};top:{y0:.3%};width:{x1 - x0:.3%};height:{y1 - y0:.3%}"


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def timeline(record: Detection) -> str:
    """The fake probability of each frame of a video over its time, and the same as a table."""
    if not record.frames:
        return ""
    last = max(record.frames[-1].time, 1e-3)
    threshold = record.settings.threshold
    parts = [_axis(last), _limit(threshold)]
    if record.settings.uncertain:
        low, high = record.settings.uncertain
        top = _y(high)
        parts.insert(0, _rectangle("m2-zone", top, _y(low) - top))
    path, pen = [], "M"
    for frame in record.frames:
        if frame.fake_probability is None:
            pen = "M"
            continue
        path.append(f"{pen}{_x(frame.time, last):.1f} {_y(frame.fake_probability):.1f}")
        pen = "L"
    parts.append(f'<path class="m2-line" d="{" ".join(path)}"/>')
    parts += [_dot(frame, last, record.settings) for frame in record.frames]
    shown = sum(frame.fake_probability is not None for frame in record.frames)
    label = f"Probability of being forged in {shown} frames over {last:.1f} seconds"
    return (
        f'<figure class="m2-timeline"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>{_table(record.frames)}</figure>'
    )


def _x(time: float, last: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - 14) * time / last


def _y(probability: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - probability)


def _rectangle(kind: str, top: float, height: float) -> str:
    width = _WIDTH - _LEFT - 14
    return f'<rect class="{kind}" x="{_LEFT}" y="{top:.1f}" width="{width}" height="{height:.1f}"/>'


def _axis(last: float) -> str:
    words = [
        f'<line class="m2-grid" x1="{_LEFT}" x2="{_WIDTH - 14}" y1="{_y(p):.1f}" y2="{_y(p):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{_y(p) + 4:.1f}" text-anchor="end">{100 * p:.0f} %</text>'
        for p in (0.0, 0.5, 1.0)
    ]
    words += [
        f'<text x="{_x(t, last):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{t:.1f} s</text>'
        for t in (0.0, last / 2, last)
    ]
    return "".join(words)


def _limit(threshold: float) -> str:
    at = _y(threshold)
    return f'<line class="m2-limit" x1="{_LEFT}" x2="{_WIDTH - 14}" y1="{at:.1f}" y2="{at:.1f}"/>'


def _dot(frame: FrameScore, last: float, settings: Settings) -> str:
    x = _x(frame.time, last)
    if frame.fake_probability is None:
        return (
            f'<text class="m2-gap" x="{x:.1f}" y="{_y(0.0) - 4:.1f}" text-anchor="middle">×'
            f"<title>{frame.time:.1f} s: no face</title></text>"
        )
    kind = _kind(frame, settings)
    words = f"{frame.time:.1f} s: {wording.percent(frame.fake_probability)}"
    y = _y(frame.fake_probability)
    return (
        f'<circle class="m2-dot m2-{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
        f"<title>{words}</title></circle>"
    )


def _kind(frame: FrameScore, settings: Settings) -> str:
    rule = Rule(settings.threshold, settings.uncertain)
    return rule.judge(frame.fake_probability or 0.0, None).verdict


def _table(frames: Sequence[FrameScore]) -> str:
    rows = "".join(
        f"<tr><td>{frame.time:.2f} s</td><td>{frame.index}</td><td>"
        + ("no face" if frame.fake_probability is None else wording.percent(frame.fake_probability))
        + "</td></tr>"
        for frame in frames
    )
    return (
        "<details><summary>The same as a table</summary><table><thead><tr><th>Time</th>"
        f"<th>Frame</th><th>Probability</th></tr></thead><tbody>{rows}</tbody></table></details>"
    )


def worst(look: Look) -> str:
    """The frames of a video with the highest fake probability."""
    record = look.record
    known = {frame.index: frame for frame in record.frames}
    size = (record.width or 1, record.height or 1)
    figures = []
    for number, content in look.shown.items():
        frame = known[number]
        words = f"{frame.time:.1f} s: {wording.percent(frame.fake_probability or 0.0)}"
        kind = _kind(frame, record.settings)
        place = _place(frame.crop, size) if frame.crop else ""
        figures.append(
            f'<figure><div class="m2-canvas" style="aspect-ratio:{size[0]}/{size[1]}">'
            f'<img class="m2-photo" src="{_data("jpeg", content)}" alt="Frame at {words}">'
            f'<i class="m2-box m2-{kind}" style="{place}"></i></div>'
            f"<figcaption>{escape(words)}</figcaption></figure>"
        )
    return f'<div class="m2-worst">{"".join(figures)}</div>' if figures else ""


def answers(said: Sequence[Said], record: Explanation | None = None) -> str:
    """The language model's answers so far, and at the end whether it agrees.

    Args:
        said: The answers, the judgement's among them.
        record: Once everything is said.
    """
    own, parts = "", []
    if record is not None and record.explanations:
        words = escape(wording.judgement(record.explanations[0]))
        own = f'<p class="m2-judgement">{words}</p>'
    for answer in said:
        heading = "Is it genuine?" if answer.judges else (answer.region or answer.asked)
        open_ = ' class="m2-writing"' if record is None and answer is said[-1] else ""
        parts.append(
            f"<dt>{escape(heading)}</dt><dd{open_}>{escape(answer.text.strip()) or '…'}</dd>"
        )
    body = "".join(parts)
    busy = "true" if record is None else "false"
    return f'{own}<dl class="m2-answers" aria-live="polite" aria-busy="{busy}">{body}</dl>'


def table(records: Sequence[Detection]) -> str:
    """Several items, one a row."""
    if not records:
        return ""
    rows = []
    for record in records:
        score = record.fake_probability
        kind = record.verdict or "none"
        why = record.message or record.reason or record.note or ""
        cells = (
            record.path,
            wording.headline(record),
            "" if score is None else wording.percent(score),
            why,
        )
        rows.append(
            f'<tr class="m2-{kind}">' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"
        )
    return (
        '<div class="m2-table"><table><thead><tr><th>File</th><th>Verdict</th><th>Probability</th>'
        f"<th>Why</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def progress(done: int, total: int) -> str:
    """How far a batch is."""
    return f'<p role="status">{done} of {total} judged.</p>'


def downloads(records: Sequence[Detection]) -> str:
    """The records as files that never lie on the server: they are in the links."""
    lines = b"".join(to_line(record.to_dict()) for record in records)
    links = (
        ("verdicts.jsonl", "application/x-ndjson", lines, "Full records (JSONL)"),
        ("verdicts.csv", "text/csv", to_csv(records).encode("utf-8", "replace"), "Table (CSV)"),
    )
    return (
        '<p class="m2-links">'
        + "".join(
            f'<a class="m2-link" download="{name}" href="data:{kind};base64,'
            f'{base64.b64encode(content).decode()}">{words}</a>'
            for name, kind, content, words in links
        )
        + "</p>"
    )
