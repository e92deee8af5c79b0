"""Frames a second out of HDF5 files of face crops, and crops that follow a face through 720p.

Run with: pytest tests/bench/test_hdf5_speed.py -m bench -s
"""

from __future__ import annotations

import statistics
import time

import h5py
import numpy as np
import pytest

from m2f2cli.data.clips import FrameReader
from m2f2cli.data.prepare.faces import FacesJob
from m2f2cli.options.prepare import FacesOptions
from tests.data.prepare.videos import FPS, Scene

pytestmark = pytest.mark.bench
CLIPS, FRAMES, ROUNDS, READS = 40, 100, 7, 60


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """40 clips of 100 frames, 224 px, by ``prepare faces`` from generated videos."""
    root = tmp_path_factory.mktemp("hdf5")
    scene = Scene(160, 120, face=48, seconds=4)
    for number in range(CLIPS):
        path = root / "original_sequences" / "youtube" / "c40" / "videos" / f"{number:03d}.mp4"
        scene.record(path, FRAMES, shift=3 * number)
    begin = time.perf_counter()
    done = list(FacesJob([root], root / "out", FacesOptions()).run())
    spent = time.perf_counter() - begin
    assert [one.frames for one in done] == [FRAMES] * CLIPS
    path = root / "out" / "FF++_original_c40.h5"
    print(
        f"\nprepare faces: {CLIPS} videos of {FRAMES} frames (160x120) in {spent:.0f} s, "
        f"{path.stat().st_size / 1e6:.0f} MB"
    )
    return path


def as_published(file, key, index):
    """Open the file, read the whole clip, use one frame."""
    with h5py.File(file, "r") as opened:
        return opened[key][:][index]


def test_one_frame_is_read_faster_than_its_clip(file):
    reader = FrameReader()
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"published": [], "ours": []}
    for _ in range(ROUNDS):
        wanted = [(f"{rng.integers(CLIPS):03d}", int(rng.integers(FRAMES))) for _ in range(READS)]
        found = {}
        for name, read in (("published", as_published), ("ours", reader.frame)):
            begin = time.perf_counter()
            found[name] = [read(file, key, index) for key, index in wanted]
            rates[name].append(READS / (time.perf_counter() - begin))
        assert np.array_equal(found["published"], found["ours"])
    published, ours = (statistics.median(rates[name]) for name in ("published", "ours"))
    ratio = statistics.median(o / p for o, p in zip(rates["ours"], rates["published"], strict=True))
    print(
        f"\n{CLIPS} clips x {FRAMES} frames of 224 px: published way {published:.0f} frames/s, "
        f"ours {ours:.0f} frames/s, {ratio:.0f} times"
    )
    assert ratio >= 20


def test_crops_follow_a_face_through_30_seconds_of_720p(tmp_path):
    scene = Scene(1280, 720, face=160, seconds=30)
    scene.record(tmp_path / "clip.mp4", 30 * FPS)
    begin = time.perf_counter()
    (one,) = FacesJob([tmp_path / "clip.mp4"], tmp_path, FacesOptions(frames=750)).run()
    spent = time.perf_counter() - begin
    assert one.frames == 750
    notes = FrameReader().notes(tmp_path / "clip.h5", "clip.mp4")
    truth = np.array([scene.place(int(number)) for number in notes.frames])
    centres = (notes.boxes[:, :2] + notes.boxes[:, 2:]) / 2
    off = np.hypot(*(centres - truth[:, :2]).T) / truth[:, 2]
    print(
        f"\n750 frames of 720p in {spent:.0f} s ({750 / spent:.0f} frames/s in one process); the "
        f"face moves over {np.ptp(truth[:, 0]):.0f} px; distance of the box's centre from the "
        f"face's, in face widths: median {np.median(off):.3f}, largest {off.max():.3f}"
    )
    assert off.max() < 0.15
