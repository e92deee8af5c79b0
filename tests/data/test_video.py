from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from m2f2cli.data import video
from m2f2cli.data.video import read_frames
from m2f2cli.errors import ConfigError, InputError

WIDTH, HEIGHT, STEP = 96, 64, 2
ONE = 0x10000
# The a, b, c, d of the eight display matrices, and what they do to the pixels. The turn that a
# phone held upright writes is (0, 1, -1, 0): show the frame turned clockwise by a quarter.
MATRICES = {
    "as it is": ((ONE, 0, 0, ONE), lambda p: p),
    "clockwise": ((0, ONE, -ONE, 0), lambda p: np.rot90(p, -1)),
    "half": ((-ONE, 0, 0, -ONE), lambda p: np.rot90(p, 2)),
    "counter-clockwise": ((0, -ONE, ONE, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-ONE, 0, 0, ONE), lambda p: p[:, ::-1]),
    "upside down": ((ONE, 0, 0, -ONE), lambda p: p[::-1]),
    "transposed": ((0, ONE, ONE, 0), lambda p: p.transpose(1, 0, 2)),
    "transversed": ((0, -ONE, -ONE, 0), lambda p: np.rot90(p.transpose(1, 0, 2), 2)),
}


def _make(
    path: Path,
    frames: int = 100,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    faststart: bool = False,
) -> Path:
    """A gray video whose frame n has the level STEP * n, brighter towards the lower right."""
    movie = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=movie) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = options or {}
        base = Fraction(1, 1000) if times else Fraction(1, 25)
        stream.codec_context.time_base = base
        for number in range(frames):
            pixels = np.full((HEIGHT, WIDTH, 3), STEP * number % 200, np.uint8)
            pixels[HEIGHT // 2 :, WIDTH // 2 :] += 50
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _read(path: Path, count: int = 7) -> tuple[list[video.Frame], str | None]:
    with read_frames(path, count=count) as opened:
        return list(opened.frames), opened.note


def _level(frame: video.Frame) -> float:
    return float(frame.pixels[: HEIGHT // 4, : WIDTH // 4].mean())


def _status(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        _read(path)
    assert "\n" not in caught.value.message
    return caught.value.status


@pytest.fixture(scope="module")
def movie(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    return _make(folder / "movie.mp4", options={"g": "12"}, faststart=True)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "libx264"), ("b.avi", "mpeg4"),
        ("a.webm", "libvpx"), ("a.ts", "libx264"), ("a.h264", "libx264"), ("a.mpg", "mpeg2video"),
    ],
)  # fmt: skip
def test_the_frames_asked_for_come_from_any_container(tmp_path, name, codec):
    path = _make(tmp_path / name, codec=codec)
    with read_frames(path, count=7) as opened:
        frames = list(opened.frames)
        assert opened.total == 100
        assert opened.fps == pytest.approx(25)
        assert opened.duration == pytest.approx(4.0, abs=0.01)
        assert opened.note is None
        assert opened.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [frame.index for frame in frames] == [7, 21, 35, 50, 64, 78, 92]
    for frame in frames:
        assert frame.pixels.shape == (HEIGHT, WIDTH, 3)
        assert frame.pixels.dtype == np.uint8
        assert frame.time == pytest.approx(frame.index / 25, abs=0.002)
        assert _level(frame) == pytest.approx(STEP * frame.index, abs=4)


def test_seeking_gives_the_frames_of_plain_decoding(movie, monkeypatch):
    every, _ = _read(movie, 1000)
    assert [frame.index for frame in every] == list(range(100))
    seeks = []
    seek = video.VideoFrames.seek
    monkeypatch.setattr(
        video.VideoFrames, "seek", lambda self, time: seeks.append(time) or seek(self, time)
    )
    some, _ = _read(movie, 2)
    assert len(seeks) >= 2
    for frame in some:
        assert np.array_equal(frame.pixels, every[frame.index].pixels)


@pytest.mark.parametrize("matrix", MATRICES)
def test_the_stored_turn_is_applied(movie, tmp_path, matrix):
    (a, b, c, d), turned = MATRICES[matrix]
    data = bytearray(movie.read_bytes())
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    plain, found = _read(movie, 2)[0], _read(path, 2)[0]
    for before, after in zip(plain, found, strict=True):
        assert np.array_equal(after.pixels, turned(before.pixels))
        assert after.pixels.flags.c_contiguous


def test_uneven_times_are_kept(tmp_path):
    path = _make(tmp_path / "uneven.mkv", 50, times=[number**2 for number in range(50)])
    frames, _ = _read(path, 5)
    assert [frame.index for frame in frames] == [5, 15, 25, 35, 45]
    assert [frame.time for frame in frames] == pytest.approx(
        [n**2 / 1000 for n in (5, 15, 25, 35, 45)]
    )
    assert _level(frames[3]) == pytest.approx(STEP * 35, abs=4)


def test_a_short_video_gives_all_of_its_frames(tmp_path):
    frames, note = _read(_make(tmp_path / "short.mp4", 3), 16)
    assert [frame.index for frame in frames] == [0, 1, 2]
    assert note is None
    assert len(_read(_make(tmp_path / "single.mp4", 1), 16)[0]) == 1


@pytest.mark.parametrize(("total", "count"), [(100, 7), (7, 7), (8, 7), (1, 1), (10_000, 999)])
def test_sampling_is_even(total, count):
    wanted = np.array(video.evenly(total, count))
    assert len(set(wanted)) == count
    assert wanted.min() >= 0
    assert wanted.max() < total
    assert np.abs(wanted + 0.5 - (np.arange(count) + 0.5) * total / count).max() <= 0.5
    assert video.evenly(3, 16) == [0, 1, 2]


def test_given_frames_are_read(movie):
    with read_frames(movie, numbers=[90, 3, 4, 3, 400]) as frames:
        found = list(frames.frames)
    assert [frame.index for frame in found] == [3, 4, 90]
    assert _level(found[2]) == pytest.approx(STEP * 90 % 200, abs=4)


@pytest.mark.parametrize("name", ["movie.mp4", "cut.mkv"])
def test_a_cut_file_gives_the_frames_it_still_has(movie, tmp_path, name):
    whole = movie if name == "movie.mp4" else _make(tmp_path / "whole.mkv")
    data = whole.read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: len(data) * 7 // 10])
    frames, note = _read(path, 5)
    assert 3 <= len(frames) <= 5
    assert note is not None
    for frame in frames:
        assert _level(frame) == pytest.approx(STEP * frame.index, abs=6)


def test_what_is_no_video(movie, tmp_path):
    assert _status(tmp_path / "nothing.mp4") == "missing"
    assert _status(tmp_path) == "unreadable"
    text = tmp_path / "text.mp4"
    text.write_text("This is not a video. " * 50)
    assert _status(text) == "unreadable"
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert _status(empty) == "empty"
    headless = tmp_path / "headless.mp4"
    headless.write_bytes(movie.read_bytes()[:700])
    assert _status(headless) in {"unreadable", "no_frames"}


def test_a_playlist_does_not_open_other_files(movie, tmp_path):
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{movie}\n#EXT-X-ENDLIST\n")
    assert _status(playlist) == "unreadable"
    script = tmp_path / "script.mp4"
    script.write_text(f"ffconcat version 1.0\nfile '{movie}'\n")
    assert _status(script) == "unreadable"


def test_a_video_without_frames(tmp_path):
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 44100, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert _status(sound) == "no_frames"


def test_frames_that_cannot_be_decoded(movie, tmp_path):
    data = bytearray(movie.read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    path = tmp_path / "zeros.mp4"
    path.write_bytes(data)
    assert _status(path) == "no_frames"


def test_limits(movie):
    with pytest.raises(InputError, match="96x64") as caught:
        read_frames(movie, max_pixels=1000)
    assert caught.value.status == "too_large"
    with pytest.raises(ConfigError, match="at least 1"):
        read_frames(movie, count=0)


def test_the_file_is_closed_when_reading_stops_early(movie):
    with read_frames(movie, count=5) as opened:
        next(opened.frames)
    assert list(opened.frames) == []


def test_av_is_imported_only_when_a_video_is_read():
    code = (
        "import sys, m2f2cli.data.video as v; assert 'av' not in sys.modules and v.VIDEO_SUFFIXES"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _remux(source: Path, path: Path, *, cut: int = 0, later: int = 0, sound: bool = False) -> Path:
    """Copy packets from ``cut`` on, an edit list hiding those before, or ``later`` frames on."""
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        (stream,) = given.streams.video
        copy = made.add_stream_from_template(stream)
        tone = made.add_stream("aac", rate=8000) if sound else None
        frame = int(1 / 25 / stream.time_base)
        packets = [packet for packet in given.demux(stream) if packet.size]
        begin = max(p.dts for p in packets if p.is_keyframe and p.pts <= cut * frame)
        for number in range(80 if tone else 0):
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            silence.sample_rate, silence.pts = 8000, number * 1024
            made.mux(tone.encode(silence))
        for packet in packets:
            if packet.dts < begin:
                continue
            packet.pts += (later - cut) * frame
            packet.dts += (later - cut) * frame
            packet.stream = copy
            made.mux(packet)
    return path


def test_a_video_that_was_cut_without_new_coding_is_whole(movie, tmp_path):
    path = _remux(movie, tmp_path / "cut.mp4", cut=30)
    with read_frames(path, count=5) as opened:
        frames = list(opened.frames)
        assert opened.note is None
        assert opened.total in (70, 71)
    assert len(frames) == 5
    for frame in frames:
        assert _level(frame) == pytest.approx(STEP * (frame.index + 30) % 200, abs=6)


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv"])
def test_a_video_that_starts_later_than_its_sound_is_whole(movie, tmp_path, name):
    path = _remux(movie, tmp_path / name, later=150, sound=True)
    with read_frames(path, count=5) as opened:
        assert len(list(opened.frames)) == 5
        assert opened.note is None


def test_a_video_that_shows_frames_on_is_whole(tmp_path):
    """An AVI writes an empty packet for each frame that is shown once more."""
    times = [0, 40, 80, 240, 280, 320, 480, 520, 560, 600]
    path = tmp_path / "null.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number, time in enumerate(times):
            pixels = np.full((HEIGHT, WIDTH, 3), 20 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time // 40, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > len(times)
    with read_frames(path, count=16) as opened:
        frames = list(opened.frames)
        assert opened.note is None
    assert [_level(frame) for frame in frames] == pytest.approx(
        [20 * number for number in range(10)], abs=6
    )
