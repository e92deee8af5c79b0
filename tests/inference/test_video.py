from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from m2f2cli.inference.pipeline import detect
from m2f2cli.options.detect import DetectOptions
from m2f2cli.records import Detection
from tests.inference.conftest import FLAT_ONLY, MeanJudge

EXAMPLES = Path(__file__).parents[2] / "examples"
NONE = DetectOptions(faces="none", frames=8)


def write_video(path: Path, frames: list[np.ndarray]) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def flat(level: int) -> np.ndarray:
    return np.full((64, 96, 3), level, dtype=np.uint8)


def judged(path: Path, options: DetectOptions = NONE, judge: MeanJudge | None = None) -> Detection:
    (record,) = detect([str(path)], model=judge or MeanJudge(), options=options)
    return record


def test_a_video_is_judged_by_the_mean_of_evenly_spaced_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ramp.mp4", [flat(6 * i) for i in range(40)])
    record = judged(path)
    assert (record.kind, record.status) == ("video", "ok")
    assert (record.width, record.height) == (96, 64)
    assert record.faces == ()
    assert record.crop is None
    indices = [frame.index for frame in record.frames]
    assert len(indices) == 8
    assert len(set(np.diff(indices))) == 1
    for frame in record.frames:
        assert frame.time == pytest.approx(frame.index / 10, abs=1e-3)
        assert frame.fake_probability == pytest.approx(6 * frame.index / 255, abs=0.02)
        assert frame.crop == (16, 0, 80, 64)
    scores = [frame.fake_probability or 0 for frame in record.frames]
    assert record.fake_probability == pytest.approx(np.mean(scores), abs=1e-6)
    assert record.settings.frames_asked == 8


def test_frames_without_a_face_do_not_count(tmp_path: Path) -> None:
    face = np.asarray(Image.open(EXAMPLES / "astronaut.jpg").convert("RGB"))
    face = face[: face.shape[0] // 2 * 2, : face.shape[1] // 2 * 2]
    blank = np.full_like(face, 250)
    path = write_video(tmp_path / "mixed.mp4", [face] * 3 + [blank] * 3)
    record = judged(path, DetectOptions(frames=6))
    assert [frame.faces_found for frame in record.frames] == [1, 1, 1, 0, 0, 0]
    assert [frame.fake_probability is None for frame in record.frames] == [False] * 3 + [True] * 3
    seen = [f.fake_probability for f in record.frames if f.fake_probability is not None]
    assert record.fake_probability == pytest.approx(np.mean(seen), abs=1e-6)
    assert record.faces_found == 1


def test_a_video_without_a_face_has_no_verdict(tmp_path: Path) -> None:
    record = judged(write_video(tmp_path / "x.mp4", [flat(90)] * 5), DetectOptions(faces="all"))
    assert record.status == "no_face"
    assert record.verdict is None
    assert len(record.frames) == 5
    assert "5 frames" in str(record.message)


def test_a_video_without_frames_is_a_record(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), "s16", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
    record = judged(tmp_path / "sound.mkv")
    assert (record.status, record.verdict, record.frames) == ("no_frames", None, ())
    assert record.message


def test_a_video_is_outside_the_domain_when_most_frames_are(tmp_path: Path) -> None:
    judge = MeanJudge(domain=FLAT_ONLY)
    rough = np.random.default_rng(0).integers(0, 120, (64, 96, 3), dtype=np.uint8)
    path = write_video(tmp_path / "x.mp4", [flat(30)] * 3 + [rough] * 5)
    record = judged(path, judge=judge)
    assert [frame.in_domain for frame in record.frames] == [True] * 3 + [False] * 5
    assert (record.verdict, record.in_domain) == ("uncertain", False)
    assert "5 of 8 frames" in str(record.reason)
    record = judged(write_video(tmp_path / "y.mp4", [flat(30)] * 5 + [rough] * 3), judge=judge)
    assert (record.verdict, record.in_domain) == ("real", True)


def test_a_fake_video_names_the_kind_of_most_of_its_frames(tmp_path: Path) -> None:
    judge = MeanJudge(kinds=["swapped or edited", "generated"], kind_margin=1.0)
    red, green, dark = (
        np.full((64, 96, 3), color, np.uint8)
        for color in ((255, 90, 255), (90, 255, 255), (60, 0, 0))
    )
    record = judged(write_video(tmp_path / "x.mp4", [red, green, *[red] * 5, dark]), judge=judge)
    assert (record.verdict, record.forgery) == ("fake", "swapped or edited")
    kinds = ["swapped or edited", "generated", *["swapped or edited"] * 5, None]
    assert [frame.forgery for frame in record.frames] == kinds
    record = judged(write_video(tmp_path / "y.mp4", [red, green] * 4), judge=judge)
    assert (record.verdict, record.forgery) == ("fake", None)


def test_a_video_and_pictures_share_batches(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", [flat(20 * i) for i in range(5)])
    Image.fromarray(flat(77)).save(tmp_path / "p.png")
    judge = MeanJudge()
    records = list(detect([str(tmp_path)], model=judge, options=replace(NONE, batch_size=6)))
    assert [record.kind for record in records] == ["image", "video"]
    assert judge.batches == [4, 2]  # slices of one batch: the first holds the picture too
    assert records[1] == replace(judged(video), settings=records[1].settings)


def test_a_video_is_shown_by_its_most_suspicious_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", [flat(level) for level in (10, 250, 30, 60)])
    options = replace(NONE, annotate=tmp_path / "out", heatmap=tmp_path / "out")
    record = judged(path, options)
    drawn = f"v.mp4.{str(record.sha256)[:12]}.annotated.jpg"
    assert record.annotated == str(tmp_path / "out" / drawn)
    assert np.asarray(Image.open(str(record.annotated)))[60, 5].mean() > 240
    assert Path(str(record.heatmap)).exists()
