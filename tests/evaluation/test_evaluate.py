from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from m2f2cli.checkpoints.hub import resolve_checkpoint
from m2f2cli.data.clips import ClipWriter
from m2f2cli.data.readers.ffpp import read_ffpp
from m2f2cli.data.samples import SampleSet, read_samples, split_by_identity
from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation.evaluate import (
    count_items,
    evaluate,
    is_test_set,
    read_split,
    score_set,
    truth_of,
)
from m2f2cli.evaluation.predictions import read_predictions
from m2f2cli.evaluation.truth import join
from m2f2cli.inference.pipeline import detect
from m2f2cli.inference.recordfile import Tally
from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.evaluate import EvaluateOptions, ImagesData
from m2f2cli.options.train_detector import TrainDetectorOptions
from m2f2cli.records import Detection
from m2f2cli.training.sources import read_sources
from tests.inference.conftest import MeanJudge, noise_picture
from tests.inference.test_video import flat, write_video

CROPS = DetectOptions(faces="none", frames=3)


def lines(file: Path) -> list[Detection]:
    return [Detection.from_dict(json.loads(line)) for line in file.read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four people, a real and a forged picture of each."""
    for word, shift in (("real", 0), ("fake", 100)):
        for person in range(4):
            noise_picture(tmp_path / "data" / word / f"p{person}.png", person + shift)
    return tmp_path / "data"


@pytest.fixture
def clips(tmp_path: Path) -> SampleSet:
    """Two originals and two fakes of 7 frames; frame n has the level 10 n + 1."""
    root = tmp_path / "ffpp"
    for file, keys in (("original", ("000", "003")), ("FaceSwap", ("000_003", "003_000"))):
        writer = ClipWriter(root / f"FF++_{file}_c23.h5")
        for key in keys:
            frames = np.stack([np.full((8, 8, 3), 10 * n + 1, np.uint8) for n in range(7)])
            writer.write(key, frames)
        writer.finish()
    return read_ffpp(root, manipulations=["FaceSwap"], split="all")


def test_records_are_those_of_detect_by_the_names_of_the_set(data, tmp_path):
    out = tmp_path / "out.jsonl"
    tally = score_set(read_samples(data), model=MeanJudge(), output=out)
    pictures = sorted(data.rglob("*.png"))
    wanted = list(detect([str(p) for p in pictures], model=MeanJudge(), options=CROPS))
    found = lines(out)
    assert [record.path for record in found] == [p.relative_to(data).as_posix() for p in pictures]
    for record, expected in zip(found, wanted, strict=True):
        settings = replace(record.settings, frames_asked=CROPS.frames)
        assert replace(record, path=expected.path, settings=settings) == expected
    assert vars(tally)["real"] + vars(tally)["fake"] == 8
    scored = join(truth_of(read_samples(data), CROPS), read_predictions(out))
    assert (scored.missing, scored.unknown, scored.duplicates) == ((), (), ())
    assert scored.dataset == "images"


def test_a_killed_run_goes_on_to_the_same_file(data, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    samples = read_samples(data)
    score_set(samples, model=MeanJudge(), output=whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: content.index(b"\n", len(content) // 2) + 40])
    steps = []
    tally = score_set(samples, model=MeanJudge(), output=cut, advance=lambda: steps.append(1))
    assert cut.read_bytes() == content
    assert 0 < len(steps) < 8
    assert tally.earlier == 8 - len(steps)
    judge = MeanJudge()
    assert score_set(samples, model=judge, output=cut) == replace(tally, earlier=8)
    assert judge.batches == []


def test_an_unreadable_picture_is_a_record_and_the_rest_goes_on(data, tmp_path):
    samples = read_samples(data)
    (data / "fake" / "p1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (data / "real" / "p2.png").unlink()
    tally = score_set(samples, model=MeanJudge(), output=tmp_path / "out.jsonl")
    status = {record.path: record.status for record in lines(tmp_path / "out.jsonl")}
    assert status.pop("fake/p1.png") == "truncated"
    assert status.pop("real/p2.png") == "missing"
    assert set(status.values()) == {"ok"}
    assert tally.failed == 2


def test_records_of_other_data_are_not_resumed(data, tmp_path):
    out = tmp_path / "out.jsonl"
    score_set(read_samples(data), model=MeanJudge(), output=out)
    before = out.read_bytes()
    noise_picture(data / "fake" / "p3.png", 999)
    with pytest.raises(UsageError, match=r"'fake/p3\.png' with another content"):
        score_set(read_samples(data), model=MeanJudge(), output=out)
    (data / "fake" / "p3.png").rename(data / "fake" / "p4.png")
    with pytest.raises(UsageError, match=r"1 pictures .* not in this data set, 'fake/p3\.png'"):
        score_set(read_samples(data), model=MeanJudge(), output=out)
    assert out.read_bytes() == before
    score_set(read_samples(data), model=MeanJudge(), output=out, overwrite=True)
    assert {record.path for record in lines(out)} >= {"fake/p4.png"}


def test_records_of_another_model_are_not_resumed(data, tmp_path):
    out = tmp_path / "out.jsonl"
    score_set(read_samples(data), model=MeanJudge(), output=out)
    other = MeanJudge()
    other.fingerprint = "sha256:other"
    with pytest.raises(UsageError, match="model_fingerprint"):
        score_set(read_samples(data), model=other, output=out)
    with pytest.raises(UsageError, match="threshold"):
        score_set(read_samples(data), model=MeanJudge(threshold=0.7), output=out)


def test_frames_are_read_one_by_one_evenly_spaced(clips, tmp_path, monkeypatch):
    read: list[object] = []
    original = h5py.Dataset.__getitem__

    def watched(self, where, *rest):
        read.append(where)
        return original(self, where, *rest)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", watched)
    out = tmp_path / "out.jsonl"
    score_set(clips, model=MeanJudge(), output=out, options=CROPS)
    assert sorted(read) == sorted([1, 3, 5] * 4)  # whole slices of one frame, nothing else
    found = {record.path: record for record in lines(out)}
    assert set(found) == {
        f"{clip.kind}/{clip.clip}/{index}" for clip in clips.samples for index in (1, 3, 5)
    }
    assert count_items(clips, CROPS) == len(found) == 12
    for name, record in found.items():
        level = 10 * int(name.rpartition("/")[2]) + 1
        assert record.fake_probability == pytest.approx(level / 255, abs=1e-5)
        assert record.settings.frames_asked == 3
    assert "FF++_FaceSwap_c23.h5" in str(found["FaceSwap/000_003/3"].note)
    scored = join(truth_of(clips, CROPS), read_predictions(out))
    assert scored.missing == scored.unknown == ()
    assert {item.group for item in scored.items} == {
        "real/000", "real/003", "FaceSwap/000_003", "FaceSwap/003_000"
    }  # fmt: skip


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two dark real videos and two bright forged ones, without a face."""
    for word, level in (("Real", 40), ("Fake", 200)):
        (tmp_path / "videos" / word).mkdir(parents=True)
        for person in range(2):
            write_video(tmp_path / "videos" / word / f"p{person}.mp4", [flat(level)] * 5)
    return tmp_path / "videos"


def test_a_folder_of_videos_is_measured_a_record_a_video(videos, tmp_path):
    samples = read_samples(videos)
    out, judge = tmp_path / "records.jsonl", MeanJudge()
    for _ in range(2):  # the second run resumes
        score_set(samples, model=judge, output=out, options=CROPS)
    records = lines(out)
    assert [(r.path, r.kind) for r in records] == [(str(s.path), "video") for s in samples.samples]
    assert [len(r.frames) for r in records] == [3] * 4
    assert count_items(samples, CROPS) == 4
    scored = join(truth_of(samples, CROPS), read_predictions(out))
    assert not scored.missing
    assert [(i.fake_probability or 0) > 0.5 for i in scored.items] == [
        i.label for i in scored.items
    ]


def test_faces_have_to_be_found_in_videos(videos, tiny_detector_folder):
    options = EvaluateOptions(ImagesData(videos), model=str(tiny_detector_folder))
    with pytest.raises(UsageError, match="holds videos") as refused:
        evaluate(options)
    assert "--faces auto" in refused.value.hint
    found = evaluate(replace(options, faces="auto", resamples=0))
    assert found.report["counts"]["failed"] == 4  # there are none


def test_crops_of_own_videos_are_measured_frame_by_frame(tmp_path, tiny_detector_folder):
    writer = ClipWriter(tmp_path / "crops" / "mine.h5")
    for number, key in enumerate(("real/a.mp4", "real/b.mp4", "fake/c.mp4", "fake/d.mp4")):
        writer.write(key, np.full((5, 40, 40, 3), 50 * number, np.uint8))
    writer.finish()
    data = ImagesData(tmp_path / "crops", frames=2)
    found = evaluate(EvaluateOptions(data, model=str(tiny_detector_folder), resamples=0))
    names = [(item.name, item.group) for item in found.scored.items]
    assert names[:2] == [(f"mine/fake/c.mp4/{n}", "mine/fake/c.mp4") for n in (1, 3)]
    assert len(names) == 8
    assert found.unanswered == 0
    assert found.report["dataset"] == "images"


def test_a_file_that_vanished_or_shrank_is_a_status_of_its_frames(clips, tmp_path):
    (tmp_path / "ffpp" / "FF++_FaceSwap_c23.h5").unlink()
    (tmp_path / "ffpp" / "FF++_original_c23.h5").write_bytes(b"no HDF5")
    tally = score_set(clips, model=MeanJudge(), output=tmp_path / "out.jsonl", options=CROPS)
    assert tally == Tally(failed=12)
    assert {r.status for r in lines(tmp_path / "out.jsonl")} == {"missing", "unreadable"}


def stage(folder: Path, samples, **options) -> Path:
    """What a training says of its cut."""
    share, seed = options.get("validation-share", 0.4), options.get("split-seed", 3)
    train, held = split_by_identity(samples, share, seed)
    folder.mkdir(exist_ok=True)
    (folder / "stage.json").write_text(
        json.dumps(
            {
                "options": {"validation-share": share, "split-seed": seed, **options},
                "data": {
                    "train": {"fingerprint": train.fingerprint()},
                    "validation": {"fingerprint": held.fingerprint()},
                },
            }
        )
    )
    return folder


def test_validation_and_train_are_the_training_s_own(data, tmp_path):
    model = stage(tmp_path / "model", read_samples(data), data=str(data))
    held, rest = (read_split(data, split, model=model) for split in ("validation", "train"))
    assert 0 < len(held) < 8
    assert len(held) + len(rest) == 8
    assert not held.people() & rest.people()
    assert len(read_split(data, "all")) == len(read_split(data, "test")) == 8


def test_the_cut_is_that_of_train_detector(data, tmp_path):
    options = TrainDetectorOptions.from_flat({"data": str(data), "output": "x", "split-seed": 3})
    train, held = read_sources(options.data)
    flat = json.loads(json.dumps(options.to_flat()))
    model = stage(tmp_path / "model", read_samples(data), **flat)
    assert read_split(data, "validation", model=model) == held
    assert read_split(data, "train", model=model) == train


@pytest.mark.skipif("M2F2_DDVQA" not in os.environ, reason="M2F2_DDVQA is not set")
def test_what_the_lite_detector_held_out():
    held = read_split(os.environ["M2F2_DDVQA"], "validation", model=resolve_checkpoint("lite"))
    assert len(held) > 100
    assert not is_test_set(held)


def test_a_cut_by_named_identities_is_repeated(data, tmp_path):
    people = tmp_path / "people.csv"
    rows = [f"{s.name},{'ab'[int(s.name[-5]) % 2]}" for s in read_samples(data).samples]
    people.write_text("\n".join(rows))
    samples = read_samples(data, people)
    model = stage(tmp_path / "model", samples, identities=str(people))
    assert len(read_split(data, "validation", model=model)) == 4
    moved = people.rename(tmp_path / "moved.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_split(data, "validation", model=model)
    assert len(read_split(data, "validation", model=model, identities=moved)) == 4


def test_other_data_than_the_training_s_is_no_validation_set(data, tmp_path):
    model = stage(tmp_path / "model", read_samples(data))
    noise_picture(data / "real" / "p9.png", 9)
    with pytest.raises(InputError, match=r"not what .* was trained on"):
        read_split(data, "validation", model=model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation": "elsewhere"}, "a folder of its own, elsewhere"),
        ({"data": ["a", "b"]}, "several folders"),
        ({"limit": 10}, "10 pictures of each class"),
    ],
)
def test_a_cut_that_cannot_be_repeated_says_why(data, tmp_path, options, words):
    model = stage(tmp_path / "model", read_samples(data), **options)
    with pytest.raises(InputError, match=words):
        read_split(data, "train", model=model)


def test_a_split_needs_a_model_that_tells_of_it(data, tmp_path, tiny_detector_folder):
    with pytest.raises(UsageError, match="needs the model"):
        read_split(data, "validation")
    with pytest.raises(UsageError, match="no split 'dev'"):
        read_split(data, "dev")
    with pytest.raises(InputError, match="no training"):
        read_split(data, "validation", model=tiny_detector_folder)


def test_test_sets_are_known_as_such(data, clips):
    samples = read_samples(data)
    assert not is_test_set(samples)
    assert is_test_set(samples, "test")
    assert truth_of(samples, CROPS, "test").split == "test"
    test_folder = data.rename(data.with_name("test"))
    assert is_test_set(read_samples(test_folder))
    assert truth_of(read_samples(test_folder), CROPS, "all").split == "test"
    assert not is_test_set(clips)
    assert is_test_set(replace(clips, split="test"))
    only = replace(clips.samples[0], path=Path("FF++_original_c23_test_only.h5"))
    assert is_test_set(replace(clips, samples=(only,)))


def test_the_library_says_what_tripped_and_shows_how_far_it_is(data, tiny_detector_folder):
    shown = []

    @contextmanager
    def progress(label, total):
        shown.append((label, total, 0))
        yield lambda: shown.append((label, total, shown[-1][2] + 1))

    options = EvaluateOptions(
        ImagesData(str(data)), model=str(tiny_detector_folder), resamples=0, min_auc=1.0
    )
    found = evaluate(options, progress)
    assert found.unanswered == 0
    assert found.report["counts"]["answered"] == 8
    assert (found.tripped == ()) == (found.report["figures"]["frame_auc"]["value"] == 1)
    assert shown[-1] == ("Judging", 8, 8)
    with pytest.raises(UsageError, match="folder of pictures is missing"):
        EvaluateOptions(ImagesData())
