"""Videos become clips that follow the face; a killed run and an unhurried one end the same."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from m2f2cli.data.clips import ClipWriter, FrameReader
from m2f2cli.data.prepare import faces, tracking
from m2f2cli.data.prepare.faces import FacesJob, worker_pool
from m2f2cli.errors import CheckpointError, ConfigError, InputError, M2F2Error, UsageError
from m2f2cli.files import locked
from m2f2cli.options.prepare import FacesOptions
from tests.data.prepare.videos import PHOTO, Scene

SMALL = {"frames": 12, "size": 48, "workers": 1}


def prepare(source, output, **options):
    sources = source if isinstance(source, list) else [source]
    job = FacesJob(sources, output, FacesOptions(**{**SMALL, **options}))
    return {one.key: one for one in job.run()}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def scene():
    return Scene(240, 180, face=70, seconds=2)


@pytest.fixture(scope="module")
def ffpp(scene, tmp_path_factory):
    """Two originals and a forgery of the first, in which the face is hidden for a while."""
    root = tmp_path_factory.mktemp("FaceForensics")
    originals = root / "original_sequences" / "youtube" / "c40" / "videos"
    scene.record(originals / "000.mp4", 30)
    scene.record(originals / "003.mp4", 20, shift=10)
    forged = root / "manipulated_sequences" / "Deepfakes" / "c40" / "videos" / "000_003.mp4"
    scene.record(forged, 30, face=lambda number: number < 10)
    return root


def test_crops_follow_the_face(scene, tmp_path):
    scene.record(tmp_path / "clip.mp4", 50)
    one = prepare(tmp_path / "clip.mp4", tmp_path / "out", frames=25)["clip.mp4"]
    assert (one.frames, one.looked_at, one.without_face) == (25, 25, 0)
    with FrameReader() as reader:
        file = tmp_path / "out" / "clip.h5"
        notes = reader.notes(file, "clip.mp4")
        crops = np.stack([reader.frame(file, "clip.mp4", n) for n in range(25)])
    assert crops.shape == (25, 48, 48, 3)
    assert list(notes.frames) == list(range(1, 50, 2))
    assert tuple(notes.picture) == (240, 180)
    assert notes.fps == 25
    assert notes.source_sha256 == digest(tmp_path / "clip.mp4")
    truth = np.array([scene.place(int(number)) for number in notes.frames])
    centers = (notes.boxes[:, :2] + notes.boxes[:, 2:]) / 2
    off = np.hypot(*(centers - truth[:, :2]).T) / truth[:, 2]
    assert np.ptp(truth[:, 0]) > 100  # it moved
    assert off.max() < 0.2
    # The same face all along: crops resemble each other, a fixed crop would not.
    spread = crops.astype(float).std(axis=0).mean()
    fixed = np.stack([scene.draw(int(number))[55:125, 85:155] for number in notes.frames])
    assert spread < 0.5 * fixed.astype(float).std(axis=0).mean()


def test_faceforensics_becomes_the_published_files(ffpp, tmp_path):
    done = prepare(ffpp, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["FF++_Deepfakes_c40.h5", "FF++_original_c40.h5"]
    assert {key: one.status for key, one in done.items()} == dict.fromkeys(
        ("000", "003", "000_003"), "ok"
    )
    assert done["000_003"].without_face == done["000_003"].looked_at - done["000_003"].frames > 0


def test_boxes_of_the_original_serve_its_forgery(ffpp, tmp_path):
    prepare(ffpp / "original_sequences", tmp_path)
    forged = prepare(ffpp / "manipulated_sequences", tmp_path, boxes_from=tmp_path)["000_003"]
    assert forged.frames == 12
    with FrameReader() as reader:
        original = reader.notes(tmp_path / "FF++_original_c40.h5", "000")
        notes = reader.notes(tmp_path / "FF++_Deepfakes_c40.h5", "000_003")
    assert np.array_equal(notes.frames, original.frames)
    assert np.array_equal(notes.boxes, original.boxes)
    assert notes.boxes_from == original.source_sha256
    again = prepare(ffpp / "manipulated_sequences", tmp_path, boxes_from=tmp_path)["000_003"]
    assert again.earlier
    with pytest.raises(UsageError, match="made with boxes-from True, this run has False"):
        prepare(ffpp / "manipulated_sequences", tmp_path)


def test_boxes_that_do_not_fit_are_named(ffpp, scene, tmp_path):
    out = tmp_path / "out"
    prepare(ffpp / "original_sequences", out)
    with pytest.raises(InputError, match=r"no file 'FF\+\+_original_c40\.h5'"):
        prepare(ffpp / "manipulated_sequences", out, boxes_from=tmp_path)
    strangers = tmp_path / "manipulated_sequences" / "FaceSwap" / "c40" / "videos"
    scene.record(strangers / "001_000.mp4", 5)
    Scene(200, 180, face=70, seconds=2).record(strangers / "000_777.mp4", 5)
    done = prepare(tmp_path / "manipulated_sequences", tmp_path / "b", boxes_from=out)
    assert done["001_000"].message == "There are no boxes for '001_000'."
    assert "is 200x180, but the boxes are for 240x180" in done["000_777"].message
    assert os.listdir(tmp_path / "b") == []
    # One without boxes comes first; the others still go on where they stopped.
    scene.record(strangers / "003_777.mp4", 20)
    (strangers / "000_777.mp4").unlink()
    for again in (False, True):
        done = prepare(strangers, tmp_path / "b", boxes_from=out, frames=7)
        assert [done["003_777"].status, done["003_777"].earlier] == ["ok", again]
    ClipWriter(tmp_path / "bare.h5").write("000", np.zeros((1, 4, 4, 3), np.uint8))
    ClipWriter(tmp_path / "bare.h5").finish()
    with pytest.raises(InputError, match="does not say where its crops were cut"):
        prepare(ffpp, tmp_path / "c", boxes_from=tmp_path / "bare.h5")


def test_pictures_are_clips_of_one_frame_and_folders_of_frames_are_clips(scene, tmp_path):
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    one = prepare(tmp_path / "photo.jpg", tmp_path / "out")["photo.jpg"]
    assert (one.frames, one.status) == (1, "ok")
    frames = tmp_path / "original_sequences" / "youtube" / "c23" / "images" / "007"
    frames.mkdir(parents=True)
    for number in range(6):
        Image.fromarray(scene.draw(number)).save(frames / f"{number:04d}.png")
    clip = prepare(tmp_path / "original_sequences", tmp_path / "out", frames=3)["007"]
    assert (clip.file, clip.frames) == ("FF++_original_c23.h5", 3)
    with FrameReader() as reader:
        assert list(reader.notes(tmp_path / "out" / clip.file, "007").frames) == [1, 3, 5]


def test_bad_videos_are_reported_and_the_others_done(scene, tmp_path):
    folder = tmp_path / "videos"
    scene.record(folder / "good.mp4", 10)
    scene.record(folder / "empty_scene.mp4", 10, face=lambda number: False)
    whole = scene.record(tmp_path / "whole.mkv", 60).read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_bytes(b"no video at all" * 100)
    (folder / "header.mp4").write_bytes((folder / "good.mp4").read_bytes()[:300])
    (folder / "bad.jpg").write_bytes(PHOTO.read_bytes()[:5000])
    done = prepare(folder, tmp_path / "out")
    assert {key: one.status for key, one in done.items()} == {
        "good.mp4": "ok",
        "cut.mkv": "ok",
        "empty_scene.mp4": "no_face",
        "empty.mp4": "empty",
        "text.mp4": "unreadable",
        "header.mp4": "unreadable",
        "bad.jpg": "truncated",
    }
    assert "of 2.4 seconds were found" in done["cut.mkv"].message
    assert done["empty_scene.mp4"].message == "No face was found in 10 frames."
    with FrameReader() as reader:
        assert set(reader.shapes(tmp_path / "out" / "videos.h5")) == {"good.mp4", "cut.mkv"}


def test_no_faces_at_all_makes_no_file(scene, tmp_path):
    scene.record(tmp_path / "clip.mp4", 4, face=lambda number: False)
    done = prepare(tmp_path / "clip.mp4", tmp_path / "out")
    assert done["clip.mp4"].status == "no_face"
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.slow
def test_going_on_adds_what_is_new_and_repeats_what_changed(scene, tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    scene.record(folder / "a.mp4", 10)
    prepare(folder, tmp_path / "out")
    scene.record(folder / "b.mp4", 12)
    worked: list[str] = []
    cut = tracking.cut_faces
    monkeypatch.setattr(
        faces, "cut_faces", lambda video, **how: worked.append(video.key) or cut(video, **how)
    )
    done = prepare(folder, tmp_path / "out")
    assert worked == ["b.mp4"]
    assert [done[key].earlier for key in ("a.mp4", "b.mp4")] == [True, False]
    scene.record(folder / "a.mp4", 14)
    prepare(folder, tmp_path / "out")
    assert worked == ["b.mp4", "a.mp4"]
    prepare(folder, tmp_path / "new")
    assert digest(tmp_path / "out" / "videos.h5") == digest(tmp_path / "new" / "videos.h5")
    for changed, words in (({"margin": 0.5}, "margin 0.3, this run has 0.5"), ({"size": 32}, "48")):
        with pytest.raises(UsageError, match=words):
            prepare(folder, tmp_path / "out", **changed)
    prepare(folder, tmp_path / "out", size=32, overwrite=True)
    with FrameReader() as reader:
        assert reader.shapes(tmp_path / "out" / "videos.h5")["a.mp4"].width == 32


def test_files_of_others_are_not_touched(scene, tmp_path):
    scene.record(tmp_path / "videos" / "a.mp4", 4)
    writer = ClipWriter(tmp_path / "videos.h5")
    writer.write("000", np.zeros((1, 4, 4, 3), np.uint8))
    writer.finish()
    before = digest(writer.path)
    with pytest.raises(UsageError, match=r"videos\.h5' was not made by m2f2"):
        prepare(tmp_path / "videos", tmp_path)
    assert digest(writer.path) == before


@pytest.mark.slow
def test_processes_change_nothing(ffpp, tmp_path):
    prepare(ffpp, tmp_path / "one")
    prepare(ffpp, tmp_path / "two", workers=2)
    names = os.listdir(tmp_path / "one")
    assert len(names) == 2
    for name in names:
        assert digest(tmp_path / "one" / name) == digest(tmp_path / "two" / name)


@pytest.mark.slow
def test_killed_and_run_again_ends_with_the_same_file(scene, tmp_path):
    folder = tmp_path / "videos"
    for number in range(6):
        scene.record(folder / f"{number}.mp4", 20, shift=7 * number)
    command = (sys.executable, "-m", "m2f2cli", "prepare", "faces", str(folder), "--frames", "12")
    command = (*command, "--size", "48", "--workers", "2", "--output", str(tmp_path / "out"))
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    parts = tmp_path / "out" / ".videos.h5.parts"
    limit = time.monotonic() + 60
    while not list(parts.glob("*.h5")) and time.monotonic() < limit and run.poll() is None:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "videos.h5").exists()
    kept = set(parts.glob("*.h5"))
    assert kept
    done = prepare(folder, tmp_path / "out")
    assert len(kept) <= sum(one.earlier for one in done.values()) < 6
    assert os.listdir(tmp_path / "out") == ["videos.h5"]
    prepare(folder, tmp_path / "unhurried")
    assert digest(tmp_path / "out" / "videos.h5") == digest(tmp_path / "unhurried" / "videos.h5")


def test_a_full_disk_stops_the_run_and_keeps_what_is_done(ffpp, tmp_path, monkeypatch):
    write = ClipWriter.write

    def full(self, key, *rest):
        if key == "003":
            raise CheckpointError(f"Cannot write '{self.path}': {os.strerror(errno.ENOSPC)}.")
        write(self, key, *rest)

    monkeypatch.setattr(ClipWriter, "write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        prepare(ffpp, tmp_path)
    monkeypatch.undo()
    done = prepare(ffpp, tmp_path)
    assert [done[key].earlier for key in ("000", "003", "000_003")] == [True, False, False]


def test_an_unwritable_output_is_one_sentence(ffpp, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        prepare(ffpp, tmp_path / "file" / "out")


def test_two_runs_do_not_share_a_folder(ffpp, tmp_path):
    with (
        locked(tmp_path, "preparing into"),
        pytest.raises(M2F2Error, match="Another process is preparing"),
    ):
        prepare(ffpp, tmp_path)


def _die(number):
    os._exit(number)


def test_a_worker_that_dies_is_said():
    died = pytest.raises(M2F2Error, match="A worker process died")
    with died, worker_pool(2, _die, at_most=9) as run_all:
        list(run_all([1, 2]))


def test_impossible_options_are_refused():
    for wrong in ({"frames": 0}, {"size": 4}, {"margin": -1}, {"workers": 0}):
        with pytest.raises(ConfigError):
            FacesOptions(**wrong)
