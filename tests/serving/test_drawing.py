"""What people read and see: plain words, boxes in place, and nothing from outside as HTML."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from m2f2cli.inference.pipeline import Score
from m2f2cli.inference.render import heat, heat_layer
from m2f2cli.records import Answer, Explanation, FaceExplanation, FaceScore, FrameScore
from m2f2cli.serving import drawing
from m2f2cli.serving.worker import Look, Said
from tests.detections import EXAMPLE

EVIL = '<script>alert("x")</script>\'&'
FACE = FaceScore((20, 20, 60, 60), (10, 10, 70, 70), 0.93, "fake")
OTHER = FaceScore((110, 20, 140, 50), (100, 10, 150, 60), 0.2, "real")


def record(**changes):
    settings = replace(EXAMPLE.settings, threshold=0.5, uncertain=(0.4, 0.6))
    base = replace(
        EXAMPLE, path="photo.jpg", kind="image", status="ok", message=None, note=None, width=200,
        height=100, verdict="fake", fake_probability=0.93, reason=None, in_domain=None,
        faces=(FACE, OTHER), frames=(), crop_source="face", settings=settings,
    )  # fmt: skip
    return replace(base, **changes)


def look(found, shown=None):
    picture = io.BytesIO()
    Image.new("RGB", (20, 10)).save(picture, "JPEG")
    scores = {b"a": Score(0.9, None, np.arange(16, dtype=np.float32).reshape(4, 4))}
    judged = SimpleNamespace(
        record=found, scores=scores, crop=lambda box, frame=None: SimpleNamespace(digest=b"a")
    )
    return Look(judged, {0: picture.getvalue()} if shown is None else shown)


class Page(HTMLParser):
    """Tags with their attributes, and that every one is closed."""

    EMPTY = ("img", "input", "line", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def all(self, tag, kind=""):
        return [a for t, a in self.tags if t == tag and kind in (a.get("class") or "").split(" ")
                ] if kind else [a for t, a in self.tags if t == tag]  # fmt: skip


def test_every_face_is_a_button_in_its_place():
    page = Page(drawing.stage(look(record()), 1))
    first, second = page.all("button")
    assert first["style"] == "left:5.000%;top:10.000%;width:30.000%;height:60.000%"
    assert first["aria-label"] == "Face 1 of 2: Looks forged, 93 %"
    assert (first["aria-pressed"], second["aria-pressed"]) == ("false", "true")
    assert [b["data-face"] for b in page.all("button")] == ["0", "1"]
    assert len(page.all("img", "m2-map")) == 2
    assert page.all("input")[0]["aria-label"]


def test_the_map_is_the_one_that_heatmaps_show():
    values = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    layer = heat_layer(values, (64, 64))
    assert layer.mode == "RGBA"
    base = Image.new("RGB", (64, 64), (90, 90, 90))
    crop = SimpleNamespace(digest=b"a", crop=(0, 0, 64, 64))
    drawn = heat(base, [crop], {b"a": Score(0.5, None, values)}, 1.0)
    base.paste(layer, (0, 0), layer)
    assert np.array_equal(np.asarray(drawn), np.asarray(base))
    brightest = np.unravel_index(np.asarray(layer)[..., 3].argmax(), (64, 64))
    assert tuple(n // 16 for n in brightest) == np.unravel_index(values.argmax(), (4, 4))


def test_without_a_map_there_is_no_slider():
    found = look(record())
    found.judged.scores[b"a"] = Score(0.9)
    page = Page(drawing.stage(found))
    assert not page.all("input")
    assert len(page.all("button")) == 2


def test_the_verdict_is_of_the_chosen_face():
    first, second = (drawing.verdict(look(record()), n) for n in (0, 1))
    assert "Looks forged" in first
    assert "93 %" in first
    assert "No forgery found" in second
    assert "20 %" in second
    for text in (first, second):
        assert drawing.OPINION in text
        assert "From 50 % on it says “forged”; between 40 % and 60 %" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_domain": False, "verdict": "uncertain"}, "unlike the pictures the model has learned"),
        ({"verdict": "uncertain", "fake_probability": 0.5}, "It lies in that band."),
    ],
)
def test_uncertain_says_why(changes, words):
    face = replace(FACE, **changes)
    text = drawing.verdict(look(record(faces=(face,), **changes)))
    assert "Cannot tell" in text
    assert words in text


def test_a_named_kind_of_forgery_is_told_of_its_face_and_in_the_table():
    named = replace(FACE, forgery=f"generated{EVIL}")
    found = record(faces=(named, OTHER), forgery=named.forgery)
    first, second = (drawing.verdict(look(found), n) for n in (0, 1))
    assert "looks most like: generated&lt;script" in first
    assert "looks most like" not in second
    assert "looks most like" not in drawing.verdict(look(record()))
    assert "generated&lt;script" in drawing.table([found])


def test_no_verdict_is_the_records_sentence():
    found = record(
        status="no_face", message="No face was found in the picture.", verdict=None,
        fake_probability=None, faces=(),
    )  # fmt: skip
    text = drawing.verdict(look(found))
    assert "No verdict" in text
    assert "No face was found in the picture." in text
    assert drawing.OPINION not in text


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "under 1 %"), (1.0, "over 99 %"), (0.5, "50 %"), (0.996, "over 99 %")],
)
def test_nobody_is_promised_certainty(value, words):
    assert drawing.percent(value) == words


def test_nothing_from_outside_becomes_markup():
    evil = record(path=EVIL, message=EVIL, note=EVIL, reason=EVIL)
    failed = replace(evil, status="unreadable", verdict=None, fake_probability=None, faces=())
    texts = [
        drawing.verdict(look(evil)),
        drawing.stage(look(evil)),
        drawing.verdict(look(failed)),
        drawing.table([evil, failed]),
        drawing.answers([Said(EVIL, EVIL, EVIL)]),
        drawing.answers([Said(None, EVIL, EVIL)]),
    ]
    for text in texts:
        assert not Page(text).all("script")
        assert "alert(" not in re.sub(r"&lt;script&gt;alert\(", "", text)


FRAMES = (
    FrameScore(0, 0.0, 1, 0.2, (10, 10, 70, 70)),
    FrameScore(5, 1.0, 0),
    FrameScore(9, 2.0, 1, 0.55, (10, 10, 70, 70)),
    FrameScore(14, 4.0, 1, 0.9, (10, 10, 70, 70)),
)


def video(**changes):
    return record(
        kind="video", path="clip.mp4", faces=(), frames=FRAMES, crop_source=None, **changes
    )


def test_the_timeline_has_each_frame_in_its_place():
    page = Page(drawing.timeline(video()))
    dots = page.all("circle")
    assert [d["class"] for d in dots] == ["m2-dot m2-real", "m2-dot m2-uncertain", "m2-dot m2-fake"]
    xs, ys = ([float(d[name] or 0) for d in dots] for name in ("cx", "cy"))
    assert (xs[1] - xs[0]) / (xs[2] - xs[0]) == pytest.approx(0.5, abs=0.01)
    assert (ys[0] - ys[1]) / (ys[0] - ys[2]) == pytest.approx(0.5, abs=0.01)
    path = page.all("path")[0]["d"] or ""
    assert path.count("M") == 2  # a frame without a face interrupts the line
    assert "no face" in drawing.timeline(video())
    assert page.all("svg")[0]["aria-label"] == (
        "Probability of being forged in 3 frames over 4.0 seconds"
    )


def test_worst_frames_are_shown_with_their_faces():
    shown = dict.fromkeys((14, 9), look(record()).shown[0])
    page = Page(drawing.worst(look(video(), shown)))
    assert [img["alt"] for img in page.all("img")] == [
        "Frame at 4.0 s: 90 %", "Frame at 2.0 s: 55 %",
    ]  # fmt: skip
    assert len(page.all("i")) == 2


def test_a_video_says_how_many_frames_count():
    text = drawing.verdict(look(video(), {}))
    assert "3 of the 4 frames looked at show a face." in text


def explained(judgement, agreement):
    face = FaceExplanation(
        FACE.crop, None, 0.93, "fake", "fake", judgement, "It is fake.", agreement,
        (Answer("eyes", "Why?", "They look odd.", True),),
    )  # fmt: skip
    settings = replace(EXAMPLE.settings)
    return Explanation(**{**vars(record()), "settings": settings}, explanations=(face,))


@pytest.mark.parametrize(
    ("judgement", "agreement", "words"),
    [
        ("fake", True, "calls the face forged. It agrees with the detector."),
        ("real", False, "calls the face genuine. It disagrees with the detector"),
        (None, None, "neither forged nor genuine."),
        ("fake", None, "The detector has not decided"),
    ],
)
def test_the_language_models_own_judgement_stands_with_whether_it_agrees(
    judgement, agreement, words
):
    said = [Said(None, "Real or fake?", "It is fake.", judges=True), Said("eyes", "Why?", "Odd.")]
    text = drawing.answers(said, explained(judgement, agreement))
    assert words in text
    assert 'aria-busy="false"' in text


def test_answers_that_are_being_written_are_marked():
    page = Page(drawing.answers([Said("eyes", "q", "done"), Said("nose", "q", "")]))
    assert [tag.get("class") for tag in page.all("dd")] == [None, "m2-writing"]
    assert page.all("dl")[0]["aria-busy"] == "true"


def test_downloads_hold_the_records():
    records = [record(), video()]
    lines, table = (
        base64.b64decode((link["href"] or "").partition("base64,")[2])
        for link in Page(drawing.downloads(records)).all("a")
    )
    assert [json.loads(line) for line in lines.splitlines()] == [r.to_dict() for r in records]
    assert table.decode().startswith("path,kind,status,verdict")
    assert len(table.decode().splitlines()) == 3
