"""Uploads in, records out: under their owner's name, one at a time, and nothing is kept."""

from __future__ import annotations

import asyncio
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from m2f2cli.errors import InputError, UsageError
from m2f2cli.inference.explain import load_pipeline
from m2f2cli.inference.pipeline import detect
from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.explain import ExplainOptions
from m2f2cli.records import Explanation
from m2f2cli.serving import worker as module
from m2f2cli.serving.gate import Uploads
from m2f2cli.serving.worker import MAX_QUESTION, Service, worst_frames
from tests.inference.conftest import MeanJudge, write_picture
from tests.inference.explainers import asking, tiny
from tests.inference.test_video import flat, write_video

WHOLE = ExplainOptions(detect=DetectOptions(faces="none", frames=4))


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    (tmp_path / "private").mkdir()
    return Uploads(tmp_path / "private")


@pytest.fixture
def service(uploads: Uploads) -> Service:
    return Service(load_pipeline(MeanJudge(), options=WHOLE), uploads)


def sent(uploads: Uploads, file: Path, name: str | None = None) -> dict[str, Any]:
    with open(file, "rb") as content:
        path = uploads.store(file.name, content)
    return {"path": path, "orig_name": name or file.name}


def is_empty(uploads: Uploads) -> bool:
    return not any((uploads.folder / "sent").iterdir())


def test_a_picture_gives_the_record_of_detect_under_its_own_name(service, uploads, tmp_path):
    file = write_picture(tmp_path / "bright.png", 200)
    look = asyncio.run(service.look(sent(uploads, file)))
    theirs = next(detect([str(file)], model=MeanJudge(), options=WHOLE.detect)).to_dict()
    assert look.record.to_dict() == {**theirs, "path": "bright.png"}
    assert Image.open(io.BytesIO(look.shown[0])).size == (64, 64)
    assert is_empty(uploads)


@pytest.mark.parametrize("content", [b"PK\3\4 a zip", b"", b"\x89PNG\r\n\x1a\n cut"])
def test_a_bad_file_gives_the_command_lines_sentence(service, uploads, tmp_path, content):
    file = tmp_path / "photo.png"
    file.write_bytes(content)
    record = asyncio.run(service.detect(sent(uploads, file)))
    theirs = next(detect([str(file)], model=MeanJudge(), options=WHOLE.detect))
    assert record["status"] == theirs.status != "ok"
    assert record["message"] == theirs.message.replace(str(file), "photo.png")
    assert str(uploads.folder) not in str(record)
    assert is_empty(uploads)


def test_a_video_is_shown_by_its_worst_frames(service, uploads, tmp_path):
    file = write_video(tmp_path / "ramp.mp4", [flat(6 * i) for i in range(40)])
    look = asyncio.run(service.look(sent(uploads, file, "holiday.mp4")))
    assert look.record.kind == "video"
    assert look.record.path == "holiday.mp4"
    assert list(look.shown) == worst_frames(look.record)
    scores = {frame.index: frame.fake_probability for frame in look.record.frames}
    assert [scores[n] for n in look.shown] == sorted(scores.values(), reverse=True)[:3]
    assert is_empty(uploads)


def test_a_long_video_is_refused_by_its_own_name(service, uploads, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_SECONDS", 1.0)
    file = write_video(tmp_path / "long.mp4", [flat(9)] * 40)
    with pytest.raises(InputError, match=r"^'long.mp4' lasts"):
        asyncio.run(service.look(sent(uploads, file), kind="video"))
    assert is_empty(uploads)


def test_a_large_picture_is_shown_small(service, uploads, tmp_path):
    file = write_picture(tmp_path / "large.png", 90, size=3000)
    look = asyncio.run(service.look(sent(uploads, file)))
    assert look.record.width == 3000
    assert max(Image.open(io.BytesIO(look.shown[0])).size) == module.SHOWN_SIDE


@pytest.mark.parametrize(
    "given", [None, {}, {"path": "/etc/passwd"}, {"path": "http://127.0.0.1:1/a.png"}]
)
def test_only_uploads_are_looked_at(service, given):
    with pytest.raises(InputError, match="no such upload"):
        asyncio.run(service.look(given))


def test_many_at_once_get_their_own_answers(service, uploads, tmp_path):
    files = [write_picture(tmp_path / f"{level}.png", level) for level in range(10, 250, 10)]

    async def ask() -> list[dict[str, Any]]:
        return await asyncio.gather(*(service.detect(sent(uploads, file)) for file in files))

    for file, record in zip(files, asyncio.run(ask()), strict=True):
        assert record["path"] == file.name
        assert record["fake_probability"] == pytest.approx(int(file.stem) / 255, abs=1e-4)
    assert is_empty(uploads)


@pytest.fixture
def explaining(uploads: Uploads) -> Service:
    return Service(load_pipeline(tiny(), options=asking()), uploads)


def test_reasons_grow_until_the_record(explaining, uploads, tmp_path):
    file = write_picture(tmp_path / "a.png", (90, 120, 30))

    async def read() -> list[Any]:
        look = await explaining.look(sent(uploads, file))
        return [item async for item in explaining.reasons(look)]

    *growing, record = asyncio.run(read())
    assert isinstance(record, Explanation)
    assert record.path == "a.png"
    *heard, whole = growing
    for before, after in pairwise(heard):
        assert len(after) - len(before) in (0, 1)
        assert after[len(before) - 1].text.startswith(before[-1].text)
    assert len(heard[-1]) == len(whole)
    judgement, *regions = whole
    assert judgement.judges
    assert judgement.text == record.explanations[0].judgement_text
    said = [(answer.region, answer.text) for answer in regions]
    assert said == [(r.region, r.text) for r in record.explanations[0].reasons]


def test_a_question_of_ones_own_is_asked_alone(explaining, uploads, tmp_path):
    file = write_picture(tmp_path / "a.png", (90, 120, 30))

    async def read() -> list[Any]:
        look = await explaining.look(sent(uploads, file))
        return [item async for item in explaining.reasons(look, question=" Why the hair? ")]

    record = asyncio.run(read())[-1]
    assert record.settings.questions == ("Why the hair?",)
    assert [reason.region for reason in record.explanations[0].reasons] == [None]


def test_a_question_is_not_a_book(explaining, uploads, tmp_path):
    given = sent(uploads, write_picture(tmp_path / "a.png", 9))
    with pytest.raises(UsageError, match=str(MAX_QUESTION)):
        asyncio.run(explaining.explain(given, question="x" * (MAX_QUESTION + 1)))


def test_explain_gives_the_record_of_explain(explaining, uploads, tmp_path):
    file = write_picture(tmp_path / "a.png", (90, 120, 30))
    record = asyncio.run(explaining.explain(sent(uploads, file), regions=["eyes"]))
    assert [reason["region"] for reason in record["explanations"][0]["reasons"]] == ["eyes"]
    assert record["questions"] == ["Describe the authenticity of the image based on eyes."]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no")
    assert asyncio.run(explaining.explain(sent(uploads, bad)))["status"] == "not_an_image"
