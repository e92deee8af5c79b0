from __future__ import annotations

import shutil

import h5py
import numpy as np
import pytest

from m2f2cli.checkpoints import io
from m2f2cli.data.clips import FrameReader
from m2f2cli.errors import InputError
from m2f2cli.options.training_data import DataOptions
from m2f2cli.training.detector import prepare, state_folder, train_detector
from m2f2cli.training.pictures import PictureStore
from m2f2cli.training.sources import read_sources
from tests.training.conftest import TOY_KINDS


@pytest.fixture
def ffpp(options, toy_ffpp):
    """Options of a run on FaceForensics++; any of them can be changed."""

    def build(**changes):
        given = {"data": f"ffpp:{toy_ffpp}", "manipulations": list(TOY_KINDS)}
        return options(**(given | {"validation_frames": 3} | changes))

    return build


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_it_learns_from_videos(ffpp):
    lines: list[str] = []
    folder = train_detector(
        ffpp(epochs=6, learning_rate=3e-3, frames_per_video=2, balance=True, flip=0.0),
        notify=lines.append,
    )
    stage = io.read_stage(folder)
    assert stage["metrics"]["selected"]["auc"] > 0.9
    train, held = stage["data"]["train"], stage["data"]["validation"]
    assert (train["real"], train["FaceSwap"], train["videos"], train["items"]) == (6, 6, 18, 48)
    assert (held["real"], held["FaceSwap"], held["videos"], held["items"]) == (4, 4, 12, 36)
    assert stage["options"]["manipulations"] == list(TOY_KINDS)
    assert any(
        "train: 18 videos of 6 identities (6 Deepfakes, 6 FaceSwap, 6 real), 48 an epoch" in line
        for line in lines
    )


@pytest.mark.slow
def test_worker_processes_change_nothing(ffpp, toy_data, tmp_path):
    mixed = {"data": [ffpp().data.data[0], str(toy_data)], "self_blend": 0.3, "epochs": 2}
    folders = [
        train_detector(ffpp(**mixed, workers=workers, output=tmp_path / str(workers)))
        for workers in (0, 2)
    ]
    assert len({weights(folder) for folder in folders}) == 1
    assert io.read_stage(folders[0])["data"]["train"]["videos"] == 18


def test_only_single_frames_are_read_and_none_is_kept(ffpp, toy_ffpp, monkeypatch):
    read: list[tuple[str, int]] = []
    original = FrameReader.frame

    def frame(self, file, key, index):
        read.append((key, index))
        return original(self, file, key, index)

    monkeypatch.setattr(FrameReader, "frame", frame)
    run = prepare(ffpp(domain_quantile=0.0, cache="always", flip=0.0, blur=0.0, jpeg=0.0))
    assert sorted(read) == sorted(
        (sample.clip, 2) for part in read_sources(run.options.data) for sample in part.samples
    )
    pictures = run.dataset
    read.clear()
    shown = [pictures.order[n] for n in range(len(pictures))]
    for number in range(len(pictures)):
        pictures[number]
    assert read == [(pictures._samples[t.sample].clip, t.frame) for t in shown]
    with h5py.File(toy_ffpp / "FF++_original_c23.h5") as file:
        whole = file["000"][:]
    number = next(n for n, s in enumerate(pictures._samples) if s.name == "real/000")
    assert np.array_equal(pictures.store.read(number, 3), whole[3])


def damage(root):
    """Take a chunk away from under a video's last frame, so that only reading it shows."""
    file = root / "FF++_FaceSwap_c23.h5"
    with h5py.File(file, "a") as content:
        del content["002_003"]
        clip = np.random.default_rng(0).integers(0, 255, (5, 40, 40, 3), dtype=np.uint8)
        content.create_dataset("002_003", data=clip, chunks=(1, 40, 40, 3), compression="gzip")
        chunk = content["002_003"].id.get_chunk_info(4)
    with file.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\0" * 64)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_frame_that_breaks_later_ends_the_run_in_one_sentence(ffpp, toy_ffpp, tmp_path, workers):
    root = shutil.copytree(toy_ffpp, tmp_path / "damaged")
    damage(root)
    given = ffpp(data=f"ffpp:{root}", frames_per_video=0, workers=workers, epochs=1)
    with pytest.raises(InputError, match=r"^Video '002_003' in .* is damaged: [^\n]*$") as refused:
        train_detector(given)
    assert "--resume" in refused.value.hint
    assert not given.run.output.exists()


def test_a_video_broken_in_the_middle_is_left_out(toy_ffpp, tmp_path):
    root = shutil.copytree(toy_ffpp, tmp_path / "damaged")
    damage(root)
    with h5py.File(root / "FF++_FaceSwap_c23.h5", "a") as content:
        chunk = content["002_003"].id.get_chunk_info(2)
    with (root / "FF++_FaceSwap_c23.h5").open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\0" * 64)
    train, _ = read_sources(DataOptions((str(root),), manipulations=TOY_KINDS))
    with pytest.raises(InputError, match="1 of 18 pictures cannot be read, 'FaceSwap/002_003'"):
        PictureStore(train, "auto", skip=False)
    left = PictureStore(train, "auto", skip=True)
    assert left.skipped == ["FaceSwap/002_003"]
    assert len(left.samples) == 17


def test_a_class_that_the_limit_leaves_unreadable_is_named(options, toy_data, tmp_path):
    root = shutil.copytree(toy_data, tmp_path / "data")
    for picture in (root / "real").iterdir():
        picture.write_bytes(b"no picture")
    with pytest.raises(InputError, match="no real pictures"):
        prepare(options(data=str(root), limit=1, unreadable="skip"))


def test_limit_makes_a_small_run(ffpp):
    folder = train_detector(ffpp(limit=1, epochs=1))
    data = io.read_stage(folder)["data"]
    assert [data[part]["videos"] for part in ("train", "validation")] == [2, 2]
    assert not state_folder(folder).exists()
