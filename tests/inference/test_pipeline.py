"""What ``detect`` and ``explain`` share: items are read once, and records leave when they can."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from m2f2cli.data import faces, images, video
from m2f2cli.data.images import DECODE_ERRORS, Picture, read_picture
from m2f2cli.data.video import read_frames
from m2f2cli.inference import pipeline as module
from m2f2cli.inference.explain import ExplainPipeline, explain_sources, load_pipeline
from m2f2cli.inference.pipeline import detect, judge_sources
from m2f2cli.inference.sources import Source, expand
from m2f2cli.options.detect import DetectOptions
from m2f2cli.records import Detection
from tests.inference.conftest import MeanJudge, noise_picture, write_picture
from tests.inference.explainers import asking, tiny
from tests.inference.test_video import flat, write_video

FACELESS = Picture(np.full((60, 90, 3), 90, np.uint8), "0" * 64, "PNG")
CROP = Picture(np.full((64, 64, 3), 200, np.uint8), "1" * 64, "PNG")
BATCH = 4

Run = Callable[[Sequence[Source]], Iterator[Detection]]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny()


@pytest.fixture(params=["detect", "explain"])
def run(request: pytest.FixtureRequest, loaded: Any) -> Run:
    """Records of sources, as either command gives them, with small batches."""
    if request.param == "detect":
        options = DetectOptions(batch_size=BATCH)
        return lambda sources: judge_sources(sources, model=MeanJudge(), options=options)
    asked = asking(faces="auto", batch_size=BATCH, regions=("nose",))
    return lambda sources: explain_sources(sources, model=loaded, options=asked)


def source(name: str, read: Callable[[], Picture]) -> Source:
    return Source(name, "image", PurePosixPath(name), read)


@pytest.mark.slow
def test_one_face_among_pictures_without_any_is_not_kept_waiting(run: Run) -> None:
    """Its batch never fills; neither it nor the pictures behind it pile up."""
    read: list[str] = []

    def reader(name: str, picture: Picture) -> Callable[[], Picture]:
        return lambda: (read.append(name), picture)[1]

    first = source("face", reader("face", CROP))
    others = [source(str(n), reader(str(n), FACELESS)) for n in range(200)]
    seen = 0
    for seen, record in enumerate(run([first, *others]), start=1):
        assert record.status == ("ok" if seen == 1 else "no_face")
        assert len(read) - seen < 60
    assert seen == 201


@pytest.mark.slow
def test_a_record_does_not_wait_for_a_slow_item_behind_it(run: Run) -> None:
    left = threading.Event()
    waited = []

    def slow() -> Picture:
        waited.append(left.wait(60))
        return FACELESS

    records = run([source("face", lambda: CROP), source("slow", slow)])
    assert next(records).status == "ok"
    left.set()
    assert [record.status for record in records] == ["no_face"]
    assert waited == [True]


def test_a_picture_is_read_once_for_its_verdict_and_its_drawings(tmp_path: Path) -> None:
    file = noise_picture(tmp_path / "x.png", 0)
    reads = []
    item = source("x.png", lambda: (reads.append(1), read_picture(file))[1])
    options = DetectOptions(faces="none", heatmap=tmp_path / "out", annotate=tmp_path / "out")
    (record,) = judge_sources([item], model=MeanJudge(), options=options)
    assert Path(str(record.heatmap)).exists()
    assert Path(str(record.annotated)).exists()
    assert len(reads) == 1


def test_a_video_is_read_once_for_its_verdict_and_its_drawing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [
        str(write_video(tmp_path / f"{n}.mp4", [flat(20 * i + n) for i in range(9)]))
        for n in range(5)
    ]
    opened: Counter[str] = Counter()

    def counted(path: Path, **how: Any) -> Any:
        opened[str(path)] += 1
        return read_frames(path, **how)

    monkeypatch.setattr(module, "read_frames", counted)
    options = DetectOptions(faces="none", frames=4, heatmap=tmp_path / "out")
    records = list(judge_sources(expand(clips), model=MeanJudge(), options=options))
    assert all(Path(str(record.heatmap)).exists() for record in records)
    assert opened == Counter(clips)


def test_pixels_are_kept_for_the_page_alone_until_they_are_drawn(tmp_path: Path) -> None:
    photo = str(write_picture(tmp_path / "a.png", 200, 90))
    pipeline = load_pipeline(MeanJudge(), options=asking())
    judged = pipeline.judge_one(expand([photo])[0])
    (view,) = judged.prepared.views
    assert np.array_equal(view.pixels, read_picture(photo).pixels)
    assert [view.pixels for view in judged.reduced().prepared.views] == [None]
    assert judged.reduced().record == judged.record


def test_a_prompt_is_tokenized_once(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()
    tokens = type(loaded[1]).tokens

    def counted(self: Any, prompt: str, pictures: int) -> list[int]:
        asked[prompt] += 1
        return tokens(self, prompt, pictures)

    monkeypatch.setattr(type(loaded[1]), "tokens", counted)
    files = [str(noise_picture(tmp_path / f"{n}.png", n)) for n in range(3)]
    pipeline = load_pipeline(loaded, options=asking())
    for item in map(pipeline.judge_one, expand(files)):
        pipeline.explain(item, regions=("nose", "eyes"))
        pipeline.explain(item, regions=("nose",), questions=("Why?",))
    assert set(asked.values()) == {1}


def test_what_the_language_model_is_shown_is_kept_of_few_crops(loaded: Any, tmp_path: Path) -> None:
    """A video's frames, or faces of a crowd, that were judged long ago are looked at again."""
    clip = write_video(tmp_path / "ramp.mp4", [flat(240 - 6 * i) for i in range(40)])
    options = asking(batch_size=2, regions=("nose",))
    options = replace(options, detect=replace(options.detect, frames=30))
    pipeline = ExplainPipeline(loaded, options)
    views = pipeline.judge_one(expand([str(clip)])[0]).prepared.views
    assert len(views) == 30
    looked: list[int] = []
    look = loaded[0].encode_pictures

    def counted(pixels: Any, *more: Any) -> Any:
        looked.append(len(pixels))
        return look(pixels, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded[0], "encode_pictures", counted)
        features = pipeline.features([view.crops[0] for view in views])
    assert len(features) == 30
    assert 20 < sum(looked) < 30
    for view, seen in list(zip(views, features, strict=True))[::10]:
        (alone,) = pipeline.features([view.crops[0]])
        assert torch.allclose(seen.patches, alone.patches, atol=1e-5)


STEPS = {
    "picture": [
        (images, "read_bytes"), (images.Image, "open"), (images, "_rgb"), (module, "find_faces"),
        (faces, "resize_and_crop"), (faces.CropRule, "crops"), (module.Image, "fromarray"),
    ],
    "video": [
        (av, "open"), (video, "_list_packets"), (video, "_upright"), (video, "evenly"),
        (video, "file_sha256"), (module, "find_faces"), (faces.CropRule, "crops"),
    ],
}  # fmt: skip
FAILURES = [
    RuntimeError("a word\nand another"), OSError(5, "Input/output error"),
    *(kind("no") for kind in DECODE_ERRORS),
    UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no"), RecursionError(), KeyError("x"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "where", "name"),
    [(kind, *step) for kind, steps in STEPS.items() for step in steps],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_whatever_is_raised_for_one_item_is_its_record(
    kind: str, where: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for n in range(3):
        path = tmp_path / f"{n}.{'png' if kind == 'picture' else 'mp4'}"
        level = np.full((64, 96, 3), 60 + 40 * n, np.uint8)
        if kind == "video":
            write_video(path, [level] * 4)
        else:
            write_picture(path, 60 + 40 * n, 2100 if where is module.Image else 64)
        files.append(str(path))
    real = getattr(where, name)
    failures = FAILURES if name == "crops" else FAILURES[:1]
    if name in ("open", "_list_packets", "_upright") and kind == "video":
        failures = [av.error.UndefinedError(2, "worse"), av.error.InvalidDataError(1, "bad")]
    busy = threading.local()
    prepare = module.prepare

    def told(source: Source, *rest: Any, **how: Any) -> Any:
        busy.path = source.path
        return prepare(source, *rest, **how)

    for failure in failures:

        def injected(*given: Any, _failure: Exception = failure, **how: Any) -> Any:
            if getattr(busy, "path", "") == files[1]:
                raise _failure
            return real(*given, **how)

        with monkeypatch.context() as patch:
            patch.setattr(module, "prepare", told)
            patch.setattr(where, name, injected)
            finds = "all" if name == "find_faces" else "none"
            options = DetectOptions(frames=2, faces=finds, annotate=tmp_path / "out")
            records = list(judge_sources(expand(files), model=MeanJudge(), options=options))
        good, bad, last = records
        assert bad.status in ("unreadable", "truncated", "too_large"), (failure, bad)
        assert bad.message
        assert "\n" not in bad.message
        assert (good.status == "ok") == (last.status == "ok")
        assert good.status in ("ok", "no_face")


def test_an_array_or_a_picture_is_judged_as_its_file_is(tmp_path: Path) -> None:
    file = noise_picture(tmp_path / "x.png", 1)
    pixels = read_picture(file).pixels
    options = DetectOptions(faces="none")
    scores = {
        next(iter(detect(item, model=MeanJudge(), options=options))).fake_probability
        for item in (file, str(file), pixels, Image.fromarray(pixels), [pixels])
    }
    assert len(scores) == 1
    (record,) = detect(pixels[..., :2], model=MeanJudge(), options=options)
    assert (record.path, record.status) == ("picture 1", "not_an_image")
